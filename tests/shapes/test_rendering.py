# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from diffusers_hart.shapes import VOCABULARY, Scene, SceneObject, Shape, ShapesDataset, encode_scene, render_scenes
from diffusers_hart.shapes.signed_distance import circle


def render(*objects, background=("white",), vocabulary=VOCABULARY):
    scene = encode_scene(Scene(tuple(objects), background), vocabulary)
    return ((render_scenes(scene[None], vocabulary)[0] + 1) * 127.5).permute(1, 2, 0)


def color_at(image, x, y):
    return tuple(image[y, x].round().long().tolist())


def test_objects_are_painted_where_they_are():
    image = render(SceneObject("square", "blue", "plain", "medium", 40.0, 80.0, 17.0))
    assert color_at(image, 40, 80) == VOCABULARY.colors["blue"]
    assert color_at(image, 30, 90) == VOCABULARY.colors["blue"]
    assert color_at(image, 80, 40) == VOCABULARY.backgrounds["white"]
    assert color_at(image, 60, 80) == VOCABULARY.backgrounds["white"]


@pytest.mark.parametrize("name", list(VOCABULARY.shapes))
def test_shapes_cover_about_the_area_of_their_distance(name):
    """Every outline is closed, lies within its radius, and is drawn by the atlas as by its formula."""
    radius = 24.0
    image = render(SceneObject(name, "black", "plain", "large", 64.0, 64.0, radius))
    painted = ((252 - image[..., 0]) / (252 - VOCABULARY.colors["black"][0])).clamp(0, 1)
    axis = (torch.arange(1280) + 0.5) / 10
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    inside = VOCABULARY.shapes[name].distance((x - 64) / radius, (y - 64) / radius) < 0
    assert painted.sum().item() == pytest.approx(inside.sum().item() / 100, rel=0.08)
    far = torch.hypot(x[5::10, 5::10] - 64, y[5::10, 5::10] - 64) > 1.45 * radius
    assert painted[far].max() < 0.05


def test_edges_are_soft_by_one_pixel():
    image = render(SceneObject("circle", "black", "plain", "large", 64.0, 64.0, 24.0))
    row = image[64, :, 0]
    between = (row > 35) & (row < 245)
    assert 2 <= between.sum() <= 4


def test_smaller_objects_are_drawn_over_the_one_around_them():
    outer = SceneObject("circle", "blue", "plain", "large", 64.0, 64.0, 40.0)
    inner = SceneObject("square", "red", "plain", "small", 60.0, 60.0, 12.0)
    for objects in ((outer, inner), (inner, outer)):
        assert color_at(render(*objects), 60, 60) == VOCABULARY.colors["red"]


@pytest.mark.parametrize("surface", ["striped", "dotted", "checked"])
def test_patterns_have_two_tones_and_their_period(surface):
    image = render(SceneObject("square", "green", surface, "large", 64.0, 64.0, 25.0))
    patch = image[50:78, 50:78, 0]
    dark, light = VOCABULARY.colors["green"][0], VOCABULARY.colors["green"][0] * 0.28 + 255 * 0.72
    assert patch.min().item() == pytest.approx(dark, abs=2) and patch.max().item() == pytest.approx(light, abs=2)
    assert torch.allclose(patch[:, :-8], patch[:, 8:], atol=1.0)


def test_gradients_run_from_one_color_to_the_other():
    image = render(background=("white", "pale blue"))
    assert color_at(image, 0, 64)[0] > 250 and color_at(image, 127, 64)[0] < 202


def test_a_picture_does_not_depend_on_its_batch():
    dataset = ShapesDataset()
    scenes = torch.stack([dataset[i]["scene"] for i in range(4)])
    assert torch.allclose(render_scenes(scenes)[2:3], render_scenes(scenes[2:3]), atol=1e-6)


def test_an_extended_vocabulary_is_drawn():
    extended = VOCABULARY.extended(shapes={"dot": Shape(circle(0.5), ("dot",))})
    image = render(SceneObject("dot", "red", "plain", "large", 64.0, 64.0, 24.0), vocabulary=extended)
    assert color_at(image, 64, 64) == VOCABULARY.colors["red"]
    assert color_at(image, 80, 64) == VOCABULARY.backgrounds["white"]
