# SPDX-License-Identifier: Apache-2.0
import os
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn as nn


class StrictLoadingMixin:
    """For models whose saved weights must be complete and finite; goes before `ModelMixin`, which lets both pass."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any):
        r"""
        Load a model as `ModelMixin.from_pretrained` does, and check what came.

        Raises:
            ValueError: If weights are missing, of another shape, not the model's or not finite.
            OSError: If there are none, or files are damaged.
        """
        output_loading_info = kwargs.pop("output_loading_info", False)
        model, info = super().from_pretrained(pretrained_model_name_or_path, output_loading_info=True, **kwargs)
        origin = os.path.join(str(pretrained_model_name_or_path), kwargs.get("subfolder") or "")
        check_names(cls.__name__, origin, info["missing_keys"], info["unexpected_keys"])
        check_finite(model, origin)
        return (model, info) if output_loading_info else model


def check_names(model: str, origin: str, missing: Iterable[str], unexpected: Iterable[str]) -> None:
    """Raises `ValueError` unless the weights of `origin` are those of the model."""
    problems = [
        f"{len(names)} {problem}: {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"
        for problem, names in (("are missing", sorted(missing)), ("are not the model's", sorted(unexpected)))
        if names
    ]
    if problems:
        raise ValueError(
            f"The weights in {origin} are not those of the {model} that its config.json describes; of their tensors "
            f"{' and '.join(problems)}. Download or convert the model anew."
        )


@torch.no_grad()
def check_finite(model: nn.Module, origin: str) -> None:
    """Raises `ValueError` if a weight is infinite or no number. Reads every weight once, at the speed of the memory."""
    for name, tensor in model.state_dict().items():
        # Of quantized and offloaded weights nothing can be said without undoing that.
        plain = type(tensor) is torch.Tensor and tensor.dtype in (torch.float16, torch.bfloat16, torch.float32)
        if not plain or tensor.is_meta or not tensor.numel():
            continue
        if not all(extreme.isfinite() for extreme in tensor.aminmax()):  # which what is no number becomes
            raise ValueError(
                f"The weight {name} in {origin} holds values that are not finite, of which pictures would be noise or "
                "black. If the files are whole, the training that wrote them diverged."
            )
