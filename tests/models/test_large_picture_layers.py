# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from diffusers_hart import HybridTokenizer
from diffusers_hart.models.autoencoders.large_picture_layers import HybridTokenizerGroupNorm, group_norm_by_channels


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("shape", [(1, 8, 6, 5), (3, 8, 6, 5), (2, 8, 7)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
def test_moments_of_channels_give_those_of_groups(shape, layout, dtype, tolerance):
    hidden_states = (3 * random(*shape) + 2).to(dtype)
    if len(shape) == 4:
        hidden_states = hidden_states.contiguous(memory_format=layout)
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
