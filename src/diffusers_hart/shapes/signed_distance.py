# SPDX-License-Identifier: Apache-2.0
"""Signed distances of the outlines of the procedural data set, in units of an object's radius: x to the right, y down."""

import math
from collections.abc import Callable, Sequence

import torch


Distance = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
Point = tuple[float, float]

HALF_STROKE = 0.15  # of letters and digits
GLYPH_UNIT = 0.29  # radii a unit of the stroke font


def _segment_distance(x: torch.Tensor, y: torch.Tensor, start: Point, end: Point) -> torch.Tensor:
    """Distance to a line segment."""
    along = (end[0] - start[0], end[1] - start[1])
    length = along[0] ** 2 + along[1] ** 2
    place = (((x - start[0]) * along[0] + (y - start[1]) * along[1]) / length).clamp(0, 1)
    return torch.hypot(x - start[0] - place * along[0], y - start[1] - place * along[1])


def polygon(points: Sequence[Point]) -> Distance:
    """A closed polygon; inside is what a ray leaves after an odd number of edges."""
    edges = list(zip(points, [*points[1:], points[0]]))

    def distance(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        nearest = torch.stack([_segment_distance(x, y, *edge) for edge in edges]).amin(0)
        inside = torch.zeros_like(x, dtype=torch.bool)
        for (x0, y0), (x1, y1) in edges:
            if y0 != y1:
                crosses = (y0 > y) != (y1 > y)
                inside ^= crosses & (x < x0 + (y - y0) * (x1 - x0) / (y1 - y0))
        return torch.where(inside, -nearest, nearest)

    return distance


def regular_polygon(corners: int, radius: float = 1.0, turn: float = 0.0, inner: float | None = None) -> Distance:
    """A regular polygon, or with `inner` a star with as many points; the first corner points up."""
    radii = [radius] if inner is None else [radius, inner]
    count = corners * len(radii)
    angles = [turn + 2 * math.pi * i / count for i in range(count)]
    return polygon(
        [(math.sin(a) * radii[i % len(radii)], -math.cos(a) * radii[i % len(radii)]) for i, a in enumerate(angles)]
    )


def circle(radius: float = 1.0, center: Point = (0.0, 0.0)) -> Distance:
    return lambda x, y: torch.hypot(x - center[0], y - center[1]) - radius


def ring(radius: float = 1.0, half_width: float = 0.2) -> Distance:
    return lambda x, y: (torch.hypot(x, y) - radius + half_width).abs() - half_width


def crescent(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """A disc without another one that lies to its right."""
    return torch.maximum(circle()(x, y), -circle(0.8, (0.5, 0.0))(x, y))


def semicircle(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The upper half of a disc."""
    return torch.maximum(circle(1.05, (0.0, 0.45))(x, y), y - 0.45)


def heart(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Two discs over a triangle."""
    x = x.abs()
    lobe = circle(0.5, (0.48, -0.38))(x, y)
    tip = polygon([(0.0, -0.55), (0.6, -0.6), (0.86, -0.06), (0.0, 0.95), (-0.86, -0.06), (-0.6, -0.6)])(x, y)
    return torch.minimum(lobe, tip)


def glyph(strokes: str) -> Distance:
    """A letter or digit from lines `x,y x,y ...; ...` on a grid of 4 by 6 units."""
    lines = []
    for stroke in strokes.split(";"):
        points = [tuple(float(value) for value in point.split(",")) for point in stroke.split()]
        points = [((x - 2) * GLYPH_UNIT, (y - 3) * GLYPH_UNIT) for x, y in points]
        lines += list(zip(points, points[1:]))

    def distance(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.stack([_segment_distance(x, y, *line) for line in lines]).amin(0) - HALF_STROKE

    return distance


OUTLINES: dict[str, Distance] = {
    "circle": circle(0.95),
    "square": polygon([(-0.82, -0.82), (0.82, -0.82), (0.82, 0.82), (-0.82, 0.82)]),
    "triangle": polygon([(0.0, -0.95), (1.0, 0.8), (-1.0, 0.8)]),
    "diamond": polygon([(0.0, -1.1), (0.8, 0.0), (0.0, 1.1), (-0.8, 0.0)]),
    "star": regular_polygon(5, 1.1, inner=0.45),
    "heart": heart,
    "cross": polygon(
        [(-0.35, -1), (0.35, -1), (0.35, -0.35), (1, -0.35), (1, 0.35), (0.35, 0.35)]
        + [(0.35, 1), (-0.35, 1), (-0.35, 0.35), (-1, 0.35), (-1, -0.35), (-0.35, -0.35)]
    ),
    "ring": ring(1.0, 0.22),
    "hexagon": regular_polygon(6),
    "crescent": crescent,
    "arrow": polygon([(0, -1.05), (0.9, -0.1), (0.35, -0.1), (0.35, 1), (-0.35, 1), (-0.35, -0.1), (-0.9, -0.1)]),
    "semicircle": semicircle,
}

GLYPHS: dict[str, str] = {
    "A": "0,6 2,0 4,6; 0.8,4 3.2,4",
    "B": "0,0 0,6 3,6 4,5.2 4,3.8 3,3 0,3; 0,0 2.7,0 3.6,0.8 3.6,2.2 2.7,3",
    "C": "4,1 3,0 1,0 0,1 0,5 1,6 3,6 4,5",
    "D": "0,0 0,6 2.4,6 4,4.4 4,1.6 2.4,0 0,0",
    "E": "4,0 0,0 0,6 4,6; 0,3 3,3",
    "F": "4,0 0,0 0,6; 0,3 3,3",
    "G": "4,1 3,0 1,0 0,1 0,5 1,6 3,6 4,5 4,3.2 2.2,3.2",
    "H": "0,0 0,6; 4,0 4,6; 0,3 4,3",
    "I": "0.6,0 3.4,0; 2,0 2,6; 0.6,6 3.4,6",
    "J": "1,0 4,0; 3,0 3,5 2,6 1,6 0,5",
    "K": "0,0 0,6; 4,0 0,3.4; 1.2,2.6 4,6",
    "L": "0,0 0,6 4,6",
    "M": "0,6 0,0 2,3 4,0 4,6",
    "N": "0,6 0,0 4,6 4,0",
    "O": "1,0 3,0 4,1 4,5 3,6 1,6 0,5 0,1 1,0",
    "P": "0,6 0,0 3,0 4,0.9 4,2.5 3,3.4 0,3.4",
    "Q": "1,0 3,0 4,1 4,5 3,6 1,6 0,5 0,1 1,0; 2.4,4 4.3,6.3",
    "R": "0,6 0,0 3,0 4,0.9 4,2.5 3,3.4 0,3.4; 2,3.4 4,6",
    "S": "4,0.9 3,0 1,0 0,0.9 0,2.2 1,3 3,3 4,3.8 4,5.1 3,6 1,6 0,5.1",
    "T": "0,0 4,0; 2,0 2,6",
    "U": "0,0 0,5 1,6 3,6 4,5 4,0",
    "V": "0,0 2,6 4,0",
    "W": "0,0 1,6 2,2.6 3,6 4,0",
    "X": "0,0 4,6; 4,0 0,6",
    "Y": "0,0 2,3 4,0; 2,3 2,6",
    "Z": "0,0 4,0 0,6 4,6",
    "0": "1.2,0 2.8,0 3.8,1 3.8,5 2.8,6 1.2,6 0.2,5 0.2,1 1.2,0; 3.2,1.2 0.8,4.8",
    "1": "0.6,1.4 2,0 2,6; 0.6,6 3.4,6",
    "2": "0,1 1,0 3,0 4,1 4,2.2 0,6 4,6",
    "3": "0,0.8 1,0 3,0 4,0.8 4,2.2 3,3 1.4,3; 3,3 4,3.8 4,5.2 3,6 1,6 0,5.2",
    "4": "3,6 3,0 0,4 4.4,4",
    "5": "4,0 0,0 0,2.6 3,2.6 4,3.5 4,5 3,6 1,6 0,5.2",
    "6": "3.6,0.6 2.8,0 1,0 0,1 0,5 1,6 3,6 4,5 4,3.6 3,2.7 0,2.7",
    "7": "0,0 4,0 1.4,6",
    "8": "1,0 3,0 3.7,0.8 3.7,2.2 3,3 1,3 0.3,2.2 0.3,0.8 1,0; 1,3 0,3.8 0,5.2 1,6 3,6 4,5.2 4,3.8 3,3",
    "9": "0.4,5.4 1.2,6 3,6 4,5 4,1 3,0 1,0 0,1 0,2.4 1,3.3 4,3.3",
}
OUTLINES |= {name: glyph(strokes) for name, strokes in GLYPHS.items()}
