# SPDX-License-Identifier: Apache-2.0
from functools import lru_cache

import torch
import torch.nn.functional as F

from .scenes import IMAGE_SIZE, MAX_OBJECTS, Scene
from .vocabulary import VOCABULARY, Vocabulary


# Columns of an encoded object; an absent one has a `shape` of -1.
OBJECT_FIELDS = ("shape", "color", "surface", "size", "x", "y", "radius", "turn", "red", "green", "blue")
BACKGROUND_FIELDS = ("first", "second", "gradient_turn")  # two equal indices make a plain one
FIELD = {name: i for i, name in enumerate(OBJECT_FIELDS)}
SCENE_LENGTH = MAX_OBJECTS * len(OBJECT_FIELDS) + len(BACKGROUND_FIELDS)

ATLAS_SIDE = 160
ATLAS_EXTENT = 1.35  # radii from the middle to its edges


def encode_scene(scene: Scene, vocabulary: Vocabulary = VOCABULARY) -> torch.Tensor:
    """A scene as float32 numbers `(SCENE_LENGTH,)`: the fields of its objects, and the background's."""
    shapes, colors = list(vocabulary.shapes), list(vocabulary.colors)
    surfaces, sizes, backgrounds = list(vocabulary.surfaces), list(vocabulary.sizes), list(vocabulary.backgrounds)
    values = []
    # Larger ones first, so that what is inside another object is drawn over it.
    for found in sorted(scene.objects, key=lambda item: -item.radius):
        values += [shapes.index(found.shape), colors.index(found.color), surfaces.index(found.surface)]
        values += [sizes.index(found.size), found.x, found.y, found.radius, found.turn]
        values += [base + tint for base, tint in zip(vocabulary.colors[found.color], found.tint)]
    for _ in range(MAX_OBJECTS - len(scene.objects)):
        values += [-1.0] + [0.0] * 5 + [1.0] + [0.0] * 4
    values += [backgrounds.index(scene.background[0]), backgrounds.index(scene.background[-1]), scene.gradient_turn]
    return torch.tensor(values, dtype=torch.float32)


def split_scenes(scenes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Objects `(batch_size, 3, fields)` and backgrounds `(batch_size, 3)` of encoded scenes."""
    objects = scenes[:, : MAX_OBJECTS * len(OBJECT_FIELDS)].unflatten(1, (MAX_OBJECTS, -1))
    return objects, scenes[:, MAX_OBJECTS * len(OBJECT_FIELDS) :]


def render_scenes(scenes: torch.Tensor, vocabulary: Vocabulary = VOCABULARY) -> torch.Tensor:
    r"""
    Draw pictures, anti-aliased, on the device of `scenes`.

    Args:
        scenes (`torch.Tensor` of shape `(batch_size, SCENE_LENGTH)`): From [`encode_scene`].
        vocabulary ([`Vocabulary`]): What the scenes were made of.

    Returns:
        `torch.Tensor` of shape `(batch_size, 3, 128, 128)`: Pictures in [-1, 1], float32.
    """
    device = scenes.device
    objects, backgrounds = split_scenes(scenes.float())
    atlas = _outline_atlas(vocabulary, device)
    axis = torch.arange(IMAGE_SIZE, device=device) + 0.5
    y, x = torch.meshgrid(axis, axis, indexing="ij")

    # 1. Background
    colors = torch.tensor(list(vocabulary.backgrounds.values()), device=device, dtype=torch.float32)
    first, second = (colors[backgrounds[:, i].long()][:, :, None, None] for i in (0, 1))
    turn = backgrounds[:, 2, None, None]
    along = (turn.cos() * (x - IMAGE_SIZE / 2) + turn.sin() * (y - IMAGE_SIZE / 2)) / IMAGE_SIZE
    images = torch.lerp(first, second, (along + 0.5).clamp(0, 1)[:, None])

    # 2. Objects, one after the other
    tones = [surface.tone(x, y) for surface in vocabulary.surfaces.values()]
    for i in range(MAX_OBJECTS):
        field = {name: objects[:, i, column, None, None] for name, column in FIELD.items()}
        dx, dy = x - field["x"], y - field["y"]
        cosine, sine = field["turn"].cos(), field["turn"].sin()
        u, v = dx * cosine + dy * sine, dy * cosine - dx * sine
        place = torch.stack([u, v], dim=-1) / (field["radius"] * ATLAS_EXTENT)[..., None]
        outlines = atlas[field["shape"].long().flatten().clamp(min=0)][:, None]
        distance = F.grid_sample(outlines, place, padding_mode="border", align_corners=False)[:, 0]
        # Far from the atlas its border says too little: nothing is drawn there.
        outside = place.abs().amax(-1) > 1
        coverage = (0.5 - distance * field["radius"]).clamp(0, 1).masked_fill(outside | (field["shape"] < 0), 0)

        tone = sum(tone * (field["surface"] == index) for index, tone in enumerate(tones))[:, None]
        base = torch.stack([field["red"], field["green"], field["blue"]], dim=1)
        color = torch.lerp(base, torch.full_like(base, 255.0), 0.72 * tone)
        images = torch.lerp(images, color, coverage[:, None])
    return (images / 127.5 - 1).clamp(-1, 1)


@lru_cache(maxsize=8)
def _outline_atlas(vocabulary: Vocabulary, device: torch.device) -> torch.Tensor:
    """Signed distances of all shapes on a grid, `(shapes, side, side)`."""
    axis = (torch.arange(ATLAS_SIDE) + 0.5) / ATLAS_SIDE * 2 * ATLAS_EXTENT - ATLAS_EXTENT
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    return torch.stack([shape.distance(x, y) for shape in vocabulary.shapes.values()]).to(device)
