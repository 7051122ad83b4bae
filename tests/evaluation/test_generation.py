# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from shapes_stand_in import ColorChecker, Squares

from diffusers_hart.evaluation import (
    Instruments,
    PictureMeasurements,
    generate,
    measure_generation,
    prepare_condition,
    shapes_group,
)
from diffusers_hart.random_pipeline import random_pipeline
from diffusers_hart.shapes import ShapesChecker, ShapesDataset


SETTINGS = {"guidance_scale": 2.0, "num_inference_steps": 2, "smooth": True}


@pytest.fixture(scope="module")
def pipe():
    pipe = random_pipeline()
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def instruments():
    checker = ColorChecker()
    return Instruments({"checker": checker.features}, checker)


def draw(pipe, prompts, positions, **settings):
    return generate(pipe, prepare_condition(pipe, prompts), SETTINGS | settings, 128, 0, positions)


def test_a_picture_does_not_depend_on_its_batch(pipe):
    prompts = ["a", "b", "c"]
    together = draw(pipe, prompts, range(3))
    assert (together.dtype, together.shape) == (torch.float32, (3, 3, 128, 128))
    assert together.min() < 0 and together.max() > 0
    alone = torch.cat([draw(pipe, [prompt], [i]) for i, prompt in enumerate(prompts)])
    torch.testing.assert_close(together, alone, atol=1e-2, rtol=0)
    assert not torch.allclose(draw(pipe, ["a"], [1]), alone[:1], atol=0.1)


def test_settings_share_prompts_and_random_numbers(pipe):
    base = draw(pipe, ["a"], [0])
    near, far = draw(pipe, ["a"], [0], residual_temperature=0.95), draw(pipe, ["a"], [5])
    assert 0 < 5 * (near - base).abs().mean() < (far - base).abs().mean()


def test_pictures_are_measured_against_further_pictures_of_their_kind(pipe, instruments):
    group = shapes_group("squares", Squares(), 4, 128)
    variations = {"base": SETTINGS, "guidance_scale=0": SETTINGS | {"guidance_scale": 0.0}}
    figures, shown = measure_generation(pipe, 128, group, variations, instruments, 3, num_resamples=2, num_shown=2)
    again, _ = measure_generation(pipe, 128, group, variations, instruments, 4, num_resamples=2)
    assert list(figures) == list(variations)
    for name, row in figures.items():
        assert row["num_images"] == row["right"]["count"] == row["attributes"]["color"]["count"] == 4
        assert row["frechet_distance"]["value"] == pytest.approx(again[name]["frechet_distance"]["value"], rel=1e-3)
        assert row["right"] == again[name]["right"]
        assert len(shown[name]) == 2
    base, other = (row["frechet_distance"] for row in figures.values())
    assert "difference" not in base
    assert other["difference"]["value"] == pytest.approx(other["value"] - base["value"])
    assert other["difference"]["plus_minus"] > 0


def test_pictures_that_are_no_numbers(pipe, instruments):
    broken = random_pipeline()
    broken.vae.decoder.conv_out.bias.data.fill_(torch.nan)
    with pytest.raises(ValueError, match="pictures that are no numbers"):
        measure_generation(broken, 128, shapes_group("squares", Squares(), 2, 128), {"base": SETTINGS}, instruments, 2)


def test_the_shapes_and_their_checker():
    dataset, checker = ShapesDataset(split="held_out"), ShapesChecker().eval()
    group = shapes_group("held out", dataset, 3, 64)
    images = group.load_images(range(2, 5), "cpu")
    assert images.shape == (3, 3, 64, 64)
    assert group.conditions == [dataset[i]["caption"] for i in range(3)]
    assert group.references == range(3, 6)
    measured = PictureMeasurements(Instruments({"checker": checker.features}, checker), num_shown=1)
    measured.add(images, group.statements)
    assert measured.features["checker"].shape[0] == 3
    assert all({"count", "shape", "color"} <= set(verdict) for verdict in measured.verdicts)
    assert [picture.size for picture in measured.shown] == [(64, 64)]
