# SPDX-License-Identifier: Apache-2.0
"""The pictures of a new thing, and how well an adapter draws it."""

import importlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_hart import HARTPipeline, shapes_model_path
from diffusers_hart.shapes import load_shapes_checker
from diffusers_hart.training.lora import TRANSFORMER_LAYERS, add_lora_adapter, save_lora_adapters


@pytest.fixture
def new_things(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "examples" / "shapes")
    return importlib.import_module("new_things")


def test_new_and_known_pictures_are_written_with_captions(new_things, tmp_path):
    new_things.main(["--output_dir", str(tmp_path), "--num_images", "4", "--num_known", "3"])
    lines = [json.loads(line) for line in (tmp_path / "metadata.jsonl").read_text().splitlines()]
    assert ["blicket" in line["text"] for line in lines] == [True] * 4 + [False] * 3
    assert {Image.open(tmp_path / line["file_name"]).size for line in lines} == {(128, 128)}
    assert len({(tmp_path / line["file_name"]).read_bytes() for line in lines}) == 7


def test_each_picture_has_one_new_thing(new_things):
    things = new_things.NewThings()
    for i in range(20):
        assert [found.shape for found in things.scene(i).objects].count("blicket") == 1
        assert "blicket" in things[i]["caption"]


def test_an_adapter_is_compared_with_the_model_alone(new_things, tmp_path):
    """One that does nothing changes nothing, and nobody has seen a blicket yet."""
    measure = importlib.import_module("measure_new_thing")
    pipe = HARTPipeline.from_pretrained(shapes_model_path())
    add_lora_adapter(pipe.transformer, TRANSFORMER_LAYERS, rank=2)
    save_lora_adapters(tmp_path / "lora", {"transformer": pipe.transformer})
    load_shapes_checker().extended(new_things.NEW_WORDS).save_pretrained(tmp_path / "checker")
    arguments = ["--lora", tmp_path / "lora", "--checker", tmp_path / "checker", "--output_dir", tmp_path]
    arguments += ["--num_prompts", 8, "--batch_size", 4, "--num_shown", 2]
    shares = measure.main([str(argument) for argument in arguments])
    assert {share["count"] for share in shares.values()} == {8}
    for kind in ("new prompts right in all", "known prompts right in all", "new thing recognised"):
        assert shares[f"{kind}, with the adapter"] == shares[f"{kind}, without the adapter"]
    assert shares["known prompts right in all, with the adapter"]["value"] > 0.2
    assert json.loads((tmp_path / "new_thing.json").read_text()) == shares
    assert Image.open(tmp_path / "new_thing.png").width == 2 * 128


def test_the_shape_is_none_of_the_known_ones(new_things):
    axis = torch.linspace(-1.2, 1.2, 49)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    shapes = {name: shape.distance(x, y) < 0 for name, shape in new_things.NEW_WORDS.shapes.items()}
    blicket = shapes.pop("blicket")
    for name, inside in shapes.items():
        assert (blicket & inside).sum() < 0.8 * (blicket | inside).sum(), name


def test_a_subject_looks_the_same_in_all_pictures_and_is_measured(new_things, tmp_path):
    subject, measure = importlib.import_module("subject"), importlib.import_module("measure_subject")
    subject.main(["--output_dir", str(tmp_path / "subject")])
    paths = sorted((tmp_path / "subject").glob("*.png"))
    images = torch.stack([torch.from_numpy(np.array(Image.open(path))) for path in paths]).permute(0, 3, 1, 2)
    assert len(paths) == 5
    scenes = load_shapes_checker().read(images / 127.5 - 1)
    assert all(measure.shows_only(scene, subject.LOOK) for scene in scenes)
    assert len({(round(scene.objects[0].x), round(scene.objects[0].y)) for scene in scenes}) == 5

    pipe = HARTPipeline.from_pretrained(shapes_model_path())
    add_lora_adapter(pipe.transformer, TRANSFORMER_LAYERS, rank=2)
    save_lora_adapters(tmp_path / "lora", {"transformer": pipe.transformer})
    arguments = ["--lora", tmp_path / "lora", "--output_dir", tmp_path, "--num_images", 4, "--batch_size", 4]
    shares = measure.main([str(argument) for argument in [*arguments, "--num_shown", 2]])
    for name in (
        "subject drawn",
        "class right in shape and colour",
        "class drawn as the subject",
        "others right in all",
    ):
        assert shares[f"{name}, with the adapter"] == shares[f"{name}, without the adapter"]
    assert json.loads((tmp_path / "subject.json").read_text()) == shares
