# SPDX-License-Identifier: Apache-2.0
"""Saved pipelines whose files were damaged, mixed up or made to do harm: an error that says what is wrong."""

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffusers_hart import HARTPipeline, HARTResidualScheduler, HARTScheduler, HARTTransformer2DModel
from diffusers_hart.random_pipeline import random_pipeline


MODELS = ("text_encoder", "transformer", "residual_mlp", "vae")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    random_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "damaged")


def weights_of(folder: Path) -> Path:
    return next(folder.glob("*.safetensors"))


def change_weights(folder, change):
    weights = load_file(weights_of(folder))
    change(weights, sorted(name for name in weights if weights[name].ndim == 2)[0])
    save_file(weights, weights_of(folder), metadata={"format": "pt"})


def change_config(folder, **values):
    path = next(path for path in folder.glob("*config.json"))
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def truncate(folder):
    path = weights_of(folder)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(folder):
    weights_of(folder).write_bytes(b"")


def set_to(value):
    return lambda folder: change_weights(folder, lambda weights, name: weights[name][0, 0].fill_(value))


def drop(folder):
    change_weights(folder, lambda weights, name: weights.pop(name))


def add(folder):
    change_weights(folder, lambda weights, name: weights.update({"stray.weight": torch.zeros(2)}))


def reshape(folder):
    change_weights(folder, lambda weights, name: weights.update({name: torch.zeros(3, 5)}))


def remove_config(folder):
    (folder / "config.json").unlink()


def truncate_config(folder):
    (folder / "config.json").write_text((folder / "config.json").read_text()[:-9])


