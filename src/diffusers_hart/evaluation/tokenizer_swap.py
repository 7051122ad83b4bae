# SPDX-License-Identifier: Apache-2.0
import torch
from diffusers import DiffusionPipeline

from ..models import HybridTokenizer


def swap_tokenizer(pipe: DiffusionPipeline, vae: HybridTokenizer) -> str | None:
    r"""
    Give a pipeline another tokenizer, such as one whose decoder was trained otherwise.

    Args:
        pipe (`HARTPipeline` or `HARTClassConditionalPipeline`): Changed in place.
        vae ([`HybridTokenizer`]): The tokenizer, on any device.

    Returns:
        `str`, *optional*: What to know of the result: with other codes, the transformer's say something else.

    Raises:
        ValueError: If its latents or codes are of other sizes than the pipeline's.
    """
    for name in ("latent_channels", "codebook_size", "num_phi"):
        expected, given = pipe.vae.config[name], vae.config[name]
        if given != expected:
            raise ValueError(f"`{name}` of the tokenizer must be {expected}, as in the pipeline's, not {given}.")
    if vae.spatial_factor != pipe.vae.spatial_factor:
        raise ValueError(
            f"The tokenizer must reduce pictures by {pipe.vae.spatial_factor}, as the pipeline's, not by "
            f"{vae.spatial_factor}."
        )
    # Up to the rounding of a tokenizer that was stored in half precision.
    codes = [
        torch.cat([model.codebook.weight.flatten(), *(p.flatten() for p in model.phi.parameters())])
        for model in (pipe.vae, vae)
    ]
    same = torch.allclose(codes[0].float().cpu(), codes[1].float().cpu(), rtol=1e-2, atol=1e-4)
    pipe.register_modules(vae=vae.to(pipe.device))
    if same:
        return None
    return (
        "The tokenizer's codebook or phi are not those of the pipeline: the codes that are drawn mean other pictures."
    )
