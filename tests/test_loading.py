# SPDX-License-Identifier: Apache-2.0
"""What a saved pipeline is when it comes back, from a local folder; test_hub.py has the same for the Hub."""

import json

import numpy as np
import pytest
import torch
from class_conditional import class_conditional_pipeline
from diffusers import AutoModel, AutoPipelineForText2Image, DDIMScheduler, DiffusionPipeline

from diffusers_hart import (
    HARTClassConditionalPipeline,
    HARTPipeline,
    HARTTransformer2DModel,
    HybridTokenizer,
    ResidualDiffusionMLP,
)
from diffusers_hart.random_pipeline import random_pipeline


MODELS = ("text_encoder", "transformer", "residual_mlp", "vae")


@pytest.fixture(scope="module")
def pipe():
    """Shared by the tests of this file; they load from its folder and do not change it."""
    pipe = random_pipeline()
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def folder(pipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def picture(pipe):
    return draw(pipe)


def draw(pipe, *prompt):
    # Where weights lie in memory decides the last bits of a matrix product: files are mapped at any address, and a
    # picture can only be compared exactly with one from weights that are aligned as PyTorch aligns them.
    for component in pipe.components.values():
        if isinstance(component, torch.nn.Module):
            for parameter in component.parameters():
                parameter.data = parameter.data.clone()
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipe(*(prompt or ["a red circle"]), generator=generator, output_type="np").images


def dtypes(model):
    return {parameter.dtype for parameter in model.parameters()}


@pytest.mark.parametrize("loader", [HARTPipeline, DiffusionPipeline, AutoPipelineForText2Image])
def test_every_way_to_load_draws_the_same_picture(loader, pipe, folder, picture):
    loaded = loader.from_pretrained(folder)
    assert type(loaded) is HARTPipeline
    for name in MODELS:
        saved, state = getattr(pipe, name).state_dict(), getattr(loaded, name).state_dict()
        assert saved.keys() == state.keys()
        assert all(torch.equal(saved[key], state[key]) for key in saved)
        assert not getattr(loaded, name).training
    assert np.array_equal(draw(loaded), picture)


def test_model_index_names_the_package_and_no_module(folder):
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == "HARTPipeline"
    ours = {name: value[1] for name, value in index.items() if value and value[0] == "diffusers_hart"}
    assert ours == {
        "transformer": "HARTTransformer2DModel",
        "vae": "HybridTokenizer",
        "scheduler": "HARTScheduler",
        "residual_mlp": "ResidualDiffusionMLP",
        "residual_scheduler": "HARTResidualScheduler",
    }
    assert index["tokenizer"][0] == index["text_encoder"][0] == "transformers"


@pytest.mark.parametrize("model_class", [HARTTransformer2DModel, AutoModel])
def test_a_model_alone(model_class, pipe, folder):
    transformer = model_class.from_pretrained(str(folder), subfolder="transformer")
    assert type(transformer) is HARTTransformer2DModel
    saved = pipe.transformer.state_dict()
    assert all(torch.equal(saved[key], value) for key, value in transformer.state_dict().items())


@pytest.mark.filterwarnings("ignore:`torch_dtype` is deprecated")
@pytest.mark.parametrize("argument", ["dtype", "torch_dtype"])
def test_a_lower_precision(argument, folder, picture):
    loaded = HARTPipeline.from_pretrained(folder, **{argument: torch.bfloat16})
    assert dtypes(loaded.text_encoder) == dtypes(loaded.residual_mlp) == {torch.bfloat16}
    assert dtypes(loaded.transformer.transformer_blocks[0].ff) == dtypes(loaded.vae.decoder) == {torch.bfloat16}
    for kept in (loaded.transformer.norm_out, loaded.transformer.proj_out, loaded.vae.codebook, loaded.vae.phi):
        assert dtypes(kept) == {torch.float32}
    drawn = draw(loaded)
    assert drawn.shape == picture.shape and np.isfinite(drawn).all()
    assert not np.array_equal(drawn, picture)


def test_without_a_dtype_everything_is_float32(folder, tmp_path):
    HARTPipeline.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(tmp_path)
    loaded = HARTPipeline.from_pretrained(tmp_path)
    for name in MODELS:
        assert dtypes(getattr(loaded, name)) == {torch.float32}
    assert np.isfinite(draw(loaded)).all()


def test_a_variant(folder, tmp_path):
    half = HARTPipeline.from_pretrained(folder, dtype=torch.float16)
    half.save_pretrained(tmp_path, variant="fp16")
    assert (tmp_path / "transformer" / "diffusion_pytorch_model.fp16.safetensors").exists()
    loaded = HARTPipeline.from_pretrained(tmp_path, variant="fp16", dtype=torch.float16)
    assert np.array_equal(draw(loaded), draw(half))
    with pytest.raises(OSError, match="no file named"):
        HARTPipeline.from_pretrained(tmp_path)


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_sharded_weights(variant, pipe, picture, tmp_path):
    pipe.save_pretrained(tmp_path, max_shard_size="200KB", variant=variant)
    for name in MODELS:
        assert len(list((tmp_path / name).glob("*-00002-of-*.safetensors"))) == 1
    assert np.array_equal(draw(HARTPipeline.from_pretrained(tmp_path, variant=variant)), picture)


def test_optional_components_may_be_left_out(folder, picture, tmp_path):
    bare = HARTPipeline.from_pretrained(folder, residual_mlp=None, residual_scheduler=None)
    without_residual = draw(bare)
    assert not np.array_equal(without_residual, picture)
    bare.save_pretrained(tmp_path)
    assert not (tmp_path / "residual_mlp").exists()
    assert np.array_equal(draw(HARTPipeline.from_pretrained(tmp_path)), without_residual)


def test_a_component_may_be_given(folder, picture):
    other = random_pipeline(seed=1)
    loaded = HARTPipeline.from_pretrained(folder, transformer=other.transformer)
    assert loaded.transformer is other.transformer
    assert not np.array_equal(draw(loaded), picture)

    scheduler = DDIMScheduler.from_config(other.residual_scheduler.config)
    loaded = HARTPipeline.from_pretrained(folder, residual_scheduler=scheduler)
    assert loaded.residual_scheduler is scheduler
    assert not np.array_equal(draw(loaded), picture)


def test_another_residual_scheduler_comes_back(pipe, tmp_path):
    other = HARTPipeline(
        **{**pipe.components, "residual_scheduler": DDIMScheduler.from_config(pipe.residual_scheduler.config)}
    )
    drawn = draw(other)
    other.save_pretrained(tmp_path)
    loaded = HARTPipeline.from_pretrained(tmp_path)
    assert type(loaded.residual_scheduler) is DDIMScheduler
    assert np.array_equal(draw(loaded), drawn)


def test_the_system_prompt_comes_back(pipe, picture, tmp_path):
    other = HARTPipeline(**pipe.components, system_prompt="Draw:")
    drawn = draw(other)
    other.save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    assert loaded.config.system_prompt == "Draw:"
    assert np.array_equal(draw(loaded), drawn)
    assert not np.array_equal(drawn, picture)


@pytest.mark.parametrize("loader", [HARTPipeline, AutoPipelineForText2Image])
def test_from_pipe_shares_the_components(loader, pipe, picture):
    other = loader.from_pipe(pipe)
    assert type(other) is HARTPipeline and other is not pipe
    assert all(getattr(other, name) is getattr(pipe, name) for name in MODELS)
    assert np.array_equal(draw(other), picture)


def test_a_class_conditional_pipeline(tmp_path):
    pipe = class_conditional_pipeline(id2label={0: "cat, house cat", 1: "dog"})
    pipe.transformer.proj_out.weight.data.mul_(16)  # sharp enough for the class to show
    pipe.save_pretrained(tmp_path)
    assert not np.array_equal(draw(pipe, 0), draw(pipe, 1))
    for loader in (HARTClassConditionalPipeline, DiffusionPipeline):
        loaded = loader.from_pretrained(tmp_path)
        assert type(loaded) is HARTClassConditionalPipeline
        assert loaded.labels == pipe.labels == {"cat": 0, "house cat": 0, "dog": 1}
        assert loaded.get_label_ids("dog") == [1]
        assert np.array_equal(draw(loaded, 1), draw(pipe, 1))


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("transformer", "vae"),
        ("residual_mlp", "transformer"),
        ("vae", "residual_mlp"),
        ("scheduler", "residual_scheduler"),
        ("residual_scheduler", "scheduler"),
    ],
)
def test_another_of_our_components_in_the_wrong_place(name, other, pipe, folder):
    with pytest.raises(ValueError, match=f"`{name}`"):
        HARTPipeline(**{**pipe.components, name: pipe.components[other]})
    with pytest.raises(ValueError, match=f"`{name}`"):
        HARTPipeline.from_pretrained(folder, **{name: pipe.components[other]})


