# SPDX-License-Identifier: Apache-2.0
"""
Pushing to the Hub and loading back by id. That is another path than local folders take, one that needs diffusers to
know the package. What runs against the Hub is a function of its own here, called in a fresh process.
"""

import contextlib
import importlib
import io
import json
import os
import sys
import tempfile
from pathlib import Path

import pytest
from class_conditional import class_conditional_pipeline
from diffusers import AutoModel, AutoPipelineForText2Image, DiffusionPipeline
from huggingface_hub import ModelCard
from pipeline_digest import describe, digest

import diffusers_hart
from diffusers_hart import HARTClassConditionalPipeline, HARTPipeline, HARTTransformer2DModel, cli
from diffusers_hart.conversion import convert_hart_to_diffusers, push_converted
from diffusers_hart.random_pipeline import random_pipeline


LOADERS = {
    loader.__name__: loader
    for loader in (
        HARTPipeline,
        HARTClassConditionalPipeline,
        DiffusionPipeline,
        AutoPipelineForText2Image,
        HARTTransformer2DModel,
        AutoModel,
    )
}

PLUGIN = """
import diffusers
from diffusers import ModelMixin, SchedulerMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.pipelines.auto_pipeline import AUTO_TEXT2IMAGE_PIPELINES_MAPPING
from diffusers.pipelines.pipeline_loading_utils import LOADABLE_CLASSES


class OtherScheduler(SchedulerMixin, ConfigMixin):
    @register_to_config
    def __init__(self, steps=3):
        pass


class OtherPipeline(diffusers.DiffusionPipeline):
    def __init__(self, scheduler: OtherScheduler):
        super().__init__()
        self.register_modules(scheduler=scheduler)


LOADABLE_CLASSES.setdefault("other_plugin", {})
diffusers.OtherPipeline = OtherPipeline
AUTO_TEXT2IMAGE_PIPELINES_MAPPING.setdefault("other", OtherPipeline)
"""


def push():
    pipe = random_pipeline()
    pipe.push_to_hub("me/pushed")
    with tempfile.TemporaryDirectory() as folder:
        pipe.save_pretrained(folder, push_to_hub=True, repo_id="me/saved", max_shard_size="200KB", variant="fp16")
    pipe.transformer.push_to_hub("me/transformer")
    classes = class_conditional_pipeline(id2label={0: "cat", 1: "dog"})
    classes.push_to_hub("me/classes")
    return {
        "pipeline": describe(pipe),
        "transformer": digest([pipe.transformer]),
        "classes": describe(classes, 1),
    }


def load(calls):
    """What `[loader, repository, options]` each load, in one process."""
    results = []
    for loader, repository, options in calls:
        try:
            loaded = LOADERS[loader].from_pretrained(repository, **options)
        except OSError as error:
            results.append(str(error))
            continue
        if isinstance(loaded, HARTClassConditionalPipeline):
            results.append([*describe(loaded, loaded.labels["dog"]), loaded.labels])
        elif isinstance(loaded, HARTPipeline):
            results.append(describe(loaded))
        else:
            results.append([type(loaded).__name__, digest([loaded])])
    return results


def load_beside_a_plugin(folder):
    sys.path.insert(0, folder)
    other_plugin = importlib.import_module("other_plugin")
    importlib.reload(diffusers_hart)
    other_plugin.OtherPipeline(other_plugin.OtherScheduler(steps=7)).push_to_hub("me/other")
    ours = [loader.from_pretrained("me/pushed") for loader in (DiffusionPipeline, AutoPipelineForText2Image)]
    assert all(type(pipe) is HARTPipeline for pipe in ours)
    theirs = [loader.from_pretrained("me/other") for loader in (DiffusionPipeline, AutoPipelineForText2Image)]
    assert all(type(pipe) is other_plugin.OtherPipeline and pipe.scheduler.config.steps == 7 for pipe in theirs)
    return [describe(pipe) for pipe in ours]


def info(model):
    """What the command line says of a model."""
    output, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        assert cli.main(["info", model, "--json"]) == 0
    assert errors.getvalue() == ""
    return json.loads(output.getvalue())


def info_then_load(repository):
    """What the command line says of a model, and what files of weights that brought here before it is loaded."""
    description = info(repository)
    downloaded = [path.name for path in Path(os.environ["HF_HOME"]).rglob("*.safetensors")]
    HARTPipeline.from_pretrained(repository)
    return [description, downloaded]


def convert_and_push(original, text_encoder):
    with tempfile.TemporaryDirectory() as folder:
        converted = convert_hart_to_diffusers(
            original, text_encoder, f"{folder}/converted", license="mit", repo_id="me/converted"
        )
        address = push_converted(converted, "me/converted")
        local = describe(HARTPipeline.from_pretrained(converted))
    return [address, local, describe(DiffusionPipeline.from_pretrained("me/converted"))]


