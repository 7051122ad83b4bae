# SPDX-License-Identifier: Apache-2.0
import cmath
import itertools
import math
from dataclasses import dataclass
from random import Random
from typing import NamedTuple

from .vocabulary import VOCABULARY, Vocabulary


IMAGE_SIZE = 128
CONTAINER_RADII = (37.0, 44.0)
MAX_OBJECTS = 3
# The axis of a relation, x or y, and which of the two objects has the smaller coordinate.
NEARER = {"left of": (0, 0), "right of": (0, 1), "above": (1, 0), "below": (1, 1)}


@dataclass(frozen=True)
class SceneObject:
    """
    An object of a picture: names of the vocabulary, and in pixels where it is.

    Args:
        shape, color, surface, size (`str`): Its attributes.
        x, y, radius (`float`): Centre and radius; y grows downwards.
        turn (`float`): Rotation in radians, small.
        tint (`tuple[float, float, float]`): What is added to the colour, from 0 to 255.
    """

    shape: str
    color: str
    surface: str
    size: str
    x: float
    y: float
    radius: float
    turn: float = 0.0
    tint: tuple[float, float, float] = (0.0, 0.0, 0.0)


@dataclass(frozen=True)
class Scene:
    """
    What is in a picture.

    Args:
        objects (`tuple[SceneObject, ...]`): One to three, the way captions name them.
        background (`tuple[str, ...]`): One colour, or the two of a gradient.
        gradient_turn (`float`): Direction of the gradient in radians.
    """

    objects: tuple[SceneObject, ...]
    background: tuple[str, ...]
    gradient_turn: float = 0.0


def relation_between(first: SceneObject, second: SceneObject) -> str:
    """
    How the first object lies to the second: exactly one relation holds, `"inside"` or `"around"` where the centres are
    close for the larger one's size, otherwise the direction in which they are farther apart.
    """
    dx, dy = first.x - second.x, first.y - second.y
    if math.hypot(dx, dy) < 0.75 * max(first.radius, second.radius):
        return "inside" if first.radius < second.radius else "around"
    return _direction(dx, dy)


def _direction(dx: float, dy: float) -> str:
    if abs(dx) > abs(dy):
        return "left of" if dx < 0 else "right of"
    return "above" if dy < 0 else "below"


class StatedObject(NamedTuple):
    """What a caption says of an object; `None` for what it leaves open."""

    shape: str
    color: str
    surface: str | None = None
    size: str | None = None

    def likeness(self, found: SceneObject) -> int:
        """How many of the stated attributes an object has."""
        return sum(stated == getattr(found, name) for name, stated in self._asdict().items())


@dataclass(frozen=True)
class Statement:
    """
    What a caption states of a picture.

    Args:
        objects (`tuple[StatedObject, ...]`): All objects there are.
        relation (`str`, *optional*): How the first object lies to the second.
        background (`tuple[str, ...]`, *optional*): One colour, or the two of a gradient.
    """

    objects: tuple[StatedObject, ...]
    relation: str | None = None
    background: tuple[str, ...] | None = None

    def explain(self, scene: Scene) -> dict[str, bool]:
        """
        Which of the stated attributes are right, `count` (the number of objects) among them. Objects are matched so
        that as many as possible are; an attribute is right if it is for every object that has it stated.
        """
        # A bad picture may show many objects: only those that are most like what is stated are tried in all orders.
        likest = sorted(scene.objects, key=lambda found: -max(stated.likeness(found) for stated in self.objects))
        verdicts = [self._judge(scene, chosen) for chosen in itertools.permutations(likest[:6], len(self.objects))]
        if not verdicts:  # fewer objects than stated
            verdicts = [self._judge(scene, scene.objects)]
        return max(verdicts, key=lambda verdict: sum(verdict.values()))

    def holds(self, scene: Scene) -> bool:
        """Whether all that is stated is right, and there is nothing else."""
        return all(self.explain(scene).values())

    def _judge(self, scene: Scene, chosen: tuple[SceneObject, ...]) -> dict[str, bool]:
        verdict = {"count": len(scene.objects) == len(self.objects)}
        missing = len(chosen) < len(self.objects)
        for name in StatedObject._fields:
            pairs = [(getattr(stated, name), getattr(found, name)) for stated, found in zip(self.objects, chosen)]
            if any(getattr(stated, name) is not None for stated in self.objects):
                verdict[name] = not missing and all(stated in (None, found) for stated, found in pairs)
        if self.relation is not None:
            verdict["relation"] = len(chosen) > 1 and relation_between(*chosen[:2]) == self.relation
        if self.background is not None:
            verdict["background"] = set(self.background) == set(scene.background)
        return verdict


