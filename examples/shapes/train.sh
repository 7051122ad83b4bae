#!/usr/bin/env bash
# Makes a small model of the procedural data set from nothing: bash examples/shapes/train.sh OUTPUT_DIR
# The model in src/diffusers_hart/shapes/model was made by these commands over a longer time and with detours, which its
# README.md names: they were never run in one go. The checker is that of step 2.
set -euo pipefail
out=${1:?where to}
here=$(dirname "$0")
data="--train_iterable diffusers_hart.shapes:ShapesDataset --dataloader_num_workers 8"
tokenizer="examples/train_hybrid_tokenizer.py $data --mixed_precision bf16 --allow_tf32 --train_batch_size 128
    --adversarial_weight 0 --l1_weight 0.2 --use_ema --ema_decay 0.999 --num_validation_images 16"

# 1. Text: byte-level BPE and a language model of two layers, on captions; two CPU cores will do
python examples/train_text_encoder.py --train_iterable diffusers_hart.shapes:ShapesDataset --vocab_size 1024 \
    --hidden_size 192 --num_hidden_layers 2 --num_attention_heads 3 --intermediate_size 512 --caption_length 48 \
    --train_batch_size 64 --learning_rate 2e-3 --lr_scheduler cosine --lr_warmup_steps 100 --max_train_steps 2400 \
    --use_ema --ema_decay 0.99 --output_dir "$out/text"

# 2. The checker
python examples/train_shapes_checker.py --train_batch_size 256 --max_train_steps 4000 --learning_rate 2e-3 \
    --lr_scheduler cosine --lr_warmup_steps 100 --mixed_precision bf16 --dataloader_num_workers 8 \
    --use_ema --ema_decay 0.995 --num_validation_images 2000 --output_dir "$out/checker"

# 3. The tokenizer: encoder and decoder, then codes, then both kinds of latents together, then the decoder alone
python $tokenizer --latent_channels 16 --block_out_channels 24,48,96,128 --layers_per_block 1 --norm_num_groups 8 \
    --codebook_size 1024 --scales 1,2,3,4,6,8,11,16 --phases continuous:700,discrete:2500 \
    --learning_rate 8e-4 --lr_scheduler cosine --lr_warmup_steps 100 --restart_codes_after 50 \
    --output_dir "$out/tokenizer-discrete"
accelerate launch --multi_gpu --num_processes 2 --mixed_precision bf16 $tokenizer --compile \
    --pretrained_model_name_or_path "$out/tokenizer-discrete" --phases joint:3400 \
    --adam_beta1 0.9 --adam_beta2 0.99 --learning_rate 1e-3 --lr_scheduler cosine --lr_warmup_steps 100 \
    --restart_codes_after 50 --output_dir "$out/tokenizer-joint"
python $tokenizer --pretrained_model_name_or_path "$out/tokenizer-joint" --phases alternating:800 \
    --adam_beta1 0.9 --adam_beta2 0.99 --learning_rate 3e-4 --lr_scheduler cosine --lr_warmup_steps 50 \
    --output_dir "$out/tokenizer"

# 4. Transformer: what is where, on the first three scales of pictures of two objects
python examples/train_text_to_image.py --train_iterable diffusers_hart.shapes.dataset:pairs --dataloader_num_workers 14 \
    --cuda_graphs --mixed_precision bf16 --num_scales 3 \
    --vae_path "$out/tokenizer" --text_encoder_path "$out/text" \
    --transformer_config "$here/transformer.json" --residual_mlp_config "$here/residual_mlp.json" --resolution 128 \
    --scheduler_config "$here/scheduler.json" \
    --train_batch_size 1024 --learning_rate 1e-3 --lr_warmup_steps 100 --max_train_steps 1500 --adam_weight_decay 0.02 \
    --use_ema --ema_decay 0.99 --output_dir "$out/first-scales"

# 5. All scales and the residual MLP: 13 steps a second on one H100
python examples/train_text_to_image.py $data --cuda_graphs --compile --mixed_precision bf16 \
    --pretrained_model_name_or_path "$out/first-scales" --resolution 128 \
    --train_batch_size 256 --learning_rate 1.5e-3 --lr_scheduler warmup_stable_decay --lr_warmup_steps 150 \
    --lr_decay_steps 2000 --max_train_steps 27000 --adam_weight_decay 0.02 --residual_batch_multiplier 2 \
    --self_correction 0.4 \
    --use_ema --ema_decay 0.999 --output_dir "$out/pipeline"

# 6. Half precision, into the package
python examples/shapes/export.py --pipeline "$out/pipeline" --checker "$out/checker"
