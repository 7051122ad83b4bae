# SPDX-License-Identifier: Apache-2.0
from collections import Counter

import pytest
import torch

from diffusers_hart.shapes import VOCABULARY, ShapesDataset


def held_out_objects(scene):
    return [o for o in scene.objects if VOCABULARY.is_held_out(o.shape, o.color, o.surface)]


def test_pictures_are_a_function_of_seed_split_and_place():
    first, second = ShapesDataset(seed=3)[17], ShapesDataset(seed=3)[17]
    assert first["caption"] == second["caption"] and torch.equal(first["scene"], second["scene"])
    others = [ShapesDataset(seed=4)[17], ShapesDataset(seed=3)[18], ShapesDataset(seed=3, split="test")[17]]
    assert not any(torch.equal(first["scene"], other["scene"]) for other in others)


def test_half_of_the_pictures_show_one_object_and_a_fifth_three():
    counts = Counter(len(ShapesDataset().scene(i).objects) for i in range(2000))
    assert counts[1] / 2000 == pytest.approx(0.5, abs=0.04)
    assert counts[2] / 2000 == pytest.approx(0.3, abs=0.04)
    assert counts[3] / 2000 == pytest.approx(0.2, abs=0.04)


@pytest.mark.parametrize("num_objects", [1, 2, 3])
def test_number_of_objects_can_be_fixed(num_objects):
    dataset = ShapesDataset(num_objects=num_objects)
    assert {len(dataset.scene(i).objects) for i in range(50)} == {num_objects}


def test_held_out_combinations_are_never_trained_and_always_in_their_split():
    assert not any(held_out_objects(ShapesDataset().scene(i)) for i in range(2000))
    assert not any(held_out_objects(ShapesDataset(split="test").scene(i)) for i in range(500))
    assert all(len(held_out_objects(ShapesDataset(split="held_out").scene(i))) == 1 for i in range(500))


def test_any_combination_comes_where_nothing_is_held_out():
    share = sum(bool(held_out_objects(ShapesDataset(split="any").scene(i))) for i in range(1000)) / 1000
    assert 0.1 < share < 0.5


def test_every_shape_color_and_surface_is_trained():
    objects = [found for i in range(6000) for found in ShapesDataset().scene(i).objects]
    for attribute, names in (
        ("shape", VOCABULARY.shapes),
        ("color", VOCABULARY.colors),
        ("surface", VOCABULARY.surfaces),
    ):
        assert {getattr(found, attribute) for found in objects} == set(names)


def test_captions_of_tests_are_never_trained_on():
    trained = {ShapesDataset(num_objects=1)[i]["caption"].lower().rstrip(".") for i in range(5000)}
    tested = {ShapesDataset(split="test", num_objects=1)[i]["caption"].lower().rstrip(".") for i in range(1000)}
    assert not trained & tested


def test_captions_state_what_is_there():
    for split in ("train", "test", "held_out"):
        dataset = ShapesDataset(seed=1, split=split)
        for i in range(300):
            assert dataset.statement(i).holds(dataset.scene(i)), dataset[i]["caption"]


def test_captions_say_every_word_of_the_vocabulary():
    captions = " ".join(ShapesDataset()[i]["caption"].lower() for i in range(6000))
    words = [noun.lower() for shape in VOCABULARY.shapes.values() for noun in shape.nouns]
    words += [word for surface in VOCABULARY.surfaces.values() for word in surface.adjectives + surface.phrases]
    words += [word for some in VOCABULARY.relations.values() for word in some]
    words += [word for some in VOCABULARY.size_words.values() for word in some]
    words += [*VOCABULARY.colors, *VOCABULARY.backgrounds, *sum(VOCABULARY.color_words.values(), ())]
    assert [word for word in words if word not in captions] == []
    assert "a orange" not in captions and "an red" not in captions


def test_batches_are_finished_on_a_device():
    dataset = ShapesDataset()
    items = [dataset[i] for i in range(3)]
    batch = {"caption": [item["caption"] for item in items], "scene": torch.stack([item["scene"] for item in items])}
    finished = dataset.finish_batch(batch, "cpu")
    assert finished["caption"] == batch["caption"]
    assert finished["pixel_values"].shape == (3, 3, 128, 128)
    assert finished["pixel_values"].abs().max() <= 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "validation"}, "`split` must be one of train, test, held_out, any, not 'validation'"),
        ({"num_objects": 4}, "`num_objects` must be 1, 2, 3 or None"),
    ],
)
def test_unknown_splits_and_numbers_are_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        ShapesDataset(**arguments)
