# SPDX-License-Identifier: Apache-2.0
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput
from diffusers.utils.accelerate_utils import apply_forward_hook

from .strict_loading import StrictLoadingMixin


@dataclass
class ResidualDiffusionMLPOutput(BaseOutput):
    """
    Output of [`ResidualDiffusionMLP`].

    Args:
        sample (`torch.Tensor` of shape `(..., 2 * in_channels)`):
            The predicted noise and, in the second half of the channels, where the variance lies between its bounds
            (-1 the smaller, 1 the larger).
    """

    sample: torch.Tensor


class ResidualMLPBlock(nn.Module):
    """`x + gate * MLP(norm(x) * (1 + scale) + shift)`, shift, scale and gate from the conditioning."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.norm = nn.LayerNorm(hidden_size, eps=1e-6)
        self.linear_1 = nn.Linear(hidden_size, hidden_size)
        self.linear_2 = nn.Linear(hidden_size, hidden_size)
        self.modulation = nn.Linear(hidden_size, 3 * hidden_size)

    def forward(self, hidden_states: torch.Tensor, conditioning: torch.Tensor) -> torch.Tensor:
        shift, scale, gate = self.modulation(conditioning).chunk(3, dim=-1)
        modulated = self.norm(hidden_states) * (1 + scale) + shift
        return hidden_states + gate * self.linear_2(F.silu(self.linear_1(modulated)))


class ResidualDiffusionMLP(StrictLoadingMixin, ModelMixin, ConfigMixin, PeftAdapterMixin):
    r"""
    The denoiser of HART's continuous residual (section 3.2 of the [paper](https://huggingface.co/papers/2410.10812)):
    a small MLP that treats every token alone, conditioned on what the transformer knows of it. A plain
    noise-and-variance network that any diffusers scheduler can drive.

    Args:
        in_channels (`int`, defaults to `32`): Channels of the residual; the output has twice as many.
        condition_dim (`int`, defaults to `1536`): Width of the condition, the transformer's width.
        hidden_size (`int`, defaults to `1024`): Width of the network.
        num_layers (`int`, defaults to `6`): Number of blocks.
        residual_scale (`float`, defaults to `0.6`):
            Unit of the residual: latent residuals are divided by it before training, samples multiplied by it.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["ResidualMLPBlock"]
    _repeated_blocks = ["ResidualMLPBlock"]
    _skip_layerwise_casting_patterns = ["norm", "time_embedder"]
    _group_offload_block_modules = ["condition_embedder"]  # which `embed_condition` calls

    @register_to_config
    def __init__(
        self,
        in_channels: int = 32,
        condition_dim: int = 1536,
        hidden_size: int = 1024,
        num_layers: int = 6,
        residual_scale: float = 0.6,
    ):
        super().__init__()
        self.proj_in = nn.Linear(in_channels, hidden_size)
        self.time_proj = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedder = TimestepEmbedding(256, hidden_size)
        self.condition_embedder = nn.Linear(condition_dim, hidden_size)
        self.blocks = nn.ModuleList([ResidualMLPBlock(hidden_size) for _ in range(num_layers)])
        self.norm_out = nn.LayerNorm(hidden_size, eps=1e-6, elementwise_affine=False)
        self.modulation_out = nn.Linear(hidden_size, 2 * hidden_size)
        self.proj_out = nn.Linear(hidden_size, 2 * in_channels)
        self.gradient_checkpointing = False

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | int | float,
        condition: torch.Tensor | None = None,
        return_dict: bool = True,
        condition_embeds: torch.Tensor | None = None,
    ) -> ResidualDiffusionMLPOutput | tuple:
        r"""
        Predict the noise in noisy residuals.

        Args:
            sample (`torch.Tensor` of shape `(..., in_channels)`): Noisy residuals, in units of `residual_scale`.
            timestep (`torch.Tensor` of shape `()` or `(...)`, `int` or `float`):
                Diffusion time in [0, 1000), one for all tokens or one each.
            condition (`torch.Tensor` of shape `(..., condition_dim)`):
                What [`HARTTransformer2DModel.residual_condition`] gives for these tokens.
            return_dict (`bool`, defaults to `True`): Whether to return a [`ResidualDiffusionMLPOutput`] or a tuple.
            condition_embeds (`torch.Tensor` of shape `(..., hidden_size)`, *optional*):
                What [`~ResidualDiffusionMLP.embed_condition`] gives, instead of `condition`: it is the same at all
                timesteps.

        Returns:
            [`ResidualDiffusionMLPOutput`] or `tuple`: noise and variance of shape `(..., 2 * in_channels)`.

        Raises:
            ValueError: If both `condition` and `condition_embeds` are given, or neither.
        """
        if (condition is None) == (condition_embeds is None):
            given = "neither" if condition is None else "both"
            raise ValueError(f"Pass either `condition` or `condition_embeds`, not {given}.")
        if condition_embeds is None:
            condition_embeds = self.embed_condition(condition)
        if not isinstance(timestep, torch.Tensor) or (timestep.ndim == 0 and timestep.device != sample.device):
            timestep = torch.full((), float(timestep), device=sample.device)  # no copy that waits for the device
        time_proj = self.time_proj(timestep.flatten()).to(sample.dtype)
        time_embeds = self.time_embedder(time_proj).unflatten(0, timestep.shape or (1,))
        conditioning = F.silu(time_embeds + condition_embeds)

        hidden_states = self.proj_in(sample)
        for block in self.blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                hidden_states = self._gradient_checkpointing_func(block, hidden_states, conditioning)
            else:
                hidden_states = block(hidden_states, conditioning)

        shift, scale = self.modulation_out(conditioning).chunk(2, dim=-1)
        output = self.proj_out(self.norm_out(hidden_states) * (1 + scale) + shift)
        if not return_dict:
            return (output,)
        return ResidualDiffusionMLPOutput(sample=output)

    @apply_forward_hook
    def embed_condition(self, condition: torch.Tensor) -> torch.Tensor:
        """The part of the conditioning that is the same at all timesteps: `(..., condition_dim)` to `(..., hidden_size)`."""
        return self.condition_embedder(condition)
