# SPDX-License-Identifier: Apache-2.0
import zlib
from random import Random
from typing import Any

import torch

from .captions import caption_scene
from .rendering import encode_scene, render_scenes
from .scenes import Scene, Statement, sample_scene
from .vocabulary import VOCABULARY, Vocabulary


SPLITS = {"train": False, "test": False, "held_out": True, "any": None}  # and whether combinations are held out
RESERVED_CAPTIONS = 16  # one caption in so many is kept for the splits that are not trained on


class ShapesDataset:
    r"""
    Captioned pictures of 128 x 128 pixels, without end: `dataset[i]` is a function of the seed, the split and `i`. Half
    of them show one object, 30 % two and 20 % three, at places that one named relation says. What is drawn is decided
    on the CPU and drawn by [`~ShapesDataset.finish_batch`] on any device.

    Args:
        seed (`int`, defaults to `0`): Seed of the pictures.
        split (`str`, defaults to `"train"`):
            `"train"`; `"test"`, pictures of the same kind whose captions never occur in training; `"held_out"`, where,
            besides, one object has a combination of attributes that training never sees; or `"any"`, pictures of all
            combinations, which the checker learns from.
        num_objects (`int`, *optional*): 1, 2 or 3 for pictures of so many objects alone.
        vocabulary ([`Vocabulary`]): What is drawn and how it is called.

    Raises:
        ValueError: For an unknown split or number of objects.
    """

    def __init__(
        self,
        seed: int = 0,
        split: str = "train",
        num_objects: int | None = None,
        vocabulary: Vocabulary = VOCABULARY,
    ):
        if split not in SPLITS:
            raise ValueError(f"`split` must be one of {', '.join(SPLITS)}, not {split!r}.")
        if num_objects not in (None, 1, 2, 3):
            raise ValueError(f"`num_objects` must be 1, 2, 3 or None for a mixture, not {num_objects!r}.")
        self.seed = seed
        self.split = split
        self.num_objects = num_objects
        self.vocabulary = vocabulary

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The `caption` and the encoded `scene` (see [`encode_scene`]) of picture `index`."""
        scene, caption, _ = self._sample(index)
        return {"caption": caption, "scene": encode_scene(scene, self.vocabulary)}

    def scene(self, index: int) -> Scene:
        """What picture `index` shows."""
        return self._sample(index)[0]

    def statement(self, index: int) -> Statement:
        """What the caption of picture `index` states."""
        return self._sample(index)[2]

    def finish_batch(self, batch: dict[str, Any], device: torch.device | str) -> dict[str, Any]:
        """A batch with its pictures as `pixel_values` `(batch_size, 3, 128, 128)` in [-1, 1], drawn on `device`."""
        scenes = batch["scene"].to(device, non_blocking=True)
        return {**batch, "scene": scenes, "pixel_values": render_scenes(scenes, self.vocabulary)}

    def _sample(self, index: int) -> tuple[Scene, str, Statement]:
        rng = Random(f"{self.seed}/{self.split}/{self.num_objects}/{index}")
        while True:
            scene, relation = sample_scene(rng, self.num_objects, SPLITS[self.split], self.vocabulary)
            caption, statement = caption_scene(rng, scene, relation, self.vocabulary)
            reserved = zlib.crc32(caption.lower().rstrip(".").encode()) % RESERVED_CAPTIONS == 0
            if reserved == (self.split in ("test", "held_out")):
                return scene, caption, statement


def pairs() -> ShapesDataset:
    """What composition is learnt from: two objects, and how they lie to each other."""
    return ShapesDataset(num_objects=2)


def every_combination() -> ShapesDataset:
    """What the checker is trained on, also combinations that are held out from those who draw."""
    return ShapesDataset(split="any")
