# SPDX-License-Identifier: Apache-2.0
"""What users of diffusers switch on to save memory or time: the picture stays what it was, to its dtype's tolerance."""

import copy

import numpy as np
import pytest
import torch
from diffusers import attention_backend
from diffusers.hooks.group_offloading import _is_group_offload_enabled

from diffusers_hart import HARTPipeline, HARTScheduler, HARTTransformer2DModel
from diffusers_hart.models.transformers.transformer_hart import Float32Linear, HARTAttnProcessor
from diffusers_hart.random_pipeline import random_pipeline


MODELS = ("text_encoder", "transformer", "residual_mlp", "vae")
OURS = MODELS[1:]


@pytest.fixture
def pipe():
    return quiet(random_pipeline())


@pytest.fixture(scope="module")
def picture():
    return draw(quiet(random_pipeline()))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    random_pipeline().save_pretrained(folder)
    return folder


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe, **options):
    # Without smoothing, which amplifies the rounding of the logits: drawn codes are the same or they are not.
    options = {"smooth": False, **options}
    generator = torch.Generator().manual_seed(0)
    return pipe("a red circle", generator=generator, output_type="np", **options).images


def assert_same(drawn, expected, atol=1e-4):
    assert np.abs(drawn - expected).max() <= atol


GROUPS = [{"offload_type": "block_level", "num_blocks_per_group": 1}, {"offload_type": "leaf_level"}]


@pytest.mark.parametrize("options", GROUPS)
def test_group_offload(pipe, picture, options):
    pipe.enable_group_offload(onload_device=torch.device("cpu"), **options)
    assert all(_is_group_offload_enabled(getattr(pipe, name)) for name in MODELS)
    for _ in range(2):
        assert_same(draw(pipe), picture)


@pytest.mark.parametrize("options", GROUPS)
def test_group_offload_to_disk(pipe, picture, options, tmp_path):
    pipe.enable_group_offload(torch.device("cpu"), offload_to_disk_path=tmp_path, **options)
    assert all(_is_group_offload_enabled(getattr(pipe, name)) for name in MODELS)
    assert {path.name for path in tmp_path.iterdir()} == set(MODELS)  # since some of their layers are called the same
    for _ in range(2):
        assert_same(draw(pipe), picture)


def test_group_offload_with_a_component_left_out(pipe, picture, tmp_path):
    pipe.enable_group_offload(
        torch.device("cpu"), offload_type="leaf_level", offload_to_disk_path=tmp_path, exclude_modules="vae"
    )
    assert not _is_group_offload_enabled(pipe.vae) and not (tmp_path / "vae").exists()
    assert_same(draw(pipe), picture)


def test_model_offload_with_the_cpu_for_a_device(pipe, picture):
    pipe.enable_model_cpu_offload(device="cpu")
    assert len(pipe._all_hooks) == len(MODELS)
    for _ in range(2):
        assert_same(draw(pipe), picture)


def test_device_map(folder, picture):
    assert_same(draw(quiet(HARTPipeline.from_pretrained(folder, device_map="cpu"))), picture)


def test_device_map_of_a_model_over_cpu_and_disk(folder, pipe, picture, tmp_path):
    pipe.transformer = HARTTransformer2DModel.from_pretrained(
        folder, subfolder="transformer", device_map="auto", max_memory={"cpu": "600KB"}, offload_folder=tmp_path
    )
    assert set(pipe.transformer.hf_device_map.values()) == {"cpu", "disk"}
    assert_same(draw(pipe), picture)


@pytest.mark.parametrize("storage", [torch.float8_e4m3fn, torch.bfloat16])
def test_layerwise_casting_rounds_the_weights_and_nothing_else(pipe, picture, storage):
    rounded = copy.deepcopy(pipe)
    for name in OURS:
        model, other = getattr(pipe, name), getattr(rounded, name)
        model.enable_layerwise_casting(storage_dtype=storage, compute_dtype=torch.float32)
        stored = {key for key, parameter in model.named_parameters() if parameter.dtype == storage}
        assert sum(model.get_parameter(key).numel() for key in stored) > 0.6 * model.num_parameters()
        kept = ("norm", "codebook", "phi", "level_embedder", "time_embedder", "logit_scale")
        assert stored and not any(word in key for key in stored for word in kept)
        for key in stored:
            parameter = other.get_parameter(key)
            parameter.data = parameter.to(storage).float()
    drawn = draw(pipe)
    assert_same(drawn, draw(rounded))
    assert not np.array_equal(drawn, picture)


