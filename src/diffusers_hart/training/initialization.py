# SPDX-License-Identifier: Apache-2.0
import math

import torch
import torch.nn as nn

from ..models import HARTTransformer2DModel, ResidualDiffusionMLP


@torch.no_grad()
def initialize_transformer(transformer: HARTTransformer2DModel, generator: torch.Generator | None = None) -> None:
    r"""
    Weights to train from, after VAR ([2404.02905](https://huggingface.co/papers/2404.02905)): linear layers and tables
    truncated normal with deviation sqrt(1 / (3 C)), the head small, the branches of the residual stream divided by
    sqrt(2 * depth), the gates of the class-conditional modulation nearly closed.
    """
    deviation = math.sqrt(1 / (3 * transformer.inner_dim))
    for module in transformer.modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            bound = 2 * deviation
            nn.init.trunc_normal_(module.weight, std=deviation, a=-bound, b=bound, generator=generator)
            if getattr(module, "bias", None) is not None:
                module.bias.zero_()
    if transformer.config.num_classes is not None:
        nn.init.trunc_normal_(transformer.pos_start, std=deviation, generator=generator)

    transformer.proj_out.weight.mul_(0.02)
    transformer.norm_out.linear.weight.mul_(0.5)
    branch_scale = 1 / math.sqrt(2 * len(transformer.transformer_blocks))
    for block in transformer.transformer_blocks:
        block.attn.to_out[0].weight.mul_(branch_scale)
        block.ff.down_proj.weight.mul_(branch_scale)
        if block.modulation is not None:
            gates = 2 * transformer.inner_dim
            block.modulation.weight[:gates].mul_(1e-5)
            block.modulation.weight[gates:].mul_(0.5)


@torch.no_grad()
def initialize_residual_mlp(residual_mlp: ResidualDiffusionMLP, generator: torch.Generator | None = None) -> None:
    """Weights to train from: Xavier, modulations and output zero, the time embedding normal with deviation 0.02."""
    for module in residual_mlp.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight, generator=generator)
            module.bias.zero_()
    for linear in (residual_mlp.time_embedder.linear_1, residual_mlp.time_embedder.linear_2):
        nn.init.normal_(linear.weight, std=0.02, generator=generator)
    closed = [block.modulation for block in residual_mlp.blocks]
    for linear in (*closed, residual_mlp.modulation_out, residual_mlp.proj_out):
        linear.weight.zero_()
