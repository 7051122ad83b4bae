# SPDX-License-Identifier: Apache-2.0
import argparse
from pathlib import Path

from .console import print_json


DTYPES = ("fp32", "fp16", "bf16")


def convert(arguments: argparse.Namespace) -> None:
    """Convert a checkpoint in the original layout, a folder with `llm` and `tokenizer`, into one that diffusers loads."""
    from ..conversion import DTYPES as TYPES
    from ..conversion import convert_hart_to_diffusers, read_system_prompt

    prompt = arguments.system_prompt
    folder = convert_hart_to_diffusers(
        arguments.checkpoint,
        arguments.text_encoder,
        arguments.output,
        use_ema=not arguments.no_ema,
        dtype=TYPES.get(arguments.dtype),
        system_prompt=None if prompt is None else read_system_prompt(prompt),
        allow_extra_keys=arguments.allow_extra_keys,
        license=arguments.license,
        base_model=arguments.base_model,
        self_contained=arguments.self_contained,
    )
    if arguments.json:
        print_json({"folder": str(folder), "bytes": sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())})
    else:
        print(folder)


def add_convert_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Path, help="folder of the checkpoint")
    parser.add_argument("output", type=Path, help="folder to write, new or empty")
    parser.add_argument(
        "--text-encoder",
        required=True,
        metavar="MODEL",
        help="language model that encodes prompts, with its tokenizer: a folder or a Hub id",
    )
    parser.add_argument("--no-ema", action="store_true", help="convert the trained weights, not their EMA")
    parser.add_argument("--dtype", choices=DTYPES, help="type to store (default: that of the files)")
    parser.add_argument(
        "--system-prompt",
        metavar="SOURCE",
        help="text before each prompt: a text file, a checkout of the original code, or the text itself",
    )
    parser.add_argument("--allow-extra-keys", action="store_true", help="leave out weights of unknown names")
    parser.add_argument("--license", metavar="ID", help="licence of the weights, for the model card; never guessed")
    parser.add_argument("--base-model", metavar="ID", help="Hub id of what is converted, for the model card")
    parser.add_argument(
        "--self-contained", action="store_true", help="write the code of the pipeline beside the weights"
    )
