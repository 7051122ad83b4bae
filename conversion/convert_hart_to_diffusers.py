# SPDX-License-Identifier: Apache-2.0
"""
Convert an original HART checkpoint, a folder with `llm/` and `tokenizer/`, into a folder that
`HARTPipeline.from_pretrained` loads, and upload it if asked to.
"""

import argparse
import sys

from diffusers_hart.conversion import DTYPES, convert_hart_to_diffusers, push_converted, read_system_prompt


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint_path", required=True, help="The original checkpoint.")
    parser.add_argument(
        "--text_encoder_path",
        required=True,
        help="The language model that encodes prompts, with its tokenizer: a folder or a Hub id.",
    )
    parser.add_argument("--dump_path", required=True, help="The folder to write, new or empty.")
    parser.add_argument("--no_ema", action="store_true", help="Convert the trained weights, not their EMA.")
    parser.add_argument("--dtype", choices=DTYPES, help="Type to store, by default that of the files.")
    parser.add_argument(
        "--system_prompt",
        help="Text that goes before each prompt: a text file, a checkout of the original code (whose "
        "`llm_system_prompt` is read, not run), or the text itself.",
    )
    parser.add_argument("--allow_extra_keys", action="store_true", help="Leave out weights of unknown names.")
    parser.add_argument(
        "--self_contained",
        action="store_true",
        help="Write the code of the pipeline beside the weights, for those who have diffusers and not this package.",
    )
    parser.add_argument("--license", help="Licence of the weights for the model card. It is never guessed.")
    parser.add_argument("--base_model", help="Hub id of the model that is converted, for the model card.")
    parser.add_argument("--push_to_hub", metavar="REPO", help="Hub repository to upload the folder to.")
    parser.add_argument("--private", action="store_true", help="Make that repository private, if it is new.")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    args = parse_args(arguments)
    try:
        folder = convert_hart_to_diffusers(
            args.checkpoint_path,
            args.text_encoder_path,
            args.dump_path,
            use_ema=not args.no_ema,
            dtype=DTYPES.get(args.dtype),
            system_prompt=None if args.system_prompt is None else read_system_prompt(args.system_prompt),
            allow_extra_keys=args.allow_extra_keys,
            license=args.license,
            base_model=args.base_model,
            repo_id=args.push_to_hub,
            self_contained=args.self_contained,
        )
        print(f"Wrote {folder}")
        if args.push_to_hub:
            print(f"Uploaded to {push_converted(folder, args.push_to_hub, private=args.private or None)}")
    except (OSError, ValueError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
