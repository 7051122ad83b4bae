# SPDX-License-Identifier: Apache-2.0
from collections.abc import Sequence

import torch

from .models import HybridTokenizer


@torch.no_grad()
def reconstruct(
    vae: HybridTokenizer, images: torch.Tensor, scales: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor, torch.LongTensor]:
    r"""
    Pictures as their codes alone show them, and as codes and continuous residual do. The discrete latent is the one of
    generation, whose last scale is not corrected by phi; the tokenizer's own training corrects that too.

    Args:
        vae ([`HybridTokenizer`]): The tokenizer.
        images (`torch.Tensor` of shape `(batch_size, 3, side, side)`): Pictures in [-1, 1].
        scales (`Sequence[int]`): Sides of the scales.

    Returns:
        `tuple`: discrete and hybrid pictures of the same shape, float32, and the codes `(batch_size, L)`.
    """
    encoded = vae.encode(images.to(vae.dtype), scales)
    discrete, hybrid = (
        vae.decode(latents.to(vae.dtype)).sample.float() for latents in (encoded.partial_latents[-1], encoded.latents)
    )
    return discrete, hybrid, encoded.codes
