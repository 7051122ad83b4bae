# SPDX-License-Identifier: Apache-2.0
"""Folders that bring their code along: for diffusers without this package, and for this package without trust."""

import importlib
import json
import shutil
import sys

import plain_diffusers
import pytest
import torch
from class_conditional import class_conditional_pipeline
from diffusers import DiffusionPipeline
from huggingface_hub import ModelCard
from pipeline_digest import describe

from diffusers_hart import HARTPipeline, HARTTransformer2DModel, HybridTokenizer, cli
from diffusers_hart.models.strict_loading import StrictLoadingMixin
from diffusers_hart.pipelines.code_bundle import bundle_source
from diffusers_hart.pipelines.self_contained import installed_index
from diffusers_hart.random_pipeline import random_pipeline


CODE = {
    "pipeline_hart.py",
    "transformer/transformer_hart.py",
    "residual_mlp/residual_diffusion_mlp.py",
    "vae/autoencoder_hybrid.py",
    "scheduler/scheduling_hart.py",
    "residual_scheduler/scheduling_hart_residual.py",
}


def code_of(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*.py")}


def save_and_push(folder):
    """Everything that is loaded here, and what its pipelines are."""
    torch.set_num_threads(1)
    pipe = random_pipeline()
    pipe.save_pretrained(f"{folder}/plain")
    pipe.save_pretrained(f"{folder}/own", self_contained=True)
    pipe.save_pretrained(f"{folder}/sharded", self_contained=True, variant="fp16", max_shard_size="200KB")
    pipe.push_to_hub("me/plain")
    pipe.push_to_hub("me/own", self_contained=True, license="mit", training_data="Drawings of *nothing*.")
    classes = class_conditional_pipeline(has_residual=False)
    classes.save_pretrained(
        f"{folder}/classes", self_contained=True, push_to_hub=True, repo_id="me/classes", commit_message="Classes"
    )
    return [describe(pipe), describe(classes, 1)]


def load_installed(places):
    """What the pipelines of this package load, without trust."""
    torch.set_num_threads(1)
    return [describe(HARTPipeline.from_pretrained(place)) for place in places]


def load_offline(places):
    """The same, and the classes of components that are loaded alone."""
    parts = []
    for place in places:
        parts.append(HARTTransformer2DModel.from_pretrained(place, subfolder="transformer"))
        parts.append(HybridTokenizer.from_pretrained(place, subfolder="vae"))
    return [load_installed(places), [type(part).__name__ for part in parts]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("self_contained")


@pytest.fixture(scope="module")
def saved(hub, folder):
    """What was saved and pushed: the text-to-image pipeline and the class-conditional one."""
    text, classes = hub.call(save_and_push, str(folder))
    return {"text": text, "classes": classes}


@pytest.fixture(scope="module")
def plain(hub, saved, folder):
    """What diffusers makes of it in a process that cannot import this package."""
    return hub.call(plain_diffusers.run, str(folder))


def test_what_is_written(saved, folder, hub):
    assert code_of(folder / "own") == code_of(folder / "sharded") == CODE
    assert code_of(folder / "plain") == set()
    index = json.loads((folder / "own" / "model_index.json").read_text())
    assert index["_class_name"] == ["pipeline_hart", "HARTPipeline"]
    assert index["transformer"] == ["transformer_hart", "HARTTransformer2DModel"]
    assert index["text_encoder"] == ["transformers", "Qwen2Model"]
    names = [path.rpartition("/")[2] for path in CODE]
    assert len(set(names)) == len(names)  # diffusers copies all of a local folder's into one
    for path in CODE:
        compile((folder / "own" / path).read_text(), path, "exec")
    assert CODE <= hub.repositories["me/own"].files.keys()
    assert not [path for path in hub.repositories["me/plain"].files if path.endswith(".py")]


def test_plain_diffusers_loads_it_and_draws_the_same(saved, plain):
    assert plain["loaded"] == [saved["text"]] * 3
    assert plain["classes"] == [saved["classes"]] * 2
    assert "Expected types" not in plain["said"] and "not found in your environment" not in plain["said"]


def test_plain_diffusers_runs_nothing_without_trust(plain):
    assert all("`trust_remote_code=True`" in error for error in plain["refused"])


def test_what_plain_diffusers_saves_comes_back(saved, folder, plain):
    assert plain["saved"] == [saved["text"]] * 2
    assert code_of(folder / "saved_again") == CODE
    assert describe(HARTPipeline.from_pretrained(folder / "saved_again"))[:2] == saved["text"][:2]


def test_residual_schedulers_are_swapped_without_the_package(saved, plain):
    own, ddim, dpm_solver, back = plain["swapped"]
    assert own == back == saved["text"][-1]
    assert len({own, ddim, dpm_solver}) == 3


def test_the_package_loads_it_without_trust(saved, folder, hub):
    home = str(folder / "home")
    places = [str(folder / "own"), "me/own", "me/plain"]
    assert hub.call(load_installed, places, HF_HOME=home) == [saved["text"]] * 3
    # And once it is there, without the Hub.
    before = len(hub.requests)
    offline, parts = hub.call(load_offline, ["me/own", "me/plain"], HF_HOME=home, HF_HUB_OFFLINE="1")
    assert offline == [saved["text"]] * 2
    assert parts == ["HARTTransformer2DModel", "HybridTokenizer"] * 2
    assert len(hub.requests) == before


def test_the_package_runs_nothing_that_a_folder_brings_along(saved, folder, tmp_path):
    shutil.copytree(folder / "own", tmp_path / "own")
    for path in CODE:
        (tmp_path / "own" / path).write_text("raise SystemExit('this was run')")
    pipe = HARTPipeline.from_pretrained(tmp_path / "own")
    assert type(pipe) is HARTPipeline and type(pipe.transformer) is HARTTransformer2DModel
    with pytest.raises(SystemExit, match="this was run"):
        DiffusionPipeline.from_pretrained(tmp_path / "own", trust_remote_code=True)


def test_what_the_package_loads_it_saves_in_the_plain_layout(saved, folder, tmp_path):
    HARTPipeline.from_pretrained(folder / "own").save_pretrained(tmp_path)
    assert code_of(tmp_path) == set()
    assert json.loads((tmp_path / "model_index.json").read_text())["vae"] == ["diffusers_hart", "HybridTokenizer"]


def test_info_knows_it(saved, folder, capsys):
    descriptions = []
    for place in ("plain", "own"):
        assert cli.main(["info", str(folder / place), "--json"]) == 0
        descriptions.append(json.loads(capsys.readouterr().out))
    for description in descriptions:
        description.pop("model"), description.pop("bytes")
        for component in description["components"].values():
            component.pop("bytes")
    assert descriptions[0] == descriptions[1]


def test_the_name_diffusers_reads_an_index_by(folder, saved):
    """The private method that is overridden: without it the package would ask for trust, as diffusers does."""
    config = HARTPipeline.load_config(folder / "own")
    assert config["_class_name"] == "HARTPipeline"
    assert config["scheduler"] == ["diffusers_hart", "HARTScheduler"]
    assert DiffusionPipeline.load_config(folder / "own")["scheduler"] == ["scheduling_hart", "HARTScheduler"]


def test_an_index_that_names_modules_of_an_earlier_version():
    module = "diffusers_hart.models.transformers.transformer_hart"
    index = {"_class_name": "HARTPipeline", "transformer": [module, "HARTTransformer2DModel"], "system_prompt": "Draw"}
    index |= {"text_encoder": ["transformers", "Qwen2Model"], "residual_mlp": [None, None]}
    expected = {**index, "transformer": ["diffusers_hart", "HARTTransformer2DModel"]}
    assert installed_index(index) == expected


def test_model_cards(saved, hub):
    card = ModelCard(hub.repositories["me/own"].files["README.md"].decode())
    assert card.data.license == "mit" and card.data.library_name == "diffusers"
    assert card.data.pipeline_tag == "text-to-image" and "hart" in card.data.tags
    assert 'HARTPipeline.from_pretrained("me/own"' in card.text
    assert 'DiffusionPipeline.from_pretrained("me/own", trust_remote_code=True' in card.text
    assert "Drawings of *nothing*." in card.text and "squares of 128 pixels" in card.text
    assert "longer than 128 tokens" in card.text

    card = ModelCard(hub.repositories["me/plain"].files["README.md"].decode())
    assert "license" not in card.data.to_dict() and "No licence was stated" in card.text
    assert "trust_remote_code" not in card.text and "Not stated by who uploaded" in card.text

    card = ModelCard(hub.repositories["me/classes"].files["README.md"].decode())
    assert "HARTClassConditionalPipeline" in card.text and "2 classes and nothing else" in card.text
    assert "no residual diffusion" in card.text


def test_a_component_whose_code_cannot_be_written(tmp_path):
    class HybridTokenizerOfMine(HybridTokenizer):
        pass

    HybridTokenizerOfMine.__module__ = "my_models"
    pipe = random_pipeline()
    pipe.vae.__class__ = HybridTokenizerOfMine
    with pytest.raises(ValueError, match="`vae` is a HybridTokenizerOfMine of my_models.*self_contained=False"):
        pipe.save_pretrained(tmp_path / "out", self_contained=True)
    assert not (tmp_path / "out").exists()


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Writes a package of one's own and imports a module of it."""
    monkeypatch.syspath_prepend(tmp_path)

    def make(**modules):
        (tmp_path / "my_package").mkdir()
        for name, source in {"__init__": "__version__ = '3'\n", **modules}.items():
            (tmp_path / "my_package" / f"{name}.py").write_text(source)
        importlib.invalidate_caches()
        return importlib.import_module("my_package.top")

    yield make
    for name in [name for name in sys.modules if name.partition(".")[0] == "my_package"]:
        del sys.modules[name]


def test_modules_become_one(package):
    top = package(
        base="# SPDX-License-Identifier: Apache-2.0\nimport math\n\n\ndef area(radius):\n    return math.pi * radius**2\n",
        middle="from .base import area as circle_area\n\nUNIT = circle_area(1)\n",
        top="""\
import math

from .base import area
from .middle import (
    UNIT,
)


class Top:
    def areas(self):
        from .base import area as other_name
        return area(2), other_name(2), UNIT, math.pi

    def nothing(self):
        from .base import area
""",
    )
    source = bundle_source(top.Top)
    assert "from ." not in source and "my_package 3" in source and source.count("SPDX") == 1
    namespace = {"__name__": "alone"}
    exec(compile(source, "alone", "exec"), namespace)
    assert namespace["Top"]().areas() == top.Top().areas()


def test_one_name_for_two_things_is_refused(package):
    top = package(
        base="def size():\n    return 1\n",
        top="from . import base\nfrom .base import size as one\n\nclass Top: pass\n",
    )
    with pytest.raises(ValueError, match="my_package.top imports base of my_package, which is no plain module"):
        bundle_source(top.Top)
    (directory,) = sys.modules["my_package"].__path__
    with open(f"{directory}/other.py", "w") as file:
        file.write("from .base import size as one\n\n\ndef size():\n    return 2\n\n\nclass Other: pass\n")
    other = importlib.import_module("my_package.other")
    with pytest.raises(ValueError, match="size is one thing in my_package.base and another in my_package.other"):
        bundle_source(other.Other)


def test_a_module_without_source_is_refused(package, monkeypatch):
    top = package(base="VALUE = 1\n", top="from .base import VALUE\n\n\nclass Top: pass\n")
    monkeypatch.delattr(sys.modules["my_package.base"], "__file__")
    with pytest.raises(ValueError, match="The source of my_package.base is not there"):
        bundle_source(top.Top)


def test_a_class_of_one_module_is_given_as_it_is():
    source = bundle_source(StrictLoadingMixin)
    with open(sys.modules[StrictLoadingMixin.__module__].__file__) as file:
        assert source == file.read()
