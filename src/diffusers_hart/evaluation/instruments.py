# SPDX-License-Identifier: Apache-2.0
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import PIL.Image
import torch
import torch.nn as nn

from .downloaded_models import ClipScore, NotMeasured, load_inception, to_uint8
from .examples import resize_images


CHECKER_SIDE = 128  # pixels of the pictures that the checker of the shapes was trained on


@dataclass
class Instruments:
    r"""
    What pictures are measured with.

    Args:
        feature_extractors (`dict[str, Callable]`):
            `"checker"` and, where it could be loaded, `"inception"`: make features of pictures in [-1, 1].
        checker (`nn.Module`): Says which attributes that are stated are right.
        clip_score (`Callable`, *optional*): Makes scores of pictures and captions.
        not_measured (`dict[str, str]`): What is left out, and why.
    """

    feature_extractors: dict[str, Callable[[torch.Tensor], torch.Tensor]]
    checker: nn.Module
    clip_score: Callable[[torch.Tensor, Sequence[str]], torch.Tensor] | None = None
    not_measured: dict[str, str] = field(default_factory=dict)


def load_instruments(
    checker: nn.Module,
    device: torch.device | str,
    clip_model: str | None,
    inception_weights: str | None = None,
    downloads: bool = True,
) -> Instruments:
    r"""
    Load what can be loaded; for what cannot, `not_measured` says why.

    Args:
        checker (`nn.Module`): The frozen checker of the shapes, which needs no download.
        device (`torch.device` or `str`): Where to run everything.
        clip_model (`str`, *optional*): A CLIP model, a folder or an id on the Hub; `None` for no CLIP score.
        inception_weights (`str`, *optional*): File of the weights of Inception; by default they are downloaded.
        downloads (`bool`, defaults to `True`): Whether weights may be downloaded.
    """
    checker = checker.to(device)
    instruments = Instruments(
        {"checker": lambda images: checker.features(resize_images(images, CHECKER_SIDE))}, checker
    )
    try:
        inception = load_inception(inception_weights, downloads).eval().to(device)
        instruments.feature_extractors["inception"] = lambda images: inception(to_uint8(images))
    except NotMeasured as reason:
        instruments.not_measured["FID and KID on Inception features"] = str(reason)
    try:
        if clip_model is not None:
            instruments.clip_score = ClipScore(clip_model, device, downloads)
    except NotMeasured as reason:
        instruments.not_measured["CLIP score"] = str(reason)
    return instruments


class PictureMeasurements:
    r"""
    What is kept of a set of pictures, measured batch by batch.

    Args:
        instruments ([`Instruments`]): What to measure with.
        num_shown (`int`, defaults to `0`): How many pictures to keep as they are, the first ones.
    """

    def __init__(self, instruments: Instruments, num_shown: int = 0):
        self.instruments = instruments
        self.num_shown = num_shown
        self.shown: list[PIL.Image.Image] = []
        self.verdicts: list[dict[str, bool]] = []
        self._features = {name: [] for name in instruments.feature_extractors}
        self._clip_scores = []

    @torch.no_grad()
    def add(
        self, images: torch.Tensor, statements: Sequence[Any] | None = None, captions: Sequence[str] | None = None
    ) -> None:
        r"""
        Measure a batch.

        Args:
            images (`torch.Tensor` of shape `(batch_size, 3, side, side)`): Pictures in [-1, 1].
            statements (`Sequence`, *optional*): What is stated of each, for the checker.
            captions (`Sequence[str]`, *optional*): The text of each, for the CLIP score.

        Raises:
            ValueError: If the pictures are no numbers, as by an overflow of float16.
        """
        if not images.isfinite().all():
            raise ValueError("The pipeline gave pictures that are no numbers; in fp16, try bf16 or fp32.")
        for name, extract in self.instruments.feature_extractors.items():
            self._features[name].append(extract(images).cpu())
        if statements is not None:
            self.verdicts += self.instruments.checker.explain(resize_images(images, CHECKER_SIDE), list(statements))
        if captions is not None and self.instruments.clip_score is not None:
            self._clip_scores.append(self.instruments.clip_score(images, captions))
        missing = self.num_shown - len(self.shown)
        if missing > 0:
            pixels = to_uint8(images[:missing]).permute(0, 2, 3, 1).cpu().numpy()
            self.shown += [PIL.Image.fromarray(picture) for picture in pixels]

    @property
    def features(self) -> dict[str, torch.Tensor]:
        """Features `(num_images, num_features)` by the name of their extractor."""
        return {name: torch.cat(batches) for name, batches in self._features.items()}

    @property
    def clip_scores(self) -> torch.Tensor | None:
        return torch.cat(self._clip_scores) if self._clip_scores else None
