# SPDX-License-Identifier: Apache-2.0
"""Five pictures of one subject, for DreamBooth: a large cyan star with dots, here and there."""

import argparse
from pathlib import Path
from random import Random

import torch
from diffusers.image_processor import VaeImageProcessor

from diffusers_hart.shapes import VOCABULARY, Scene, SceneObject, encode_scene, render_scenes


LOOK = {"shape": "star", "color": "cyan", "surface": "dotted", "size": "large"}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--num_images", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def subject_scene(rng: Random) -> Scene:
    """The subject alone, somewhere on a background of one colour."""
    radius = rng.uniform(*VOCABULARY.sizes[LOOK["size"]])
    x, y = rng.uniform(36, 92), rng.uniform(36, 92)
    return Scene((SceneObject(**LOOK, x=x, y=y, radius=radius),), (rng.choice(list(VOCABULARY.backgrounds)),))


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    rng = Random(args.seed)
    scenes = torch.stack([encode_scene(subject_scene(rng)) for _ in range(args.num_images)])
    for i, image in enumerate(VaeImageProcessor().postprocess(render_scenes(scenes), output_type="pil")):
        image.save(args.output_dir / f"{i}.png")


if __name__ == "__main__":
    main()
