# SPDX-License-Identifier: Apache-2.0
import math
from random import Random

import pytest

from diffusers_hart.shapes import (
    VOCABULARY,
    Scene,
    SceneObject,
    StatedObject,
    Statement,
    relation_between,
    sample_scene,
)


def thing(shape="circle", color="red", surface="plain", size="medium", x=64.0, y=64.0, radius=16.0):
    return SceneObject(shape, color, surface, size, x, y, radius)


@pytest.mark.parametrize(
    ("first", "second", "relation"),
    [
        (thing(x=20), thing(x=90), "left of"),
        (thing(x=90, y=70), thing(x=20), "right of"),
        (thing(y=20), thing(y=90), "above"),
        (thing(y=90, x=70), thing(y=20), "below"),
        (thing(radius=12, x=60), thing(radius=40), "inside"),
        (thing(radius=40), thing(radius=12, y=70), "around"),
    ],
)
def test_one_relation_holds_between_two_objects(first, second, relation):
    assert relation_between(first, second) == relation


def test_scenes_are_inside_the_picture_apart_and_show_their_relation():
    rng = Random(0)
    for _ in range(500):
        scene, relation = sample_scene(rng)
        for found in scene.objects:
            assert found.radius < found.x < 128 - found.radius and found.radius < found.y < 128 - found.radius
        for i, first in enumerate(scene.objects):
            for second in scene.objects[:i]:
                nested = relation_between(first, second) in ("inside", "around")
                distance = math.hypot(first.x - second.x, first.y - second.y)
                if nested:
                    assert distance + min(first.radius, second.radius) < max(first.radius, second.radius)
                else:
                    assert distance > first.radius + second.radius
        assert relation == (relation_between(*scene.objects[:2]) if len(scene.objects) > 1 else None)


SCENE = Scene((thing(x=20), thing("star", "blue", "striped", "small", x=90)), ("white", "cream"))


@pytest.mark.parametrize(
    ("statement", "wrong"),
    [
        (Statement((StatedObject("circle", "red"), StatedObject("star", "blue"))), []),
        (Statement((StatedObject("star", "blue", "striped", "small"), StatedObject("circle", "red", "plain"))), []),
        (Statement((StatedObject("circle", "red"), StatedObject("star", "blue")), "left of"), []),
        (Statement((StatedObject("circle", "red"), StatedObject("star", "blue")), None, ("cream", "white")), []),
        (Statement((StatedObject("circle", "red"), StatedObject("star", "green"))), ["color"]),
        (Statement((StatedObject("circle", "blue"), StatedObject("star", "red"))), ["color"]),
        (Statement((StatedObject("circle", "red", "dotted"), StatedObject("star", "blue"))), ["surface"]),
        (Statement((StatedObject("circle", "red"), StatedObject("star", "blue", None, "large"))), ["size"]),
        (Statement((StatedObject("square", "red"), StatedObject("star", "blue"))), ["shape"]),
        (Statement((StatedObject("circle", "red"), StatedObject("star", "blue")), "right of"), ["relation"]),
        (Statement((StatedObject("star", "blue"), StatedObject("circle", "red")), "left of"), ["relation"]),
        (Statement((StatedObject("circle", "red"), StatedObject("star", "blue")), None, ("white",)), ["background"]),
        (Statement((StatedObject("circle", "red"),)), ["count"]),
    ],
)
def test_statements_tell_right_from_wrong(statement, wrong):
    verdict = statement.explain(SCENE)
    assert sorted(name for name, right in verdict.items() if not right) == wrong
    assert statement.holds(SCENE) == (not wrong)


def test_a_missing_object_makes_all_that_is_said_of_it_wrong():
    statement = Statement((StatedObject("circle", "red"), StatedObject("star", "blue")), "left of")
    for objects in ((), (thing(),)):
        verdict = statement.explain(Scene(objects, ("white",)))
        assert verdict == {"count": False, "shape": False, "color": False, "relation": False}


def test_an_extended_vocabulary_draws_its_new_words():
    shape = VOCABULARY.shapes["star"]
    extended = VOCABULARY.extended(shapes={"blicket": shape}, surfaces={"wavy": VOCABULARY.surfaces["striped"]})
    rng = Random(0)
    drawn = [found for _ in range(400) for found in sample_scene(rng, vocabulary=extended)[0].objects]
    assert "blicket" in {found.shape for found in drawn} and "wavy" in {found.surface for found in drawn}
    assert "blicket" not in VOCABULARY.shapes


def test_many_objects_too_many_are_judged_quickly_and_rightly():
    crowd = tuple(thing("square", "green", x=float(x)) for x in range(60))
    scene = Scene((*crowd, *SCENE.objects), ("white",))
    statement = Statement((StatedObject("circle", "red"), StatedObject("star", "blue")), "left of")
    assert statement.explain(scene) == {"count": False, "shape": True, "color": True, "relation": True}
