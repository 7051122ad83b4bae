# SPDX-License-Identifier: Apache-2.0
"""
Weights that are quantized while a pipeline is loaded; run with `pytest -m "quantization and not gpu"`, or
without the latter where there is one, in an environment with
`pip install 'diffusers-hart[test,quantization]'`.
"""

import numpy as np
import pytest
import torch
from diffusers import BitsAndBytesConfig, PipelineQuantizationConfig, QuantoConfig, TorchAoConfig
from diffusers.utils import is_bitsandbytes_available, is_optimum_quanto_available, is_torchao_available

from diffusers_hart import HARTPipeline, HARTTransformer2DModel
from diffusers_hart.random_pipeline import random_pipeline


pytestmark = pytest.mark.quantization

MODELS = ("transformer", "residual_mlp")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    random_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def teacher_forced():
    """Inputs of all scales, so that logits can be compared without what drawing makes of small differences."""
    generator = torch.Generator().manual_seed(0)
    scales = (1, 2, 3, 4, 6, 8)
    tokens = sum(side * side for side in scales[1:])
    return (
        torch.randn(1, tokens, 8, generator=generator),
        scales,
        torch.randn(1, 12, 64, generator=generator),
        torch.ones(1, 12, dtype=torch.long),
    )


def torchao_int8():
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


# How far the logits may be off, as a share of their deviation.
KINDS = {
    "torchao": (torchao_int8, is_torchao_available, 0.05),
    "quanto": (lambda: QuantoConfig(weights_dtype="int8"), is_optimum_quanto_available, 0.05),
    "bnb_8bit": (lambda: BitsAndBytesConfig(load_in_8bit=True), is_bitsandbytes_available, 0.1),
    "bnb_4bit": (
        lambda: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32),
        is_bitsandbytes_available,
        0.4,
    ),
}


# diffusers' quantizers of bitsandbytes want a GPU.
@pytest.fixture(params=[pytest.param(kind, marks=pytest.mark.gpu if "bnb" in kind else []) for kind in KINDS])
def kind(request):
    assert KINDS[request.param][1](), "install the extra `quantization`"
    return request.param


def is_quantized(parameter):
    return type(parameter.data) is not torch.Tensor or type(parameter) is not torch.nn.Parameter


def draw(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe("a red circle", generator=torch.Generator().manual_seed(0), output_type="np", smooth=False).images


@torch.no_grad()
def test_at_load(kind, folder, teacher_forced):
    make_config, _, tolerance = KINDS[kind]
    config = PipelineQuantizationConfig(quant_mapping={name: make_config() for name in MODELS})
    pipe = HARTPipeline.from_pretrained(folder, quantization_config=config, dtype=torch.float32)
    for name in MODELS:
        quantized = [key for key, parameter in getattr(pipe, name).named_parameters() if is_quantized(parameter)]
        assert any("to_q.weight" in key or "linear_1.weight" in key for key in quantized)
    logits = pipe.transformer(*teacher_forced).logits
    plain = random_pipeline().transformer(*teacher_forced).logits
    assert 0 < (logits - plain).square().mean().sqrt() < tolerance * plain.std()
    picture = draw(pipe)
    assert picture.shape == (1, 128, 128, 3) and np.isfinite(picture).all()
    assert np.array_equal(draw(pipe), picture)


@pytest.mark.parametrize("backend", ["torchao", "quanto"])
@torch.no_grad()
def test_a_quantized_model_is_saved_and_loaded(backend, folder, teacher_forced, tmp_path):
    assert KINDS[backend][1](), "install the extra `quantization`"
    model = HARTTransformer2DModel.from_pretrained(
        folder, subfolder="transformer", quantization_config=KINDS[backend][0]()
    )
    model.save_pretrained(tmp_path, safe_serialization=backend == "quanto")
    loaded = HARTTransformer2DModel.from_pretrained(tmp_path, use_safetensors=backend == "quanto")
    assert torch.allclose(loaded(*teacher_forced).logits, model(*teacher_forced).logits, atol=1e-3)
