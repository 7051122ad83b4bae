# SPDX-License-Identifier: Apache-2.0
"""Pictures of what the small model has never seen, for a LoRA to learn: a shape called blicket."""

import argparse
import json
from pathlib import Path

import torch
from diffusers.image_processor import VaeImageProcessor

from diffusers_hart.shapes import VOCABULARY, Scene, Shape, ShapesDataset, Statement
from diffusers_hart.shapes.signed_distance import polygon


HOURGLASS = [(-0.85, -1.0), (0.85, -1.0), (0.2, 0.0), (0.85, 1.0), (-0.85, 1.0), (-0.2, 0.0)]
NEW_WORDS = VOCABULARY.extended(shapes={"blicket": Shape(polygon(HOURGLASS), ("blicket",))})


class NewThings(ShapesDataset):
    """Pictures as of [`ShapesDataset`], one object of each a blicket."""

    def __init__(self, seed: int = 0, split: str = "train", num_objects: int | None = None):
        super().__init__(seed, split, num_objects, NEW_WORDS)

    def _sample(self, index: int) -> tuple[Scene, str, Statement]:
        attempt = 0
        while True:
            scene, caption, statement = super()._sample(index + attempt * 1_000_003)
            if sum(found.shape == "blicket" for found in scene.objects) == 1:
                return scene, caption, statement
            attempt += 1


dataset = ShapesDataset(split="any", vocabulary=NEW_WORDS)  # for the checker to learn the new word from


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--num_images", type=int, default=30)
    parser.add_argument("--num_known", type=int, default=0, help="pictures of what the model knows, lest it forgets")
    parser.add_argument("--repeats", type=int, default=1, help="how often the table has each new picture")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    new, known = NewThings(args.seed, num_objects=1), ShapesDataset(args.seed)
    examples = [new[i] for i in range(args.num_images)] + [known[i] for i in range(args.num_known)]
    batch = new.finish_batch({"scene": torch.stack([example["scene"] for example in examples])}, "cpu")
    images = VaeImageProcessor().postprocess(batch["pixel_values"], output_type="pil")
    with open(args.output_dir / "metadata.jsonl", "w") as table:
        for i, (image, example) in enumerate(zip(images, examples)):
            name = f"{i:03d}.png"
            image.save(args.output_dir / name)
            line = json.dumps({"file_name": name, "text": example["caption"]}) + "\n"
            table.write(line * (args.repeats if i < args.num_images else 1))


if __name__ == "__main__":
    main()
