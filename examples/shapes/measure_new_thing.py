# SPDX-License-Identifier: Apache-2.0
"""How well an adapter trained on the pictures of new_things.py draws them, and whether it still draws all else."""

import argparse
import json
from pathlib import Path

import torch
from diffusers.image_processor import VaeImageProcessor
from new_things import NewThings

from diffusers_hart import HARTPipeline, shapes_model_path
from diffusers_hart.evaluation.confidence import estimated_share
from diffusers_hart.evaluation.picture_grid import captioned_grid
from diffusers_hart.shapes import ShapesChecker, ShapesDataset


SEED = 100  # of prompts: other ones than new_things.py makes pictures of


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=shapes_model_path(), help="pipeline; by default the package's own")
    parser.add_argument("--lora", required=True, help="folder or file of the adapter")
    parser.add_argument("--checker", required=True, help="folder of a ShapesChecker that knows the new words")
    parser.add_argument("--num_prompts", type=int, default=200, help="of the new thing, and as many of known ones")
    parser.add_argument("--batch_size", type=int, default=25)
    parser.add_argument("--num_shown", type=int, default=8)
    parser.add_argument("--output_dir", type=Path, required=True)
    return parser.parse_args(argv)


def draw(pipe: HARTPipeline, prompts: list[str], batch_size: int) -> torch.Tensor:
    """Pictures in [-1, 1], each of the seed of its number."""
    images = []
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        generators = [torch.Generator().manual_seed(start + i) for i in range(len(batch))]
        images.append(pipe(batch, generator=generators, output_type="pt").images * 2 - 1)
    return torch.cat(images)


def report(
    shares: dict[str, dict[str, float | int]], shown: list[tuple[list, list[str]]], output_dir: Path, name: str
) -> None:
    """Print the shares and write them and the rows of pictures with their captions into the folder."""
    pictures, captions = (sum(parts, []) for parts in zip(*shown))
    captioned_grid(pictures, captions, len(shown[0][0])).save(output_dir / f"{name}.png")
    (output_dir / f"{name}.json").write_text(json.dumps(shares, indent=1) + "\n")
    for what, share in shares.items():
        print(f"{what}: {share['value']:.1%} ({share['low']:.1%} to {share['high']:.1%} of {share['count']})")


def main(argv: list[str] | None = None) -> dict[str, dict[str, float | int]]:
    args = parse_args(argv)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    pipe = HARTPipeline.from_pretrained(args.model)
    pipe.set_progress_bar_config(disable=True)
    checker = ShapesChecker.from_pretrained(args.checker).eval()
    pipe.load_lora_weights(args.lora)

    shares, shown = {}, []
    for kind, dataset in {"new": NewThings(SEED, "test", num_objects=1), "known": ShapesDataset(SEED, "test")}.items():
        prompts = [dataset[i]["caption"] for i in range(args.num_prompts)]
        statements = [dataset.statement(i) for i in range(args.num_prompts)]
        for adapter in ("without", "with"):
            pipe.disable_lora() if adapter == "without" else pipe.enable_lora()
            images = draw(pipe, prompts, args.batch_size)
            scenes = [scene for batch in images.split(50) for scene in checker.read(batch)]
            right = [statement.holds(scene) for statement, scene in zip(statements, scenes)]
            shares[f"{kind} prompts right in all, {adapter} the adapter"] = estimated_share(right)
            if kind == "new":
                found = [any(thing.shape == "blicket" for thing in scene.objects) for scene in scenes]
                shares[f"new thing recognised, {adapter} the adapter"] = estimated_share(found)
                pictures = VaeImageProcessor().postprocess(images[: args.num_shown], output_type="pil")
                shown.append((pictures, [f"{adapter}: {prompt}" for prompt in prompts[: args.num_shown]]))
    report(shares, shown, args.output_dir, "new_thing")
    return shares


if __name__ == "__main__":
    main()
