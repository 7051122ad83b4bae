# SPDX-License-Identifier: Apache-2.0
import json
import math

import numpy as np
import PIL.Image
import pytest
import torch
from command_line import fails

from diffusers_hart import HARTPipeline, shapes_model_path
from diffusers_hart.cli import main
from diffusers_hart.random_pipeline import random_pipeline
from diffusers_hart.reconstruction import reconstruct


@pytest.fixture
def pictures(tmp_path):
    """A picture of the model's size, and a wide one with transparency."""
    generator = np.random.default_rng(0)
    for name, size, mode in (("a.png", (128, 128), "RGB"), ("b.webp", (300, 140), "RGBA")):
        patches = generator.integers(0, 256, (4, 4, len(mode)), dtype=np.uint8)
        PIL.Image.fromarray(patches, mode).resize(size).save(tmp_path / name, lossless=True)
    return ["a.png", "b.webp"]


def pixels(path):
    with PIL.Image.open(path) as image:
        return np.asarray(image).astype(int)


def psnr(one, other):
    return 10 * math.log10(255**2 / np.square(one - other).mean())


def test_a_row_for_each_picture(pictures, capsys):
    assert main(["reconstruct", *pictures, "-o", "out.png", "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    sheet = pixels("out.png")
    assert sheet.shape == (2 * 128, 3 * 128, 3)
    original, discrete, hybrid = (sheet[:128, 128 * i : 128 * (i + 1)] for i in range(3))
    assert np.array_equal(original, pixels("a.png"))
    expected = [f"a.png: codes {psnr(discrete, original):.2f} dB, codes and residual {psnr(hybrid, original):.2f} dB"]
    assert lines[:2] == ["out.png", *expected] and lines[2].startswith("b.webp: codes ")

    pipe = HARTPipeline.from_pretrained(shapes_model_path())
    images = torch.from_numpy(original).permute(2, 0, 1)[None] / 127.5 - 1
    shown = reconstruct(pipe.vae, images, pipe.vae.config.scales)[:2]
    for image, cell in zip(shown, (discrete, hybrid)):
        levels = (image[0].permute(1, 2, 0) / 2 + 0.5).clamp(0, 1).mul(255).numpy()
        assert np.abs(levels - cell).max() < 1


def test_for_scripts_from_a_folder(pictures, capsys, tmp_path):
    random_pipeline(seed=1).save_pretrained(tmp_path / "model")
    command = ["reconstruct", *pictures, "--model", "model", "--device", "cpu", "--size", "128", "--json"]
    capsys.readouterr()
    assert main(command) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["output"], result["size"], result["model"]) == ("reconstruction.png", 128, "model")
    assert [row["picture"] for row in result["pictures"]] == pictures
    sheet = pixels("reconstruction.png")
    for row, top in zip(result["pictures"], (0, 128)):
        original, discrete, hybrid = (sheet[top : top + 128, 128 * i : 128 * (i + 1)] for i in range(3))
        assert row["psnr_discrete"] == pytest.approx(psnr(discrete, original), abs=1e-6)
        assert row["psnr_hybrid"] == pytest.approx(psnr(hybrid, original), abs=1e-6)
    with PIL.Image.open("reconstruction.png") as image:
        assert json.loads(image.text["reconstruction"]) == result


def test_errors(pictures, capsys, tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    assert "text.png is no picture that can be read" in fails(capsys, "reconstruct", "text.png")
    assert "No such file" in fails(capsys, "reconstruct", "missing.png")
    assert "--size 100 fits no schedule of scales; this model has some for 128 pixels" in fails(
        capsys, "reconstruct", "a.png", "--size", "100"
    )
    assert "as '.xyz'" in fails(capsys, "reconstruct", "a.png", "-o", "out.xyz")
    assert not (tmp_path / "reconstruction.png").exists()
