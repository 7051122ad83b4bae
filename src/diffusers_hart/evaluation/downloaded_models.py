# SPDX-License-Identifier: Apache-2.0
"""Models whose weights come from elsewhere. Where they cannot be had, the answer is quick and says why."""

import urllib.request
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn as nn
from huggingface_hub import constants, try_to_load_from_cache
from torchmetrics.functional.multimodal import clip_score
from torchmetrics.image.fid import FrechetInceptionDistance
from transformers import CLIPModel, CLIPProcessor


SECONDS_TO_ANSWER = 5


class NotMeasured(Exception):
    """Something cannot be measured here; says why."""


def load_inception(weights_path: str | None = None, downloads: bool = True) -> nn.Module:
    r"""
    The Inception network that FID and KID are defined by.

    Args:
        weights_path (`str`, *optional*): File of torch-fidelity's weights; by default they are downloaded once.
        downloads (`bool`, defaults to `True`): Whether that is allowed.

    Returns:
        `nn.Module`: Makes features `(batch_size, 2048)` of pictures `(batch_size, 3, height, width)`, uint8.

    Raises:
        NotMeasured: If torch-fidelity cannot be imported, or its weights are not there and cannot be downloaded.
    """
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3
    except (ImportError, RuntimeError) as error:  # the latter from a torchvision of another torch
        remedy = "pip install torch-fidelity torchvision"
        raise NotMeasured(f"torch-fidelity cannot be imported: {_first_line(error)} ({remedy})") from error
    cached = Path(torch.hub.get_dir()) / "checkpoints" / Path(URL_INCEPTION_V3).name
    if weights_path is None and not cached.exists():
        _check_download(URL_INCEPTION_V3, downloads, "--inception_weights names a file of them")
    try:
        return FrechetInceptionDistance(2048, feature_extractor_weights_path=weights_path).inception
    except (ImportError, OSError, RuntimeError) as error:
        raise NotMeasured(f"the Inception network could not be loaded: {_first_line(error)}") from error


class ClipScore:
    r"""
    How well pictures fit texts: 100 times the cosine between their CLIP embeddings, not below 0, as in torchmetrics.

    Args:
        name_or_path (`str`): A CLIP model, a folder or an id on the Hub.
        device (`torch.device` or `str`): Where to run it.
        downloads (`bool`, defaults to `True`): Whether it may be downloaded.

    Raises:
        NotMeasured: If it is not there and cannot be downloaded.
    """

    def __init__(self, name_or_path: str, device: torch.device | str, downloads: bool = True):
        self.name_or_path = name_or_path
        is_local = Path(name_or_path).is_dir()
        is_cached = not is_local and isinstance(try_to_load_from_cache(name_or_path, "config.json"), str)
        if not is_local and not is_cached:
            if constants.HF_HUB_OFFLINE:
                raise NotMeasured(f"{name_or_path} is not in the cache and HF_HUB_OFFLINE is set")
            _check_download(
                f"{constants.ENDPOINT}/{name_or_path}/resolve/main/config.json",
                downloads,
                "--clip_model may name a folder",
            )
        try:
            # What is in the cache is used as it is: asking the Hub for news takes minutes where there is none.
            model = CLIPModel.from_pretrained(name_or_path, local_files_only=is_cached)
            self.processor = CLIPProcessor.from_pretrained(name_or_path, local_files_only=is_cached)
        except (ImportError, OSError, RuntimeError, ValueError) as error:
            raise NotMeasured(f"{name_or_path} could not be loaded: {_first_line(error)}") from error
        self.model = _ClipEmbeddings(model).eval().requires_grad_(False).to(device)

    @torch.no_grad()
    def __call__(self, images: torch.Tensor, captions: Sequence[str]) -> torch.Tensor:
        """Scores `(batch_size,)` of pictures `(batch_size, 3, height, width)` in [-1, 1] and their captions."""
        # One by one, as torchmetrics gives the mean of what it is given.
        scores = [
            clip_score(image, caption, lambda: (self.model, self.processor))
            for image, caption in zip(to_uint8(images), captions)
        ]
        return torch.stack(scores).clamp_min(0).cpu()


class _ClipEmbeddings(nn.Module):
    """A CLIP model whose embeddings are tensors, which torchmetrics expects and transformers no longer returns."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.config = model.config

    def get_image_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.model.get_image_features(pixel_values).pooler_output

    def get_text_features(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.model.get_text_features(input_ids, attention_mask).pooler_output


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """Pictures in [-1, 1] as bytes."""
    return (images.float() * 127.5 + 127.5).round().clamp(0, 255).byte()


def _check_download(url: str, downloads: bool, remedy: str) -> None:
    if not downloads:
        raise NotMeasured(f"{url} is not at hand, and downloads are not allowed ({remedy})")
    try:
        request = urllib.request.Request(url, method="HEAD")
        urllib.request.urlopen(request, timeout=SECONDS_TO_ANSWER).close()
    except (OSError, ValueError) as error:
        raise NotMeasured(f"{url} cannot be downloaded: {_first_line(error)} ({remedy})") from error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
