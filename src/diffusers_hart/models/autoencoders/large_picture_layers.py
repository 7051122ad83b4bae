# SPDX-License-Identifier: Apache-2.0
"""Layers of the convolutional autoencoder that are fast for a few large pictures on CUDA."""

import torch
import torch.nn as nn
import torch.nn.functional as F


def group_norm_by_channels(
    hidden_states: torch.Tensor, num_groups: int, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> torch.Tensor:
    """
    `F.group_norm` of `(batch_size, channels, *sides)`, its moments taken over channels and then over groups, all in
    float32. The rest is one multiplication and addition for each channel of each sample, as batch norm has it.
    """
    sides = tuple(range(2, hidden_states.ndim))
    mean = hidden_states.mean(sides, dtype=torch.float32)
    norm = torch.linalg.vector_norm(hidden_states, dim=sides, dtype=torch.float32)
    square = norm.square() / hidden_states[0, 0].numel()
    mean, square = (moment.unflatten(1, (num_groups, -1)).mean(-1) for moment in (mean, square))
    variance = square - mean.square()
    mean, variance = (
        moment.repeat_interleave(hidden_states.shape[1] // num_groups, dim=1).flatten() for moment in (mean, variance)
    )
    weight, bias = (parameter.float().repeat(len(hidden_states)) for parameter in (weight, bias))
    channels = hidden_states.reshape(1, len(mean), *hidden_states.shape[2:])
    return F.batch_norm(channels, mean, variance, weight, bias, eps=eps).reshape(hidden_states.shape)


class HybridTokenizerGroupNorm(nn.GroupNorm):
    """
    Group norm that is fast for a few large pictures on CUDA. PyTorch's own kernel gives each group of a picture to one
    thread block, 32 in all, which took 40 of the 110 ms of decoding 1024 px, and wants its input in the usual layout.
    """

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        is_large = hidden_states[0].numel() > 2**19
        if not hidden_states.is_cuda or not is_large or torch.is_grad_enabled():
            return super().forward(hidden_states)
        return group_norm_by_channels(hidden_states, self.num_groups, self.weight, self.bias, self.eps)


class HybridTokenizerConvOut(nn.Conv2d):
    """
    The decoder's last convolution. Of its three channels cuDNN makes a poor guess where channels lie next to each other:
    6 ms at 1024 px instead of 0.6.
    """

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if not torch.compiler.is_compiling():  # compiled decoders keep their layout, and search instead of guessing
            hidden_states = hidden_states.contiguous()
        return super().forward(hidden_states)


def use_large_picture_layers(encoder: nn.Module, decoder: nn.Module):
    """Exchange layers of diffusers' autoencoder, before their weights are set, for those above."""
    for module in [*encoder.modules(), *decoder.modules()]:
        for name, norm in list(module.named_children()):
            if isinstance(norm, nn.GroupNorm):
                setattr(module, name, HybridTokenizerGroupNorm(norm.num_groups, norm.num_channels, norm.eps))
    conv = decoder.conv_out
    decoder.conv_out = HybridTokenizerConvOut(
        conv.in_channels, conv.out_channels, conv.kernel_size, padding=conv.padding
    )
