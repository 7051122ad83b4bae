# SPDX-License-Identifier: Apache-2.0
"""Train a small text encoder and its tokenizer on captions alone, for train_text_to_image.py --text_encoder_path."""

import argparse
import itertools
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase, Qwen2Config, Qwen2Model

from diffusers_hart.training.arguments import add_data_arguments, add_training_arguments, positive_int
from diffusers_hart.training.byte_pair_tokenizer import train_byte_pair_tokenizer
from diffusers_hart.training.caption_source import caption_preparer, captions_alone
from diffusers_hart.training.data import ExampleStream
from diffusers_hart.training.data_sources import load_image_source
from diffusers_hart.training.new_models import new_text_encoder, read_text_encoder_config
from diffusers_hart.training.publishing import hub_repository, publish_pipeline
from diffusers_hart.training.text_encoder_training import TextEncoderTrainingModule, language_model_inputs
from diffusers_hart.training.train_loop import create_accelerator, mean_figures, train
from diffusers_hart.training.weight_updates import WeightUpdates


SIZES = {"hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
USE = """With `pip install transformers`:

```py
from transformers import AutoModel, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{repo_id}", subfolder="tokenizer")
text_encoder = AutoModel.from_pretrained("{repo_id}", subfolder="text_encoder")
```"""


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    group = parser.add_argument_group("tokenizer")
    group.add_argument("--vocab_size", type=positive_int, default=1024)
    group.add_argument("--tokenizer_captions", type=positive_int, default=10000, help="captions it is made of")
    group = parser.add_argument_group("text encoder")
    group.add_argument("--text_encoder_config", help="JSON file of Qwen2Config's arguments; flags go before it")
    for name, size in SIZES.items():
        group.add_argument(f"--{name}", type=positive_int, help=f"by default {size}")
    group.add_argument("--num_key_value_heads", type=positive_int, help="by default as many as heads")
    group.add_argument("--intermediate_size", type=positive_int, help="by default 3 times --hidden_size")
    group.add_argument("--caption_length", type=positive_int, default=128, help="tokens of a caption at most")
    group.add_argument(
        "--recall_weight",
        type=float,
        default=1.0,
        help="weight of telling from a hidden state which token it stands at, beside predicting the next one",
    )
    group.add_argument(
        "--history_weight", type=float, default=0.125, help="weight of telling from it which tokens came before"
    )
    add_data_arguments(parser)
    add_training_arguments(parser)
    parser.set_defaults(train_batch_size=64, learning_rate=1e-3)
    return parser.parse_args(argv)


def text_encoder_config(args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase) -> Qwen2Config:
    """The sizes of the flags, of the file and by default, in this order, for the tokens of the tokenizer."""
    names = (*SIZES, "num_key_value_heads", "intermediate_size")
    flags = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    config = SIZES | read_text_encoder_config(args.text_encoder_config) | flags
    config.setdefault("num_key_value_heads", config["num_attention_heads"])
    config.setdefault("intermediate_size", 3 * config["hidden_size"])
    special = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    return Qwen2Config(**config | special | {"vocab_size": len(tokenizer), "tie_word_embeddings": True})


def make_tokenizer(args: argparse.Namespace, source: Any, folder: Path) -> None:
    """Make the tokenizer of the first captions of the run and save it."""
    stream = ExampleStream(source, caption_preparer(args.caption_column), batch_size=1, seed=args.seed)
    count = min(args.tokenizer_captions, len(source) if hasattr(source, "__len__") else args.tokenizer_captions)
    captions = (example["caption"] for example in itertools.islice(stream, count))
    train_byte_pair_tokenizer(captions, args.vocab_size).save_pretrained(folder)


class TextEncoderParts:
    """What is saved: both parts beside each other, as in a pipeline."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, text_encoder: Qwen2Model):
        self.parts = {"tokenizer": tokenizer, "text_encoder": text_encoder}

    def save_pretrained(self, folder: str | Path) -> None:
        for name, part in self.parts.items():
            part.save_pretrained(Path(folder) / name)


def main(argv: list[str] | None = None) -> Path:
    args = parse_args(argv)
    accelerator = create_accelerator(args)
    repo_id = hub_repository(args) if accelerator.is_main_process else None

    # 1. The captions and the tokenizer; a run that is resumed goes on with the one it has
    tokenizer_folder = Path(args.output_dir) / "tokenizer"
    with accelerator.main_process_first():
        source = load_image_source(
            args.dataset_name,
            args.dataset_config_name,
            args.train_data_dir,
            args.train_shards,
            args.train_iterable,
            args.image_column,
            args.caption_column,
            args.cache_dir,
        )
        source = captions_alone(source, args.caption_column)
        is_resumed = args.resume_from_checkpoint is not None and tokenizer_folder.exists()
        if accelerator.is_main_process and not is_resumed:
            make_tokenizer(args, source, tokenizer_folder)
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)

    # 2. The text encoder
    text_encoder = new_text_encoder(text_encoder_config(args, tokenizer), args.seed).train()
    if args.gradient_checkpointing:
        text_encoder.gradient_checkpointing_enable()
    module = TextEncoderTrainingModule(text_encoder, args.recall_weight, args.history_weight)
    weights = WeightUpdates(args, accelerator, module)

    # 3. The run
    def training_step(micro_batches: list[dict[str, Any]], step: int) -> dict[str, torch.Tensor]:
        figures = []
        for batch in micro_batches:
            inputs = language_model_inputs(tokenizer, batch["caption"], args.caption_length)
            inputs = {name: tensor.to(accelerator.device, non_blocking=True) for name, tensor in inputs.items()}
            with accelerator.accumulate(weights.module):
                losses = weights.module(**inputs)
                figures.append(losses | weights.update(losses["loss"]))
        return mean_figures(figures)

    train(args, accelerator, source, caption_preparer(args.caption_column), training_step)

    # 4. The result
    with weights.for_inference() as current:
        if current:
            batch_size = args.train_batch_size * args.gradient_accumulation_steps * accelerator.num_processes
            publish_pipeline(
                args,
                TextEncoderParts(tokenizer, current["text_encoder"]),
                "A tokenizer of byte pairs and a causal language model, trained on captions with diffusers-hart.",
                {
                    "Tokens": len(tokenizer),
                    "Width, layers": f"{text_encoder.config.hidden_size}, {text_encoder.config.num_hidden_layers}",
                    "Weight of recalling tokens": f"{args.recall_weight:g}",
                    "Weight of recalling those before": f"{args.history_weight:g}",
                    "Steps": args.max_train_steps,
                    "Captions a step": batch_size,
                    "Learning rate": f"{args.learning_rate:g}, {args.lr_scheduler}",
                    "Precision": accelerator.mixed_precision,
                    "Weights": f"average, decay {args.ema_decay:g}" if args.use_ema else "of the last step",
                    "Seed": args.seed,
                },
                pipeline_tag=None,
                repo_id=repo_id,
                use=USE,
            )
    accelerator.end_training()
    return Path(args.output_dir)


if __name__ == "__main__":
    main()
