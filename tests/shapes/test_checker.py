# SPDX-License-Identifier: Apache-2.0
from dataclasses import replace
from random import Random

import pytest
import torch

from diffusers_hart.shapes import VOCABULARY, Shape, ShapesChecker, ShapesDataset, load_shapes_checker
from diffusers_hart.shapes.signed_distance import polygon


NUM_PICTURES = 500


@pytest.fixture(scope="module")
def checker():
    return load_shapes_checker()


@pytest.fixture(scope="module")
def pictures():
    """True renderings of captions that were never trained on, half of them of combinations that were not either."""
    images, examples = [], []
    for split in ("test", "held_out"):
        dataset = ShapesDataset(seed=7, split=split)
        scenes = torch.stack([dataset[i]["scene"] for i in range(NUM_PICTURES // 2)])
        images.append(dataset.finish_batch({"scene": scenes}, "cpu")["pixel_values"])
        examples += [(dataset.scene(i), dataset.statement(i)) for i in range(NUM_PICTURES // 2)]
    return torch.cat(images), *zip(*examples)


@pytest.fixture(scope="module")
def read(checker, pictures):
    return [scene for batch in pictures[0].split(50) for scene in checker.read(batch)]


def changed(rng, statement, scene):
    """The statement with one attribute or the relation changed, so that it no longer holds for the scene."""
    while True:
        i = rng.randrange(len(statement.objects))
        stated = statement.objects[i]
        names = [name for name, value in stated._asdict().items() if value is not None]
        what = rng.choice([*names, *["relation"] * (statement.relation is not None)])
        if what == "relation":
            other = replace(statement, relation=rng.choice(list(VOCABULARY.relations)))
        else:
            values = {"shape": VOCABULARY.shapes, "color": VOCABULARY.colors, "surface": VOCABULARY.surfaces}
            value = rng.choice(list((values | {"size": VOCABULARY.sizes})[what]))
            objects = list(statement.objects)
            objects[i] = stated._replace(**{what: value})
            other = replace(statement, objects=tuple(objects))
        if not other.holds(scene):
            return other


def test_at_least_99_of_100_true_renderings_are_read_right(read, pictures):
    _, _, statements = pictures
    assert sum(map(lambda statement, scene: statement.holds(scene), statements, read)) >= 0.99 * NUM_PICTURES


def test_at_most_2_of_100_changed_captions_are_accepted(read, pictures):
    _, scenes, statements = pictures
    rng = Random(0)
    others = [changed(rng, statement, scene) for statement, scene in zip(statements, scenes)]
    assert sum(map(lambda other, scene: other.holds(scene), others, read)) <= 0.02 * NUM_PICTURES


def test_places_and_sizes_are_found_to_a_pixel_or_two(read, pictures):
    _, scenes, _ = pictures
    for found, true in zip(read[:100], scenes[:100]):
        if len(found.objects) != len(true.objects):
            continue
        for expected in true.objects:
            nearest = min(found.objects, key=lambda o: abs(o.radius - expected.radius) + abs(o.x - expected.x))
            assert abs(nearest.x - expected.x) + abs(nearest.y - expected.y) < 6


def test_accepting_and_explaining_agree(checker, pictures):
    images, _, statements = pictures
    accepted = checker.accepts(images[:20], statements[:20])
    assert accepted == [all(verdict.values()) for verdict in checker.explain(images[:20], statements[:20])]


def test_empty_pictures_hold_nothing(checker):
    scenes = checker.read(torch.ones(2, 3, 128, 128))
    assert [scene.objects for scene in scenes] == [(), ()]
    assert scenes[0].background == ("white",)


def test_features_do_not_depend_on_the_batch_and_take_any_size(checker, pictures):
    images = pictures[0][:4]
    features = checker.features(images)
    assert features.shape == (4, 160) and features.dtype == torch.float32
    assert torch.allclose(features[2:3], checker.features(images[2:3]), atol=1e-5)
    larger = torch.nn.functional.interpolate(images, size=(256, 256), mode="bilinear")
    assert checker.features(larger).shape == (4, 160)


def test_pictures_of_another_size_are_an_error(checker):
    with pytest.raises(ValueError, match=r"of shape \(batch_size, 3, 128, 128\), not \(1, 3, 64, 64\)"):
        checker.read(torch.zeros(1, 3, 64, 64))


def test_an_extended_checker_reads_what_it_knew_as_before(checker, pictures):
    kite = Shape(polygon([(0, -1), (0.7, -0.2), (0, 1), (-0.7, -0.2)]), ("kite",))
    vocabulary = VOCABULARY.extended(shapes={"kite": kite}, surfaces={"wavy": VOCABULARY.surfaces["striped"]})
    extended = checker.extended(vocabulary)
    assert extended.config.shapes[-1] == "kite" and extended.config.surfaces[-1] == "wavy"
    before, after = checker(pictures[0][:4]), extended(pictures[0][:4])
    for name, value in before.items():
        kept = after[name][:, :, : value.shape[2]] if name != "background" else after[name]
        assert torch.allclose(kept, value, atol=1e-5), name
    others = VOCABULARY.extended()
    with pytest.raises(ValueError, match="The vocabulary's surfaces must begin with those the checker knows"):
        checker.extended(replace(others, surfaces={"wavy": others.surfaces["striped"], **others.surfaces}))


def test_a_checker_is_saved_and_loaded(checker, pictures, tmp_path):
    checker.save_pretrained(tmp_path)
    loaded = ShapesChecker.from_pretrained(tmp_path).eval()
    assert loaded.config.shapes == checker.config.shapes
    assert loaded.read(pictures[0][:4]) == checker.read(pictures[0][:4])