@pytest.mark.parametrize(
    ("name", "other"), [("transformer", "scheduler"), ("tokenizer", "text_encoder"), ("text_encoder", "transformer")]
)
def test_a_component_of_the_wrong_kind(name, other, pipe, folder):
    with pytest.raises(ValueError, match="is of type: .* but should be"):
        HARTPipeline.from_pretrained(folder, **{name: pipe.components[other]})


def test_a_folder_that_lacks_a_component(folder, tmp_path):
    index = json.loads((folder / "model_index.json").read_text())
    del index["vae"]
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    for saved in folder.iterdir():
        if saved.is_dir():
            (tmp_path / saved.name).symlink_to(saved)
    with pytest.raises(ValueError, match="vae"):
        HARTPipeline.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("model_class", "name", "size"),
    [
        (HARTTransformer2DModel, "transformer", "codebook_size"),
        (HybridTokenizer, "vae", "latent_channels"),
        (ResidualDiffusionMLP, "residual_mlp", "condition_dim"),
    ],
)
def test_weights_that_do_not_fit_the_config(model_class, name, size, folder, tmp_path):
    weights = "diffusion_pytorch_model.safetensors"
    config = json.loads((folder / name / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, size: 2 * config[size]}))
    (tmp_path / weights).symlink_to(folder / name / weights)
    with pytest.raises(ValueError, match="shape"):
        model_class.from_pretrained(tmp_path)
