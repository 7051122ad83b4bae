# SPDX-License-Identifier: Apache-2.0
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..models import HybridTokenizer


@dataclass
class TeacherForcingTargets:
    """
    What the transformer reads and has to predict of a picture.

    Args:
        scale_inputs (`torch.Tensor` of shape `(batch_size, L - 1, latent_channels)`):
            Inputs of the scales 1 to K - 1, from the tokenizer's own running latent.
        codes (`torch.LongTensor` of shape `(batch_size, L)`): Codes of all scales.
        last_scale (`torch.Tensor` of shape `(batch_size, P * P, latent_channels)`):
            What the last scale has to add: its code's vector and the residual.
        latents (`torch.Tensor` of shape `(batch_size, latent_channels, P, P)`, *optional*): The whole latent.
    """

    scale_inputs: torch.Tensor
    codes: torch.LongTensor
    last_scale: torch.Tensor
    latents: torch.Tensor | None = None


@torch.no_grad()
def teacher_forcing_targets(
    vae: HybridTokenizer,
    scales: Sequence[int],
    images: torch.Tensor | None = None,
    latents: torch.Tensor | None = None,
    codes: torch.LongTensor | None = None,
    mistakes: torch.LongTensor | None = None,
) -> TeacherForcingTargets:
    """
    The targets of pictures, of latents and codes that were computed of them before, or of latents and mistakes.

    Args:
        vae ([`HybridTokenizer`]): The tokenizer.
        scales (`Sequence[int]`): Sides of the scales.
        images (`torch.Tensor` of shape `(batch_size, 3, height, width)`, *optional*): Pictures in [-1, 1].
        latents (`torch.Tensor` of shape `(batch_size, latent_channels, P, P)`, *optional*): Continuous latents.
        codes (`torch.LongTensor` of shape `(batch_size, L)`, *optional*): Their codes.
        mistakes (`torch.LongTensor` of shape `(batch_size, L)`, *optional*):
            Codes that inputs are made of in place of the right ones, see [`HybridTokenizer.quantize`].

    Returns:
        [`TeacherForcingTargets`].
    """
    if images is not None:
        encoded = vae.encode(images, scales)
        latents, codes, partial_latents = encoded.latents, encoded.codes, encoded.partial_latents
    elif mistakes is not None:
        codes, partial_latents, _ = vae.quantize(latents, scales, mistakes=mistakes)
    else:
        latents, codes = latents.float(), codes.long()
        partial_latents = vae.latents_from_codes(codes, scales)
    rest = latents - partial_latents[-2] if len(scales) > 1 else latents
    return TeacherForcingTargets(
        scale_inputs=vae.scale_inputs(partial_latents, scales),
        codes=codes,
        last_scale=rest.flatten(2).transpose(1, 2),
        latents=latents,
    )
