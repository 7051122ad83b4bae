# SPDX-License-Identifier: Apache-2.0
import math

import pytest
import torch
import torch.nn as nn

from diffusers_hart import HARTTransformer2DModel, ResidualDiffusionMLP
from diffusers_hart.training import initialize_residual_mlp, initialize_transformer


def transformer(num_classes=None):
    model = HARTTransformer2DModel(
        in_channels=8,
        codebook_size=64,
        num_layers=3,
        num_attention_heads=4,
        attention_head_dim=16,
        caption_channels=32 if num_classes is None else None,
        num_classes=num_classes,
    )
    initialize_transformer(model, torch.Generator().manual_seed(0))
    return model


def residual_mlp():
    model = ResidualDiffusionMLP(in_channels=8, condition_dim=64, hidden_size=32, num_layers=2)
    initialize_residual_mlp(model, torch.Generator().manual_seed(0))
    return model


@pytest.mark.parametrize(
    "make", [transformer, lambda: transformer(5), residual_mlp], ids=["text", "class", "residual"]
)
def test_all_weights_come_from_the_generator(make):
    torch.manual_seed(1)
    first = make()
    torch.manual_seed(2)
    second = make()
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values()))


def test_the_transformer_starts_as_documented():
    model = transformer(num_classes=5)
    deviation = math.sqrt(1 / (3 * 64))
    branches = {"attn.to_out.0.weight", "ff.down_proj.weight"}
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            assert (parameter == 1).all(), name
        elif name.endswith("bias"):
            assert (parameter == 0).all(), name
        elif any(name.endswith(branch) for branch in branches):
            assert parameter.std().item() == pytest.approx(0.88 * deviation / math.sqrt(6), rel=0.05), name
        elif name.endswith("modulation.weight"):
            gates, rest = parameter[:128], parameter[128:]
            assert gates.std().item() == pytest.approx(0.88 * deviation * 1e-5, rel=0.05), name
            assert rest.std().item() == pytest.approx(0.88 * deviation * 0.5, rel=0.05), name
        elif name == "proj_out.weight":
            assert parameter.std().item() == pytest.approx(0.88 * deviation * 0.02, rel=0.05)
        elif name == "norm_out.linear.weight":
            assert parameter.std().item() == pytest.approx(0.88 * deviation * 0.5, rel=0.05)
        elif name.endswith("logit_scale"):
            assert torch.allclose(parameter.exp(), torch.full_like(parameter, 4)), name
        elif name != "pos_start":
            assert 0.75 * deviation < parameter.std().item() < 1.01 * deviation, name
            assert parameter.abs().max() <= 2 * deviation, name


@torch.no_grad()
def test_all_codes_are_as_likely_at_first():
    embeds, mask = torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(0)), torch.ones(2, 6)
    scale_inputs = torch.randn(2, 13, 8, generator=torch.Generator().manual_seed(1))
    logits = transformer()(scale_inputs, (1, 2, 3), embeds, mask).logits
    assert (logits.log_softmax(-1) + math.log(64)).abs().max() < 0.2


@torch.no_grad()
def test_the_residual_mlp_starts_by_predicting_nothing():
    model = residual_mlp()
    generator = torch.Generator().manual_seed(0)
    noisy, condition = torch.randn(5, 8, generator=generator), torch.randn(5, 64, generator=generator)
    assert (model(noisy, torch.arange(5), condition).sample == 0).all()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            assert (module.bias == 0).all(), name
    bound = math.sqrt(6 / (32 + 32))
    assert 0.9 * bound < model.blocks[0].linear_1.weight.abs().max() <= bound
    assert model.time_embedder.linear_1.weight.std().item() == pytest.approx(0.02, rel=0.05)
