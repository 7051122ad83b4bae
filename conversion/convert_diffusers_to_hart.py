# SPDX-License-Identifier: Apache-2.0
"""
Write a HART pipeline that was saved to a folder back in the layout of the original, `llm/` and `tokenizer/`. Weights
stay what they are, bit for bit.
"""

import argparse
import sys

from diffusers_hart.conversion import convert_diffusers_to_hart


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model_path", required=True, help="The folder of the pipeline.")
    parser.add_argument("--dump_path", required=True, help="The folder to write, new or empty.")
    args = parser.parse_args(arguments)
    try:
        print(f"Wrote {convert_diffusers_to_hart(args.model_path, args.dump_path)}")
    except (OSError, ValueError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