def sample_scene(
    rng: Random,
    num_objects: int | None = None,
    held_out: bool | None = False,
    vocabulary: Vocabulary = VOCABULARY,
) -> tuple[Scene, str | None]:
    """
    A scene, and how its first object lies to the second (`None` for a single one).

    Args:
        rng (`random.Random`): Source of all that is random.
        num_objects (`int`, *optional*): 1 to 3; by default one in half of all scenes, two in 30 and three in 20 %.
        held_out (`bool`, *optional*, defaults to `False`):
            Whether one object has a combination of attributes that training never sees; `False` for none, `None` for
            whatever comes.
        vocabulary ([`Vocabulary`]): What to draw from.
    """
    if num_objects is None:
        num_objects = rng.choices((1, 2, 3), (50, 30, 20))[0]
    relation = rng.choice(list(vocabulary.relations)) if num_objects > 1 else None
    special = rng.randrange(num_objects) if held_out else None
    while True:
        objects = []
        for i in range(num_objects):
            container = (relation, i) in (("around", 0), ("inside", 1))
            contained = (relation, i) in (("inside", 0), ("around", 1))
            unseen = None if held_out is None else i == special
            objects.append(_sample_object(rng, unseen, container, contained, vocabulary))
        if len({(o["shape"], o["color"]) for o in objects}) < num_objects:
            continue
        if relation in ("inside", "around") and objects[0]["color"] == objects[1]["color"]:
            continue  # would not be seen
        centers = _sample_centers(rng, objects, relation, vocabulary)
        if centers is not None:
            break
    placed = tuple(SceneObject(x=x, y=y, **attributes) for (x, y), attributes in zip(centers, objects))
    names = list(vocabulary.backgrounds)
    background = (rng.choice(names),) if rng.random() < 0.65 else tuple(rng.sample(names, 2))
    return Scene(placed, background, rng.uniform(0, math.tau)), relation


def _sample_object(
    rng: Random, held_out: bool | None, container: bool, contained: bool, vocabulary: Vocabulary
) -> dict:
    while True:
        glyphs = not container and rng.random() < 0.3
        names = [n for n, s in vocabulary.shapes.items() if s.is_glyph == glyphs and (s.inner_radius or not container)]
        shape, color = rng.choice(names), rng.choice(list(vocabulary.colors))
        surface = "plain"
        if not glyphs and rng.random() < 0.6:
            surface = rng.choice([name for name in vocabulary.surfaces if name != "plain"])
        if held_out is None or vocabulary.is_held_out(shape, color, surface) == held_out:
            break
    sizes = [name for name in vocabulary.sizes if not (glyphs and name == "small")]
    if contained:
        sizes = [name for name in sizes if name != "large"]
    size = "large" if container else rng.choice(sizes)
    return {
        "shape": shape,
        "color": color,
        "surface": surface,
        "size": size,
        "radius": rng.uniform(*(CONTAINER_RADII if container else vocabulary.sizes[size])),
        "turn": rng.uniform(-0.06, 0.06),
        "tint": tuple(rng.uniform(-6, 6) for _ in range(3)),
    }


def _sample_centers(
    rng: Random, objects: list[dict], relation: str | None, vocabulary: Vocabulary
) -> list[tuple[float, float]] | None:
    """
    Centres that show the relation, with everything inside the picture and apart; `None` if none were found. What is left
    of or above something else is so around the middle of the picture, as one composes it.
    """
    radii = [o["radius"] for o in objects]
    nested = relation in ("inside", "around")
    spans = [[(1.1 * radius + 2, IMAGE_SIZE - 1.1 * radius - 2)] * 2 for radius in radii]
    if relation in NEARER:
        axis, nearer = NEARER[relation]
        spans[nearer][axis] = (spans[nearer][axis][0], IMAGE_SIZE / 2)
        spans[1 - nearer][axis] = (IMAGE_SIZE / 2, spans[1 - nearer][axis][1])
    for _ in range(100):
        centers = [tuple(rng.uniform(*span) for span in both) for both in spans]
        if nested:
            outer, inner = (0, 1) if relation == "around" else (1, 0)
            room = vocabulary.shapes[objects[outer]["shape"]].inner_radius * radii[outer] - 1.05 * radii[inner] - 2
            if room < 0:
                return None
            offset = cmath.rect(rng.uniform(0, min(room, 0.5 * radii[outer])), rng.uniform(0, math.tau))
            centers[inner] = (centers[outer][0] + offset.real, centers[outer][1] + offset.imag)
        elif relation is not None:
            dx, dy = (first - second for first, second in zip(*centers[:2]))
            clear = max(abs(dx), abs(dy)) > 1.3 * min(abs(dx), abs(dy)) + 4
            if not clear or _direction(dx, dy) != relation:
                continue
        pairs = [pair for pair in itertools.combinations(range(len(objects)), 2) if not (nested and pair == (0, 1))]
        if all(math.dist(centers[a], centers[b]) > 1.08 * (radii[a] + radii[b]) + 3 for a, b in pairs):
            return centers
    return None
