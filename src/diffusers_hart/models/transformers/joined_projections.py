# SPDX-License-Identifier: Apache-2.0
from typing import Any

import torch
import torch.nn as nn


class JoinedProjections(nn.Module):
    """
    A module with several linear layers that read the same: they can be joined into one, which saves launches. Unlike
    diffusers' own joining, it lets some have no bias, the several share the memory of the one, and a joined model is
    saved and loaded as the several.
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
        first, *_ = projections = self._projections()
        has_bias = any(projection.bias is not None for projection in projections)
        width = sum(projection.out_features for projection in projections)
        joined = nn.Linear(first.in_features, width, bias=has_bias, device="meta")
        joined.requires_grad_(first.weight.requires_grad)
        weights = {name: _joined(projections, name) for name, _ in joined.named_parameters()}
        joined.load_state_dict(weights, assign=True)
        setattr(self, self._joined_projection, joined)
        self.fused_projections = True
        self._share_memory()
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

    def _share_memory(self):
        """Make the weights of the several views of the one's."""
        joined, start = getattr(self, self._joined_projection), 0
        if type(joined.weight.data) is not torch.Tensor:  # quantized since, as are the several
            return
        for projection in self._projections():
            end = start + projection.out_features
            for name, parameter in projection.named_parameters():
                parameter.data = getattr(joined, name).data[start:end]
            start = end

    # Moving, casting, copying and unpickling make tensors of their own of each parameter.

    def _apply(self, *args, **kwargs):
        super()._apply(*args, **kwargs)
        if self.fused_projections:
            self._share_memory()
        return self

    def __setstate__(self, state: dict[str, Any]):
        super().__setstate__(state)
        if self.fused_projections:
            self._share_memory()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args):
        if self.fused_projections:
            widths = [projection.out_features for projection in self._projections()]
            for name, parameter in getattr(self, self._joined_projection).named_parameters():
                parts = [
                    state_dict.get(f"{prefix}{projection}.{name}", part).to(part.device)
                    for projection, part in zip(self._single_projections, parameter.detach().split(widths))
                ]
                state_dict[f"{prefix}{self._joined_projection}.{name}"] = torch.cat(parts)
        super()._load_from_state_dict(state_dict, prefix, *args)


def _joined(projections: list[nn.Linear], name: str) -> torch.Tensor:
    """The weights or biases of `projections` in one; a bias of 0 where there is none."""
    like = projections[0].weight
    parts = (getattr(projection, name) for projection in projections)
    zeros = (like.new_zeros(projection.out_features) for projection in projections)
    return torch.cat([zero if part is None else part for part, zero in zip(parts, zeros)])


def _without_joined_projection(module: JoinedProjections, state_dict: dict[str, Any], prefix: str, _: dict):
    for name in ("weight", "bias"):
        state_dict.pop(f"{prefix}{module._joined_projection}.{name}", None)
        for projection in module._single_projections:  # of storages of their own: some who save leave out shared ones
            key = f"{prefix}{projection}.{name}"
            if key in state_dict:
                state_dict[key] = state_dict[key].clone()