def test_slicing_and_tiling(pipe, picture):
    pipe.vae.enable_slicing()
    assert_same(draw(pipe), picture)
    pipe.vae.enable_tiling()  # of larger tiles than this picture
    assert_same(draw(pipe), picture)
    pipe.vae.enable_tiling(tile_sample_min_size=64, tile_sample_stride=48)
    tiled = draw(pipe)
    assert tiled.shape == picture.shape and not np.array_equal(tiled, picture)
    pipe.vae.disable_tiling()
    assert_same(draw(pipe), picture)


@pytest.mark.parametrize("backend", ["native", "_native_math"])
def test_attention_backends(pipe, picture, backend):
    pipe.transformer.set_attention_backend(backend)
    assert_same(draw(pipe), picture)
    pipe.transformer.reset_attention_backend()
    with attention_backend(backend):
        assert_same(draw(pipe), picture)


class CountingProcessor(HARTAttnProcessor):
    def __init__(self):
        self.calls = 0

    def __call__(self, *args, **kwargs):
        self.calls += 1
        return super().__call__(*args, **kwargs)


def test_attention_processors(pipe, picture):
    assert set(pipe.transformer.attn_processors) == {f"transformer_blocks.{i}.attn.processor" for i in range(2)}
    processor = CountingProcessor()
    pipe.transformer.set_attn_processor(processor)
    assert_same(draw(pipe), picture)
    assert processor.calls == 2 * 6
    each = {name: CountingProcessor() for name in pipe.transformer.attn_processors}
    pipe.transformer.set_attn_processor(each.copy())
    draw(pipe)
    assert [processor.calls for processor in each.values()] == [6, 6]
    with pytest.raises(ValueError, match="number of"):
        pipe.transformer.set_attn_processor({"transformer_blocks.0.attn.processor": processor})


def test_fused_projections(pipe, picture):
    pipe.transformer.fuse_qkv_projections()
    assert_same(draw(pipe), picture)
    pipe.transformer.unfuse_qkv_projections()
    assert_same(draw(pipe), picture)


@pytest.mark.parametrize("name", ["residual_mlp", "vae"])
def test_gradient_checkpointing_gives_the_same_gradients(pipe, name):
    model = getattr(pipe, name).train()
    if name == "vae":
        arguments = (torch.linspace(-1, 1, 3 * 128 * 128).view(1, 3, 128, 128),)
    else:
        arguments = (torch.linspace(-1, 1, 40).view(5, 8), 143, torch.linspace(-2, 2, 320).view(5, 64))

    def gradients():
        model.zero_grad()
        model(*arguments).sample.square().mean().backward()
        return {key: parameter.grad for key, parameter in model.named_parameters() if parameter.grad is not None}

    plain = gradients()
    model.enable_gradient_checkpointing()
    assert model.is_gradient_checkpointing
    checkpointed = gradients()
    assert plain.keys() == checkpointed.keys() and len(plain) > 10
    assert all(torch.allclose(plain[key], checkpointed[key], atol=1e-6) for key in plain)


def test_compiled_blocks_are_one_graph_and_are_not_compiled_anew_for_a_second_picture(pipe):
    pipe.scheduler = HARTScheduler(schedules=((1, 3, 8),))
    picture = draw(pipe)
    torch.compiler.reset()
    for model in (pipe.transformer, pipe.residual_mlp):
        model.compile_repeated_blocks(fullgraph=True, backend="eager")  # what is traced is what other backends get
    assert_same(draw(pipe), picture)
    with torch.compiler.set_stance("fail_on_recompile"):
        assert_same(draw(pipe), picture)
    torch.compiler.reset()


def test_linear_layers_are_plain(pipe):
    """What quantizers look for."""
    for name in ("transformer", "residual_mlp"):
        linear = [module for module in getattr(pipe, name).modules() if hasattr(module, "in_features")]
        assert {type(module) for module in linear} <= {torch.nn.Linear, Float32Linear}
