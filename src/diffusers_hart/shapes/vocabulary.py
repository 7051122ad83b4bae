# SPDX-License-Identifier: Apache-2.0
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch

from .signed_distance import GLYPHS, OUTLINES, Distance


Color = tuple[int, int, int]
PERIOD = 8.0  # of patterns, in pixels


@dataclass(frozen=True)
class Shape:
    """
    A kind of object.

    Args:
        distance (`Callable`): Its signed distance, as in [`signed_distance`].
        nouns (`tuple[str, ...]`): What captions call it, the usual word first.
        is_glyph (`bool`, defaults to `False`): Whether it is a letter or digit: these are plain and never small.
        inner_radius (`float`, defaults to `0.0`):
            Radius of the disc that fits into it, relative to its own; 0 where nothing is drawn inside.
    """

    distance: Distance
    nouns: tuple[str, ...]
    is_glyph: bool = False
    inner_radius: float = 0.0


@dataclass(frozen=True)
class Surface:
    """
    How an object is painted.

    Args:
        tone (`Callable`):
            From coordinates in pixels `(x, y)` the share of the second tone, from 0 to 1. Patterns lie on one lattice of
            the whole picture, whatever the object: all that a caption says of one is then all there is to it.
        adjectives (`tuple[str, ...]`): What captions call it before the noun, the usual word first.
        phrases (`tuple[str, ...]`): And behind it.
    """

    tone: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    adjectives: tuple[str, ...]
    phrases: tuple[str, ...] = ()


def stripes(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    # The distance in pixels to the nearest edge, near it, so that edges are one pixel soft.
    return (0.5 + torch.sin(2 * torch.pi * x / PERIOD) * PERIOD / (2 * torch.pi)).clamp(0, 1)


def dots(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    x, y = (torch.remainder(w, PERIOD) - PERIOD / 2 for w in (x, y))
    return (0.5 + 0.31 * PERIOD - torch.hypot(x, y)).clamp(0, 1)


def checks(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    waves = torch.sin(2 * torch.pi * x / PERIOD) * torch.sin(2 * torch.pi * y / PERIOD)
    return (0.5 + waves * PERIOD / (2 * torch.pi)).clamp(0, 1)


def plain(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(x)


NOUNS = {
    "circle": ("circle", "disc"),
    "square": ("square", "box"),
    "diamond": ("diamond", "rhombus"),
    "cross": ("cross", "plus"),
    "ring": ("ring", "hoop"),
    "crescent": ("crescent", "moon"),
    "semicircle": ("semicircle", "half circle"),
}
INNER_RADII = {"circle": 0.95, "square": 0.82, "hexagon": 0.86, "diamond": 0.64}


def _shape(name: str) -> Shape:
    if name not in GLYPHS:
        return Shape(OUTLINES[name], NOUNS.get(name, (name,)), inner_radius=INNER_RADII.get(name, 0.0))
    kinds = ("digit", "number") if name.isdigit() else ("letter", "capital letter", "capital")
    return Shape(OUTLINES[name], tuple(f"{kind} {name}" for kind in kinds), is_glyph=True)


@dataclass(frozen=True, eq=False)  # one is another's equal only if it is the same
class Vocabulary:
    """
    What pictures of the procedural data set are made of, and the words for it. [`~Vocabulary.extended`] adds to it.

    Args:
        shapes (`dict[str, Shape]`), surfaces (`dict[str, Surface]`): Kinds of objects and how they are painted.
        colors (`dict[str, tuple[int, int, int]]`): Colours of objects, from 0 to 255.
        color_words (`dict[str, tuple[str, ...]]`): Other words for some colours.
        sizes (`dict[str, tuple[float, float]]`): Ranges of radii in pixels.
        size_words (`dict[str, tuple[str, ...]]`): Words for the sizes.
        relations (`dict[str, tuple[str, ...]]`): Phrases for how the first of two objects lies to the second.
        backgrounds (`dict[str, tuple[int, int, int]]`): Colours of backgrounds; two of them make a gradient.
    """

    shapes: dict[str, Shape] = field(default_factory=lambda: {name: _shape(name) for name in OUTLINES})
    surfaces: dict[str, Surface] = field(
        default_factory=lambda: {
            "plain": Surface(plain, ("plain", "solid")),
            "striped": Surface(stripes, ("striped", "stripy"), ("with stripes",)),
            "dotted": Surface(dots, ("dotted", "spotted"), ("with dots", "with spots")),
            "checked": Surface(checks, ("checked", "checkered"), ("with checks",)),
        }
    )
    colors: dict[str, Color] = field(
        default_factory=lambda: {
            "red": (214, 38, 40),
            "orange": (246, 134, 20),
            "yellow": (242, 208, 20),
            "green": (40, 158, 62),
            "cyan": (30, 190, 205),
            "blue": (42, 78, 216),
            "purple": (132, 52, 180),
            "pink": (246, 120, 184),
            "brown": (128, 78, 38),
            "black": (28, 28, 30),
        }
    )
    color_words: dict[str, tuple[str, ...]] = field(
        default_factory=lambda: {"cyan": ("turquoise",), "purple": ("violet",)}
    )
    sizes: dict[str, tuple[float, float]] = field(
        default_factory=lambda: {"small": (11.5, 13.5), "medium": (16.0, 18.5), "large": (21.5, 25.0)}
    )
    size_words: dict[str, tuple[str, ...]] = field(
        default_factory=lambda: {
            "small": ("small", "little", "tiny"),
            "medium": ("medium", "medium-sized"),
            "large": ("large", "big", "huge"),
        }
    )
    relations: dict[str, tuple[str, ...]] = field(
        default_factory=lambda: {
            "left of": ("left of", "to the left of", "on the left of"),
            "right of": ("right of", "to the right of", "on the right of"),
            "above": ("above", "over"),
            "below": ("below", "under", "beneath"),
            "inside": ("inside", "in", "within"),
            "around": ("around", "surrounding"),
        }
    )
    backgrounds: dict[str, Color] = field(
        default_factory=lambda: {
            "white": (252, 252, 252),
            "light gray": (202, 205, 210),
            "cream": (250, 238, 200),
            "pale blue": (200, 222, 250),
            "pale green": (205, 238, 206),
            "pale pink": (252, 212, 222),
            "pale purple": (222, 210, 250),
        }
    )

    def extended(
        self, shapes: dict[str, Shape] | None = None, surfaces: dict[str, Surface] | None = None
    ) -> "Vocabulary":
        """A vocabulary with more shapes or surfaces, which come after the ones there are."""
        return replace(self, shapes=self.shapes | (shapes or {}), surfaces=self.surfaces | (surfaces or {}))

    def is_held_out(self, shape: str, color: str, surface: str) -> bool:
        """
        Whether an object of these attributes is never drawn for training: about one colour in eleven of each shape, and
        one patterned surface in thirteen.
        """
        shape_index = list(self.shapes).index(shape)
        surface_index = list(self.surfaces).index(surface)
        if (7 * shape_index + 3 * list(self.colors).index(color)) % 11 == 5:
            return True
        return surface != "plain" and (5 * shape_index + 3 * surface_index) % 13 == 1


VOCABULARY = Vocabulary()
