# SPDX-License-Identifier: Apache-2.0
import warnings

import torch
import torch.nn as nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from ..training.random_draws import seeded_generator
from .confidence import Z_95


class _GivenFeatures(nn.Module):
    """Stands where torchmetrics has its feature extractor, for features that are there already."""

    def __init__(self, num_features: int):
        super().__init__()
        self.num_features = num_features

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return features


def frechet_distance(features: torch.Tensor, references: torch.Tensor) -> float:
    r"""
    The Fréchet distance between two sets of pictures, from their features: that of Gaussians of the same means and
    covariances. On the features of Inception it is the FID. It falls with the number of pictures, so only distances of
    equally many can be compared.

    Args:
        features (`torch.Tensor` of shape `(num_images, num_features)`): Features of the one.
        references (`torch.Tensor` of shape `(num_references, num_features)`): Features of the other.

    Returns:
        `float`: The distance; computed by torchmetrics in float64.

    Raises:
        ValueError: If one has less than two pictures.
    """
    return _frechet_distances([features], references)[0]


def _frechet_distances(feature_sets: list[torch.Tensor], references: torch.Tensor) -> list[float]:
    for features in (*feature_sets, references):
        if len(features) < 2:
            raise ValueError("A Fréchet distance needs two pictures or more on both sides.")
    # The distance is the same wherever the features lie; around 0 their covariances are the most exact.
    center = references.double().mean(0)
    metric = FrechetInceptionDistance(_GivenFeatures(references.shape[1]), reset_real_features=False)
    metric.update(references.double() - center, real=True)
    distances = []
    for features in feature_sets:
        metric.reset()
        metric.update(features.double() - center, real=False)
        distances.append(metric.compute().item())
    return distances


def kernel_distance(
    features: torch.Tensor, references: torch.Tensor, seed: int = 0, max_subset_size: int = 1000
) -> float:
    r"""
    The squared maximum mean discrepancy of two sets of pictures under a cubic kernel, without bias: on the features of
    Inception, the KID. All pictures are used at once; of more than `max_subset_size`, or of unequally many, it is the
    mean over 100 random subsets.

    Args:
        features (`torch.Tensor` of shape `(num_images, num_features)`): Features of the one.
        references (`torch.Tensor` of shape `(num_references, num_features)`): Features of the other.
        seed (`int`, defaults to `0`): Decides the subsets.
        max_subset_size (`int`, defaults to `1000`): Number of pictures of a subset.

    Returns:
        `float`: The distance, around 0 for pictures of one kind; computed by torchmetrics in float64.

    Raises:
        ValueError: If one has less than two pictures.
    """
    subset_size = min(len(features), len(references), max_subset_size)
    if subset_size < 2:
        raise ValueError("A kernel distance needs two pictures or more on both sides.")
    whole = subset_size == len(features) == len(references)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Metric `Kernel Inception Distance` will save all")
        metric = KernelInceptionDistance(
            _GivenFeatures(features.shape[1]), subsets=1 if whole else 100, subset_size=subset_size
        )
    metric.update(references.double(), real=True)
    metric.update(features.double(), real=False)
    with torch.random.fork_rng(devices=[]):  # torchmetrics draws its subsets from the global generator
        torch.default_generator.manual_seed(seed)
        return metric.compute()[0].item()


def feature_distances(
    features: dict[str, torch.Tensor], references: dict[str, torch.Tensor], seed: int = 0
) -> dict[str, float]:
    """Fréchet and kernel distances by name: on Inception features they are FID and KID."""
    figures = {
        "frechet_distance": frechet_distance(features["checker"], references["checker"]),
        "kernel_distance": kernel_distance(features["checker"], references["checker"], seed),
    }
    if "inception" in features:
        figures["fid"] = frechet_distance(features["inception"], references["inception"])
        figures["kid"] = kernel_distance(features["inception"], references["inception"], seed)
    return figures


def bootstrap_margins(
    feature_sets: dict[str, torch.Tensor], references: torch.Tensor, base: str, num_resamples: int, seed: int = 0
) -> dict[str, tuple[float, float]]:
    r"""
    How far Fréchet distances to the same references would have come out differently for other pictures of the same
    kinds, estimated from resamples of the pictures. All sets are resampled alike, picture `i` with picture `i`: what
    the same prompt and the same random numbers have in common does not blur their differences.

    Args:
        feature_sets (`dict[str, torch.Tensor]` of shape `(num_images, num_features)`): By name, equally many of each.
        references (`torch.Tensor` of shape `(num_references, num_features)`): Stay as they are.
        base (`str`): Name of the set that the others are compared with.
        num_resamples (`int`): Number of resamples, at least two.
        seed (`int`, defaults to `0`): Decides them.

    Returns:
        `dict[str, tuple[float, float]]`: The 95 % margin of each distance, and of its difference to that of `base`.
    """
    num_images = len(feature_sets[base])
    distances = []
    for resample in range(num_resamples):
        generator = seeded_generator("cpu", seed, "bootstrap", resample)
        chosen = torch.randint(num_images, (num_images,), generator=generator)
        distances.append(_frechet_distances([features[chosen] for features in feature_sets.values()], references))
    distances = torch.tensor(distances, dtype=torch.float64)
    differences = distances - distances[:, list(feature_sets).index(base), None]
    margins = zip((Z_95 * distances.std(0)).tolist(), (Z_95 * differences.std(0)).tolist())
    return dict(zip(feature_sets, margins))
