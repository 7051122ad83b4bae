# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from diffusers_hart import HybridTokenizer
from diffusers_hart.models.autoencoders import autoencoder_hybrid
from diffusers_hart.models.autoencoders.large_picture_layers import (
    HybridTokenizerConvOut,
    HybridTokenizerGroupNorm,
    group_norm_by_channels,
)


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "shape, layout",
    [
        ((1, 8, 6, 5), torch.contiguous_format),
        ((3, 8, 6, 5), torch.contiguous_format),
        ((1, 8, 6, 5), torch.channels_last),
        ((3, 8, 6, 5), torch.channels_last),
        ((2, 8, 7), torch.contiguous_format),
    ],
)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
def test_moments_of_channels_give_those_of_groups(shape, layout, dtype, tolerance):
    hidden_states = (3 * random(*shape) + 2).to(dtype).contiguous(memory_format=layout)
    weight, bias = random(2, 8).to(dtype)
    expected = F.group_norm(hidden_states.double(), 4, weight.double(), bias.double(), 1e-5)
    result = group_norm_by_channels(hidden_states, 4, weight, bias, 1e-5)
    assert result.dtype == dtype and result.shape == shape
    assert torch.allclose(result.double(), expected, atol=tolerance)


def test_all_group_norms_of_the_tokenizer_are_of_this_kind():
    vae = HybridTokenizer(block_out_channels=(32, 32), layers_per_block=1, codebook_size=16)
    norms = [module for module in vae.modules() if isinstance(module, nn.GroupNorm)]
    assert norms and all(type(norm) is HybridTokenizerGroupNorm for norm in norms)
    assert {norm.eps for norm in norms} == {1e-6}


@pytest.mark.parametrize("value", [0.1, 3.3, 100.7])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_constant_picture_gives_the_bias(value, dtype):
    """The variance is a difference, which rounding must not make negative."""
    weight, bias = random(2, 64).to(dtype)
    for shift in range(20):
        hidden_states = torch.full((1, 64, 33, 31), value + shift / 7).to(dtype)
        result = group_norm_by_channels(hidden_states, 32, weight, bias, 1e-6)
        assert torch.allclose(result, bias[:, None, None].expand_as(result), atol=0.05)


@pytest.mark.parametrize("mean", [10, 30])
def test_a_mean_far_above_the_deviation(mean):
    hidden_states = (mean + random(1, 64, 33, 31)).to(torch.bfloat16)
    weight, bias = torch.ones(64), torch.zeros(64)
    expected = F.group_norm(hidden_states.double(), 32, weight.double(), bias.double(), 1e-6)
    result = group_norm_by_channels(hidden_states.float(), 32, weight, bias, 1e-6)
    assert (result - expected).abs().max() < 0.01  # of 16 bits, whose own steps are 1/16 at 10


def test_a_seed_makes_the_tokenizer_that_it_made_with_plain_layers(monkeypatch):
    sizes = {"block_out_channels": (32, 32), "layers_per_block": 1, "codebook_size": 16}
    torch.manual_seed(0)
    vae, after = HybridTokenizer(**sizes), torch.rand(3)
    monkeypatch.setattr(autoencoder_hybrid, "use_large_picture_layers", lambda encoder, decoder: None)
    torch.manual_seed(0)
    plain = HybridTokenizer(**sizes)
    assert torch.equal(torch.rand(3), after)
    assert type(vae.decoder.conv_out) is HybridTokenizerConvOut and type(plain.decoder.conv_out) is nn.Conv2d
    state = plain.state_dict()
    assert list(state) == list(vae.state_dict())
    assert all(torch.equal(value, state[name]) for name, value in vae.state_dict().items())
    images = random(1, 3, 16, 16).clamp(-1, 1)
    assert torch.equal(vae(images, (1, 2, 8)).sample, plain(images, (1, 2, 8)).sample)
