# SPDX-License-Identifier: Apache-2.0
"""Write a trained pipeline of the procedural data set and its checker into the package, in half precision."""

import argparse
import json
from pathlib import Path

import torch

from diffusers_hart import HARTPipeline
from diffusers_hart.shapes import ShapesChecker
from diffusers_hart.shapes.model_files import FOLDER


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pipeline", help="folder of a HARTPipeline")
    parser.add_argument("--checker", help="folder of a ShapesChecker")
    parser.add_argument("--output_dir", type=Path, default=FOLDER, help="by default the package")
    return parser.parse_args(argv)


def forget_origin(folder: Path) -> None:
    """Leave out of configs where on a machine the weights came from."""
    for path in folder.rglob("*.json"):
        config = json.loads(path.read_text())
        if config.pop("_name_or_path", None) is not None:
            path.write_text(json.dumps(config, indent=2) + "\n")


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if args.pipeline is not None:
        pipe = HARTPipeline.from_pretrained(args.pipeline)
        for model in (pipe.transformer, pipe.residual_mlp, pipe.vae, pipe.text_encoder):
            # All of it: what is computed in float32 is brought back to it when it is loaded.
            torch.nn.Module.to(model, torch.float16)
        pipe.save_pretrained(args.output_dir / "model")
        forget_origin(args.output_dir / "model")
    if args.checker is not None:
        checker = ShapesChecker.from_pretrained(args.checker)
        torch.nn.Module.to(checker, torch.float16)
        checker.save_pretrained(args.output_dir / "checker_weights")
        forget_origin(args.output_dir / "checker_weights")


if __name__ == "__main__":
    main()
