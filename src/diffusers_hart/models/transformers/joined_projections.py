# SPDX-License-Identifier: Apache-2.0
from typing import Any

import torch
import torch.nn as nn


class JoinedProjectionsMixin:
    """
    For modules with several linear layers that read the same: they can be joined into one, which saves launches. Unlike
    diffusers' own joining, it lets some have no bias, keeps no weight twice, and what is saved of a joined model stays
    the several.
    """

    fused_projections = False
    _joined_projection: str
    _single_projections: tuple[str, ...]

    def check_projections(self):
        """Raises `ValueError` if there are adapters on the projections, which would be lost."""
        if any(hasattr(projection, "base_layer") for projection in self._projections()):
            raise ValueError(
                "Projections with LoRA adapters cannot be joined: call `unload_lora_weights()` on the pipeline first, or "
                "`fuse_lora()` and then `unload_lora_weights()` to keep what the adapters do."
            )

    @torch.no_grad()
    def fuse_projections(self):
        """Join the projections. Raises `ValueError` if there are adapters on them."""
        if self.fused_projections:
            return
        self.check_projections()
        projections = self._projections()
        weight, bias = torch.cat([projection.weight for projection in projections]), None
        if any(projection.bias is not None for projection in projections):
            biases = [weight.new_zeros(projection.out_features) for projection in projections]
            biases = [zeros if layer.bias is None else layer.bias for zeros, layer in zip(biases, projections)]
            bias = torch.cat(biases)
        joined = nn.Linear(*weight.shape[::-1], bias=bias is not None, device=weight.device, dtype=weight.dtype)
        joined.weight.copy_(weight)
        if bias is not None:
            joined.bias.copy_(bias)
        setattr(self, self._joined_projection, joined)
        # The several, of which the model is saved, become views: nothing is kept twice.
        start = 0
        for projection in projections:
            end = start + projection.out_features
            projection.weight.data = joined.weight.data[start:end]
            if projection.bias is not None:
                projection.bias.data = joined.bias.data[start:end]
            start = end
        self.fused_projections = True
        self._saved_layout = self.register_state_dict_post_hook(_without_joined_projection)

    @torch.no_grad()
    def unfuse_projections(self):
        """Go back to several projections."""
        if not self.fused_projections:
            return
        self._saved_layout.remove()
        delattr(self, self._joined_projection)
        for projection in self._projections():
            for parameter in projection.parameters():
                parameter.data = parameter.data.clone()
        self.fused_projections = False

    def _projections(self) -> list[nn.Module]:
        return [getattr(self, name) for name in self._single_projections]


def _without_joined_projection(
    module: JoinedProjectionsMixin, state_dict: dict[str, Any], prefix: str, local_metadata: dict
):
    for name in ("weight", "bias"):
        state_dict.pop(f"{prefix}{module._joined_projection}.{name}", None)
        for projection in module._single_projections:  # of storages of their own: some who save leave out shared ones
            key = f"{prefix}{projection}.{name}"
            if key in state_dict:
                state_dict[key] = state_dict[key].clone()
