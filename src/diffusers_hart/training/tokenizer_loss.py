# SPDX-License-Identifier: Apache-2.0
from collections.abc import Sequence

import torch
import torch.nn.functional as F


def vector_quantization_loss(
    latents: torch.Tensor, partial_latents: Sequence[torch.Tensor], commitment_weight: float = 0.25
) -> torch.Tensor:
    r"""
    The loss that draws the codebook to the latents and, with a smaller weight, the latents to the codebook: the mean
    over scales of `commitment_weight * mse(sg(partial), latents) + mse(partial, sg(latents))`
    (VQ-VAE, [1711.00937](https://huggingface.co/papers/1711.00937), eq. 3, at every scale).

    Args:
        latents (`torch.Tensor` of shape `(batch_size, channels, P, P)`): The continuous latent.
        partial_latents (`Sequence[torch.Tensor]` of the same shape):
            The sum of the scales after each scale, from [`HybridTokenizer.quantize`] with `phi_at_last_scale`.
        commitment_weight (`float`, defaults to `0.25`): Weight of the first term.

    Returns:
        `torch.Tensor` of shape `()`.
    """
    losses = [
        commitment_weight * F.mse_loss(partial.detach(), latents) + F.mse_loss(partial, latents.detach())
        for partial in partial_latents
    ]
    return torch.stack(losses).mean()
