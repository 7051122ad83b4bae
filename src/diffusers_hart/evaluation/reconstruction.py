# SPDX-License-Identifier: Apache-2.0
from collections.abc import Sequence
from typing import Any

import torch
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure
from tqdm.auto import tqdm

from ..models import HybridTokenizer
from ..reconstruction import reconstruct
from .codebook_statistics import CodebookStatistics
from .confidence import estimated_mean
from .examples import ExampleGroup, batches
from .feature_distances import feature_distances
from .instruments import Instruments, PictureMeasurements
from .prompt_following import prompt_following


PATHS = ("discrete", "hybrid")


def psnr(images: torch.Tensor, originals: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio in dB of each picture in [-1, 1], `10 * log10(4 / mse)`, by torchmetrics."""
    return peak_signal_noise_ratio(images, originals, data_range=2.0, reduction="none", dim=(1, 2, 3))


def ssim(images: torch.Tensor, originals: torch.Tensor) -> torch.Tensor:
    """Structural similarity of each picture in [-1, 1], by torchmetrics with the usual Gaussian window."""
    # Its measure of brightness counts from black, which must be 0.
    return structural_similarity_index_measure(
        (images + 1) / 2, (originals + 1) / 2, data_range=1.0, reduction="none"
    ).reshape(len(images))


def measure_reconstruction(
    vae: HybridTokenizer,
    scales: Sequence[int],
    group: ExampleGroup,
    instruments: Instruments,
    batch_size: int,
    num_shown: int = 0,
) -> tuple[dict[str, Any], PictureMeasurements, dict[str, list]]:
    r"""
    Measure both reconstructions of a group's pictures against the pictures, and which codes they use.

    Args:
        vae ([`HybridTokenizer`]): The tokenizer.
        scales (`Sequence[int]`): Sides of the scales.
        group ([`ExampleGroup`]): The pictures.
        instruments ([`Instruments`]): What to measure with.
        batch_size (`int`): Number of pictures at once.
        num_shown (`int`, defaults to `0`): Number of pictures to show.

    Returns:
        `tuple`: the figures of each path and of the codebook, the measurements of the pictures themselves, and rows of
        pictures to show by name.
    """
    originals = PictureMeasurements(instruments, num_shown)
    measured = {path: PictureMeasurements(instruments, num_shown) for path in PATHS}
    errors = {path: {"psnr": [], "ssim": []} for path in PATHS}
    codebook = CodebookStatistics(vae.config.codebook_size, scales)
    for indices in tqdm(batches(range(group.num_images), batch_size), desc=f"{group.name}: reconstruction"):
        images = group.load_images(indices, vae.device)
        statements = None
        if group.statements is not None and group.are_of_prompts:
            statements = [group.statements[i] for i in indices]
        captions = [group.captions[i] for i in indices] if group.are_of_prompts else None
        originals.add(images, statements, captions)
        *reconstructions, codes = reconstruct(vae, images, scales)
        codebook.update(codes)
        for path, reconstruction in zip(PATHS, reconstructions):
            measured[path].add(reconstruction, statements)
            errors[path]["psnr"].append(psnr(reconstruction, images).cpu())
            errors[path]["ssim"].append(ssim(reconstruction, images).cpu())

    figures = {"num_images": group.num_images}
    for path in PATHS:
        row = {name: estimated_mean(torch.cat(values)) for name, values in errors[path].items()}
        row |= feature_distances(measured[path].features, originals.features)
        if measured[path].verdicts:
            row |= prompt_following(measured[path].verdicts)
        figures[path] = row
    gains = torch.cat(errors["hybrid"]["psnr"]) - torch.cat(errors["discrete"]["psnr"])
    figures["psnr_gain"] = estimated_mean(gains)
    figures["codebook"] = codebook.report()
    shown = {"original": originals.shown, **{path: measured[path].shown for path in PATHS}}
    return figures, originals, shown
