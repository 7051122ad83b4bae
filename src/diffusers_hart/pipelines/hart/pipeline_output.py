# SPDX-License-Identifier: Apache-2.0
from dataclasses import dataclass

import numpy as np
import PIL.Image
import torch
from diffusers.utils import BaseOutput


@dataclass
class HARTPipelineOutput(BaseOutput):
    """
    Output of the HART pipelines.

    Args:
        images (`list[PIL.Image.Image]`, `np.ndarray` or `torch.Tensor`):
            The images: a list of PIL images; an array `(batch_size, height, width, 3)` or a tensor
            `(batch_size, 3, height, width)` in [0, 1]; or, with `output_type="latent"`, latents
            `(batch_size, latent_channels, P, P)`.
        nsfw_content_detected (`list[bool]`, *optional*):
            Which images the safety checker blackened; `None` if there is none.
    """

    images: list[PIL.Image.Image] | np.ndarray | torch.Tensor
    nsfw_content_detected: list[bool] | None = None
