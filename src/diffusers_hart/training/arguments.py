# SPDX-License-Identifier: Apache-2.0
import argparse


def positive_int(text: str) -> int:
    """The type of an argument that is a number of things, at least one."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1, not {text}")
    return int(text)


def share(text: str) -> float:
    """The type of an argument that is a share of a whole, from 0 to 1."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"must be from 0 to 1, not {text}")
    return value


def add_data_arguments(parser: argparse.ArgumentParser, caption_column: str | None = "text") -> None:
    """Where pictures come from and how they are read."""
    group = parser.add_argument_group("data, one of the first four")
    group.add_argument("--train_data_dir", help="folder of pictures with metadata.csv or metadata.jsonl")
    group.add_argument("--dataset_name", help="data set on the Hub, or a folder of Dataset.save_to_disk")
    group.add_argument("--train_shards", help="pattern of webdataset tar files")
    group.add_argument("--train_iterable", help="file.py:name or module:name of an iterable of (picture, caption)")
    group.add_argument("--dataset_config_name")
    group.add_argument("--image_column", default="image")
    if caption_column is not None:
        group.add_argument("--caption_column", default=caption_column)
    group.add_argument("--cache_dir")
    add_picture_arguments(group)


def add_picture_arguments(group: argparse._ArgumentGroup) -> None:
    """How pictures are read, wherever they come from."""
    group.add_argument("--resolution", type=positive_int, help="side of the training pictures in pixels")
    group.add_argument("--random_crop", action="store_true", help="crop at random instead of in the middle")
    group.add_argument("--random_flip", action="store_true")
    group.add_argument("--on_bad_image", choices=("error", "skip"), default="error")
    group.add_argument("--dataloader_num_workers", type=int, default=0)


def add_training_arguments(parser: argparse.ArgumentParser) -> None:
    """The run: its length, optimizer, precision, checkpoints, trackers and what becomes of the result."""
    group = parser.add_argument_group("run")
    group.add_argument("--output_dir", required=True)
    group.add_argument("--seed", type=int, default=0)
    group.add_argument("--train_batch_size", type=positive_int, default=4, help="pictures a process and micro-batch")
    group.add_argument("--gradient_accumulation_steps", type=positive_int, default=1)
    group.add_argument("--max_train_steps", type=positive_int, default=1000)
    group.add_argument("--mixed_precision", choices=("no", "fp16", "bf16"))
    group.add_argument("--gradient_checkpointing", action="store_true")
    group.add_argument("--allow_tf32", action="store_true")

    group = parser.add_argument_group("optimizer")
    group.add_argument("--learning_rate", type=float, default=1e-4)
    group.add_argument("--scale_lr", action="store_true", help="the rate is per 256 pictures of the global batch")
    group.add_argument(
        "--lr_scheduler", default="constant_with_warmup", help="one of diffusers', or warmup_stable_decay"
    )
    group.add_argument("--lr_warmup_steps", type=int, default=0)
    group.add_argument("--lr_decay_steps", type=positive_int, help="the last steps, of warmup_stable_decay")
    group.add_argument("--adam_beta1", type=float, default=0.9)
    group.add_argument("--adam_beta2", type=float, default=0.95)
    group.add_argument("--adam_weight_decay", type=float, default=0.05)
    group.add_argument("--adam_epsilon", type=float, default=1e-8)
    group.add_argument("--max_grad_norm", type=float, default=1.0)
    group.add_argument("--use_8bit_adam", action="store_true", help="needs bitsandbytes")
    group.add_argument("--use_ema", action="store_true")
    group.add_argument("--ema_decay", type=share, default=0.9999)

    group = parser.add_argument_group("checkpoints and trackers")
    group.add_argument("--checkpointing_steps", type=positive_int, default=500)
    group.add_argument("--checkpoints_total_limit", type=positive_int)
    group.add_argument("--resume_from_checkpoint", help="a checkpoint's folder, or 'latest'")
    group.add_argument("--report_to", help="tensorboard, wandb, ... or all")
    group.add_argument("--logging_dir", default="logs")
    group.add_argument("--logging_steps", type=positive_int, default=10)
    group.add_argument("--validation_steps", type=positive_int, default=500)
    group.add_argument("--push_to_hub", action="store_true")
    group.add_argument("--hub_model_id")
    group.add_argument("--hub_token")
    group.add_argument("--license", help="licence of the result, for its model card")


def add_hart_arguments(parser: argparse.ArgumentParser) -> None:
    """What the training of a transformer and its residual MLP has besides: the models, the losses, the validation."""
    group = parser.add_argument_group("models")
    group.add_argument("--pretrained_model_name_or_path", help="pipeline to start from: a folder or an id on the Hub")
    group.add_argument("--revision", help="branch, tag or commit of it on the Hub")
    group.add_argument("--variant", help="variant of its files, such as fp16")
    group.add_argument("--vae_path", help="tokenizer of a new pipeline, instead of a pipeline to start from")
    group.add_argument("--vae_subfolder", help="where the tokenizer is in --vae_path, such as vae in a pipeline")
    group.add_argument("--scheduler_config", help="JSON file of HARTScheduler's arguments, of a new pipeline")
    group.add_argument("--from_scratch", action="store_true", help="new transformer and residual MLP, of its sizes")
    group.add_argument("--transformer_config", help="JSON file of arguments of a new transformer, instead of its own")
    group.add_argument("--residual_mlp_config", help="JSON file of arguments of a new residual MLP")
    group.add_argument(
        "--compile", action="store_true", help="compile the repeated blocks, with dynamic shapes, and the encoder"
    )
    group.add_argument(
        "--cuda_graphs", action="store_true", help="replay recorded steps: fast for small models, one GPU"
    )
    group.add_argument(
        "--self_correction",
        type=share,
        default=0.0,
        help="up to what share of tokens scales go on from codes the model drew",
    )
    group.add_argument(
        "--num_scales",
        type=positive_int,
        help="train on the first so many scales alone: what is where, at little cost",
    )
    group.add_argument("--precomputed_data_dir", help="folder of precompute_targets.py, instead of pictures")
    add_loss_arguments(parser)


def add_loss_arguments(parser: argparse.ArgumentParser) -> None:
    """The losses and the validation of a transformer and its residual MLP."""
    group = parser.add_argument_group("loss")
    group.add_argument("--no_token_drop", action="store_true", help="go through all tokens of the last scale")
    group.add_argument("--residual_loss_weight", type=float, default=1.0)
    group.add_argument(
        "--residual_batch_multiplier", type=positive_int, default=4, help="times, noises of each residual"
    )

    group = parser.add_argument_group("validation")
    group.add_argument("--num_validation_images", type=positive_int, default=4, help="of each condition")
    group.add_argument("--validation_guidance_scale", type=float, help="by default the scheduler's")
