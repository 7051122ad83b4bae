# SPDX-License-Identifier: Apache-2.0
"""Pictures of what the small model has never seen, for a LoRA to learn: a shape called blicket, and zigzag surfaces."""

import argparse
import json
from pathlib import Path

import torch
from diffusers.image_processor import VaeImageProcessor

from diffusers_hart.shapes import VOCABULARY, Scene, Shape, ShapesDataset, Statement, Surface
from diffusers_hart.shapes.signed_distance import polygon


HOURGLASS = [(-0.85, -1.0), (0.85, -1.0), (0.2, 0.0), (0.85, 1.0), (-0.85, 1.0), (-0.2, 0.0)]


def zigzag(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Stripes that turn back and forth, each turn as long as two of them are wide."""
    turning = (torch.remainder(x / 16, 1) - 0.5).abs() * 16
    return (0.5 + torch.sin(2 * torch.pi * (y + turning) / 8) * 8 / (2 * torch.pi)).clamp(0, 1)


NEW_WORDS = VOCABULARY.extended(
    shapes={"blicket": Shape(polygon(HOURGLASS), ("blicket",))},
    surfaces={"zigzag": Surface(zigzag, ("zigzag",))},
)


class NewThings(ShapesDataset):
    """Pictures as of [`ShapesDataset`], in each of which one object is a blicket or, in every other one, zigzag."""

    def __init__(self, seed: int = 0, split: str = "train", num_objects: int | None = None):
        super().__init__(seed, split, num_objects, NEW_WORDS)

    def _sample(self, index: int) -> tuple[Scene, str, Statement]:
        wanted = {"shape": "blicket"} if index % 2 == 0 else {"surface": "zigzag"}
        attempt = 0
        while True:
            scene, caption, statement = super()._sample(index + attempt * 1_000_003)
            new = [found for found in scene.objects if found.shape == "blicket" or found.surface == "zigzag"]
            if len(new) == 1 and all(getattr(new[0], name) == value for name, value in wanted.items()):
                return scene, caption, statement
            attempt += 1


dataset = ShapesDataset(split="any", vocabulary=NEW_WORDS)  # for the checker to learn the new words from


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--num_images", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    things = NewThings(args.seed)
    examples = [things[i] for i in range(args.num_images)]
    batch = things.finish_batch({"scene": torch.stack([example["scene"] for example in examples])}, "cpu")
    images = VaeImageProcessor().postprocess(batch["pixel_values"], output_type="pil")
    with open(args.output_dir / "metadata.jsonl", "w") as table:
        for i, (image, example) in enumerate(zip(images, examples)):
            name = f"{i:03d}.png"
            image.save(args.output_dir / name)
            table.write(json.dumps({"file_name": name, "text": example["caption"]}) + "\n")


if __name__ == "__main__":
    main()
