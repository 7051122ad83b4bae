# SPDX-License-Identifier: Apache-2.0
"""Train LoRA adapters of a HART text-to-image pipeline on pictures with captions."""

import argparse
from pathlib import Path

from diffusers_hart.training.arguments import add_data_arguments, add_training_arguments
from diffusers_hart.training.lora_training import LoraTraining, add_lora_arguments
from diffusers_hart.training.publishing import hub_repository
from diffusers_hart.training.train_loop import create_accelerator
from diffusers_hart.training.training_data import open_training_data, training_preparer


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add_lora_arguments(parser, caption_dropout=0.1)
    parser.add_argument("--precomputed_data_dir", help="folder of precompute_targets.py, instead of pictures")
    add_data_arguments(parser)
    add_training_arguments(parser)
    parser.set_defaults(adam_weight_decay=1e-2)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> Path:
    args = parse_args(argv)
    accelerator = create_accelerator(args)
    repo_id = hub_repository(args) if accelerator.is_main_process else None
    training = LoraTraining(args, accelerator)

    with accelerator.main_process_first():
        texts = ("caption",) if args.train_text_encoder else ("prompt_embeds", "caption")
        channels = training.pipe.transformer.config.caption_channels
        source = open_training_data(args, training.vae, training.scales, args.caption_column, texts, channels)
    prepare = training_preparer(args, source, training.vae, training.scales, args.caption_column)
    training.run(*training.cached(source, prepare))

    folder = training.publish("LoRA adapters of a HART text-to-image pipeline, trained with diffusers-hart.", repo_id)
    accelerator.end_training()
    return folder


if __name__ == "__main__":
    main()
