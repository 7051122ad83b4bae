# SPDX-License-Identifier: Apache-2.0
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
    mean, square = (moment.unflatten(1, (num_groups, -1)).mean(-1, keepdim=True) for moment in (mean, square))
    factor = (square - mean.square() + eps).rsqrt() * weight.float().unflatten(0, (num_groups, -1))
    offset = bias.float().unflatten(0, (num_groups, -1)) - mean * factor
    factor, offset = factor.flatten(), offset.flatten()
    channels = hidden_states.reshape(1, len(factor), *hidden_states.shape[2:])
    channels = F.batch_norm(channels, torch.zeros_like(factor), torch.ones_like(factor), factor, offset, eps=0.0)
    return channels.reshape(hidden_states.shape)


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


def replace_group_norms(model: nn.Module):
    """Exchange the group norms in `model`, before their weights are set, for those above."""
    for module in list(model.modules()):
        for name, norm in list(module.named_children()):
            if isinstance(norm, nn.GroupNorm):
                setattr(module, name, HybridTokenizerGroupNorm(norm.num_groups, norm.num_channels, norm.eps))