# The error, and what it says: the file or the weight, and what is the matter with it.
DAMAGES = {
    "truncated": (truncate, OSError, "Unable to load weights|is damaged"),
    "empty": (empty, OSError, "Unable to load weights|is damaged"),
    "nan": (set_to(float("nan")), ValueError, "The weight .* holds values that are not finite"),
    "infinite": (set_to(float("-inf")), ValueError, "The weight .* holds values that are not finite"),
    "weight missing": (drop, ValueError, "of their tensors 1 are missing: "),
    "weight too many": (add, ValueError, "1 are not the model's: stray.weight"),
    "shape": (reshape, (ValueError, RuntimeError), "expected shape|mismatched"),
    "no weights": (lambda folder: weights_of(folder).unlink(), OSError, "no file named"),
    "no config": (remove_config, OSError, "no file named config.json"),
    "config truncated": (truncate_config, OSError, "is not a valid JSON file"),
    "no folder": (shutil.rmtree, OSError, "no file named"),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", MODELS)
def test_a_damaged_model(name, damage, folder):
    do, error, message = DAMAGES[damage]
    do(folder / name)
    with pytest.raises(error, match=message):
        HARTPipeline.from_pretrained(folder)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_damage_shows_in_low_precision_too(folder, dtype):
    set_to(float("nan"))(folder / "transformer")
    with pytest.raises(ValueError, match="not finite"):
        HARTTransformer2DModel.from_pretrained(folder, subfolder="transformer", dtype=dtype)


def test_infinite_in_half_precision_alone(folder):
    set_to(1e6)(folder / "transformer")
    HARTPipeline.from_pretrained(folder)
    with pytest.raises(ValueError, match="not finite"):
        HARTPipeline.from_pretrained(folder, dtype=torch.float16)


@pytest.mark.parametrize(
    ("one", "other"),
    [("transformer", "residual_mlp"), ("transformer", "vae"), ("vae", "text_encoder"), ("residual_mlp", "vae")],
)
@pytest.mark.parametrize("whole_folders", [True, False])
def test_swapped_models(folder, one, other, whole_folders):
    first, second = (folder / name if whole_folders else weights_of(folder / name) for name in (one, other))
    first.rename(folder / "aside")
    second.rename(first)
    (folder / "aside").rename(second)
    with pytest.raises((ValueError, OSError, RuntimeError), match="missing|shape|no file named|mismatched"):
        HARTPipeline.from_pretrained(folder)


@pytest.mark.parametrize("whole_folders", [True, False])
def test_swapped_schedulers(folder, whole_folders):
    paths = [folder / name for name in ("scheduler", "residual_scheduler")]
    paths = paths if whole_folders else [path / "scheduler_config.json" for path in paths]
    paths[0].rename(folder / "aside")
    paths[1].rename(paths[0])
    (folder / "aside").rename(paths[1])
    with pytest.raises(ValueError, match="is that of a HART(Residual)?Scheduler and no HART"):
        HARTPipeline.from_pretrained(folder)
    with pytest.raises(ValueError, match="and no HARTScheduler: it holds no `schedules`"):
        HARTScheduler.from_pretrained(folder, subfolder="scheduler")
    with pytest.raises(ValueError, match="and no HARTResidualScheduler: it holds no `num_train_timesteps`"):
        HARTResidualScheduler.from_pretrained(folder, subfolder="residual_scheduler")


EDITS = [
    ("transformer", {"num_layers": 1}, "12 are not the model's"),
    ("transformer", {"num_layers": 3}, "12 are missing"),
    ("transformer", {"qk_norm": False}, "are not the model's: transformer_blocks.0.attn.logit_scale"),
    ("transformer", {"num_levels": 10}, "level_embedder"),
    ("transformer", {"num_classes": 3}, "`caption_channels` or `num_classes`"),
    ("transformer", {"attention_head_dim": 32}, "shape"),
    ("transformer", {"codebook_size": 256}, "shape"),
    ("transformer", {"rope_theta": 0.0}, "`rope_theta` must be above 0"),
    ("transformer", {"caption_length": 0}, "`caption_length`"),
    ("residual_mlp", {"num_layers": 1}, "are not the model's"),
    ("residual_mlp", {"in_channels": 4}, "shape"),
    ("vae", {"num_phi": 1}, "are not the model's: phi.1"),
    ("vae", {"layers_per_block": 2}, "are missing"),
    ("vae", {"codebook_size": 4096}, "shape"),
    ("text_encoder", {"num_hidden_layers": 1, "layer_types": ["full_attention"]}, "are not the model's: layers.1"),
    ("text_encoder", {"num_hidden_layers": 3, "layer_types": ["full_attention"] * 3}, "are missing: layers.2"),
    ("scheduler", {"schedules": [[2, 3]]}, "must grow from a scale of side 1"),
    ("scheduler", {"schedules": [[1, "2"]]}, "must grow from a scale of side 1"),
    ("scheduler", {"top_k": 0}, "`top_k` and `late_top_k` must be at least 1"),
    ("scheduler", {"top_p": 7}, "`top_p` must be above 0 and at most 1"),
    ("scheduler", {"smoothing_temperature": 0}, "`smoothing_temperature`"),
    ("residual_scheduler", {"beta_schedule": "linear"}, "`beta_schedule` must be 'squaredcos_cap_v2'"),
    ("residual_scheduler", {"num_train_timesteps": 0}, "must be between 1 and 0"),
]


@pytest.mark.parametrize(("name", "values", "message"), EDITS)
def test_an_edited_config(folder, name, values, message):
    change_config(folder / name, **values)
    with pytest.raises(ValueError, match=message):
        HARTPipeline.from_pretrained(folder)


class Harm:
    """Leaves a file behind when it is unpickled as Python does it."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", MODELS)
def test_code_in_a_pickle_is_not_run(folder, name, tmp_path):
    weights_of(folder / name).unlink()
    file_name = "pytorch_model.bin" if name == "text_encoder" else "diffusion_pytorch_model.bin"
    for written in (pickle.dumps({"weight": Harm(tmp_path / "harm")}), None):
        if written is None:
            torch.save({"weight": Harm(tmp_path / "harm")}, folder / name / file_name)
        else:
            (folder / name / file_name).write_bytes(written)
        with pytest.raises(OSError, match="Unable to load weights|is damaged"):
            HARTPipeline.from_pretrained(folder)
        assert not (tmp_path / "harm").exists()
    pickle.loads(pickle.dumps(Harm(tmp_path / "harm")))
    assert (tmp_path / "harm").exists()  # it would have


def test_code_in_a_folder_is_not_run(folder, tmp_path):
    index = json.loads((folder / "model_index.json").read_text())
    index["scheduler"] = ["code", "HARTScheduler"]
    (folder / "model_index.json").write_text(json.dumps(index))
    (folder / "scheduler" / "code.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'harm')!r})")
    pipe = HARTPipeline.from_pretrained(folder)
    assert type(pipe.scheduler) is HARTScheduler  # the package's own, whatever the folder brings along
    assert not (tmp_path / "harm").exists()
    index["scheduler"] = ["code", "AnotherScheduler"]
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="trust_remote_code"):
        HARTPipeline.from_pretrained(folder)
    assert not (tmp_path / "harm").exists()


def test_a_whole_language_model_for_a_text_encoder(folder):
    """Its head is not needed, and its weights are named one level deeper."""
    weights = load_file(weights_of(folder / "text_encoder"))
    weights = {f"model.{name}": tensor for name, tensor in weights.items()} | {"lm_head.weight": torch.zeros(257, 64)}
    save_file(weights, weights_of(folder / "text_encoder"), metadata={"format": "pt"})
    loaded = HARTPipeline.from_pretrained(folder)
    expected = random_pipeline().text_encoder.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.text_encoder.state_dict().items())