@pytest.fixture(scope="module")
def pushed(hub):
    """What was pushed."""
    return hub.call(push)


@pytest.fixture(scope="module")
def loaded(hub, pushed):
    """What came back of it: a function that looks a load up by loader and repository."""
    pipeline_loaders = ("HARTPipeline", "DiffusionPipeline", "AutoPipelineForText2Image")
    calls = [[loader, "me/pushed", {}] for loader in pipeline_loaders]
    calls += [[loader, "me/saved", {"variant": "fp16"}] for loader in pipeline_loaders]
    calls += [
        [loader, "me/pushed", {"subfolder": "transformer"}] for loader in ("HARTTransformer2DModel", "AutoModel")
    ]
    calls += [["HARTTransformer2DModel", "me/transformer", {}]]
    calls += [[loader, "me/classes", {}] for loader in ("HARTClassConditionalPipeline", "DiffusionPipeline")]
    calls += [["HARTPipeline", "me/nothing", {}]]
    results = {(loader, repository): result for (loader, repository, _), result in zip(calls, hub.call(load, calls))}
    return lambda loader, repository: results[loader, repository]


def test_what_is_pushed(hub, pushed):
    files = hub.repositories["me/pushed"].files
    assert not [path for path in files if path.endswith(".py")]
    assert json.loads(files["model_index.json"])["transformer"] == ["diffusers_hart", "HARTTransformer2DModel"]
    assert b"library_name: diffusers" in files["README.md"]
    assert "transformer/diffusion_pytorch_model.safetensors" in files
    sharded = hub.repositories["me/saved"].files
    assert "transformer/diffusion_pytorch_model.safetensors.index.fp16.json" in sharded
    assert any(path.startswith("vae/diffusion_pytorch_model.fp16-00002-of-") for path in sharded)


@pytest.mark.parametrize("repository", ["me/pushed", "me/saved"])
@pytest.mark.parametrize("loader", ["HARTPipeline", "DiffusionPipeline", "AutoPipelineForText2Image"])
def test_a_pipeline_comes_back_by_its_id(loader, repository, pushed, loaded):
    assert loaded(loader, repository) == pushed["pipeline"]


@pytest.mark.parametrize("loader", ["HARTClassConditionalPipeline", "DiffusionPipeline"])
def test_a_class_conditional_pipeline_comes_back_by_its_id(loader, pushed, loaded):
    assert loaded(loader, "me/classes") == [*pushed["classes"], {"cat": 0, "dog": 1}]


@pytest.mark.parametrize(
    ("loader", "repository"),
    [
        ("HARTTransformer2DModel", "me/pushed"),
        ("AutoModel", "me/pushed"),
        ("HARTTransformer2DModel", "me/transformer"),
    ],
)
def test_a_model_comes_back_by_its_id(loader, repository, pushed, loaded):
    assert loaded(loader, repository) == ["HARTTransformer2DModel", pushed["transformer"]]


def test_a_repository_that_does_not_exist(loaded):
    assert "me/nothing" in loaded("HARTPipeline", "me/nothing")


def test_another_plugin_and_importing_twice_change_nothing(hub, pushed, tmp_path):
    (tmp_path / "other_plugin.py").write_text(PLUGIN)
    assert hub.call(load_beside_a_plugin, str(tmp_path)) == [pushed["pipeline"]] * 2


def test_info_by_id_brings_no_weights_and_needs_no_hub_once_they_are_cached(hub, pushed, tmp_path):
    home = str(tmp_path / "home")
    online, downloaded = hub.call(info_then_load, "me/pushed", HF_HOME=home)
    assert downloaded == []
    folder = tmp_path / "copy"
    for path, content in hub.repositories["me/pushed"].files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    assert online == {**info(str(folder)), "model": "me/pushed"}
    offline = hub.call(info, "me/pushed", HF_HOME=home, HF_HUB_OFFLINE="1")
    assert offline["components"] == online["components"]


def test_a_converted_checkpoint_comes_back_by_its_id(hub, golden, tmp_path):
    for part in ("text_encoder", "text_tokenizer"):
        for file in (golden / "t2i_tiny" / part).iterdir():
            (tmp_path / file.name).symlink_to(file)
    original = golden / "t2i_tiny" / "original"
    address, local, loaded = hub.call(convert_and_push, str(original), str(tmp_path))
    assert loaded == local
    repository = hub.repositories["me/converted"]
    assert address == f"{hub.url}/me/converted/commit/{repository.head}"
    card = ModelCard(repository.files["README.md"].decode())
    assert card.data.license == "mit"
    assert card.data.library_name == "diffusers"
    assert 'HARTPipeline.from_pretrained("me/converted"' in card.text
