# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from diffusers_hart.evaluation import bootstrap_margins, feature_distances, frechet_distance, kernel_distance


def normal(count, mean=0.0, scale=1.0, features=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, features, generator=generator) * torch.as_tensor(scale) + torch.as_tensor(mean)


def whitened(count, features, seed):
    """Features whose mean is 0 and whose covariance is the identity, exactly."""
    x = normal(count, features=features, seed=seed).double()
    x = x - x.mean(0)
    return torch.linalg.qr(x).Q * (count - 1) ** 0.5


def test_frechet_distance_of_two_gaussians_against_the_closed_form():
    one = torch.tensor([0.5, 1.0, 2.0, 3.0], dtype=torch.float64)
    other = torch.tensor([1.5, 1.0, 0.1, 2.0], dtype=torch.float64)
    shift = torch.tensor([1.0, -2.0, 0.0, 0.5], dtype=torch.float64)
    turn = torch.linalg.qr(normal(4, features=4, seed=5).double()).Q  # covariances that are not diagonal
    first = (whitened(40, 4, 1) * one) @ turn
    second = (whitened(50, 4, 2) * other + shift) @ turn
    expected = (shift.square().sum() + (one - other).square().sum()).item()
    assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-6)
    # Far from 0, where the squares of the features are large beside their spread.
    assert frechet_distance(first + 1e4, second + 1e4) == pytest.approx(expected, rel=1e-6)


def test_fewer_pictures_than_features():
    first, second = normal(20, features=50, seed=1), normal(20, features=50, seed=2)
    a, b = (x.double() - x.double().mean(0) for x in (first, second))
    trace = torch.linalg.svdvals(a @ b.T).sum()  # of the root of the product of the covariances
    means = (first.double().mean(0) - second.double().mean(0)).square().sum()
    expected = means + (a.square().sum() + b.square().sum() - 2 * trace) / 19
    assert frechet_distance(first, second) == pytest.approx(expected.item(), rel=1e-6)
    assert frechet_distance(first, first) == pytest.approx(0, abs=1e-5)


def test_kernel_distance_against_its_definition():
    first, second = normal(30, seed=1).double(), normal(30, mean=0.5, seed=2).double()

    def kernel(a, b):
        return (a @ b.T / 6 + 1) ** 3

    def mean_of_pairs(x):
        return (kernel(x, x).sum() - kernel(x, x).trace()) / (30 * 29)

    expected = mean_of_pairs(first) + mean_of_pairs(second) - 2 * kernel(first, second).mean()
    state = torch.get_rng_state()
    assert kernel_distance(first, second) == pytest.approx(expected.item(), rel=1e-9)
    assert torch.equal(torch.get_rng_state(), state)


def test_subsets_of_many_pictures_follow_from_the_seed():
    first, second = normal(60, seed=1), normal(70, seed=2, mean=0.5)
    distance = kernel_distance(first, second, seed=1, max_subset_size=50)
    assert distance == kernel_distance(first, second, seed=1, max_subset_size=50)
    assert distance != kernel_distance(first, second, seed=2, max_subset_size=50)
    assert distance == pytest.approx(kernel_distance(first, second[:60]), rel=0.3)


def test_too_few_pictures():
    with pytest.raises(ValueError, match="two pictures or more"):
        frechet_distance(normal(1), normal(5))
    with pytest.raises(ValueError, match="two pictures or more"):
        kernel_distance(normal(5), normal(1))


def test_inception_features_give_fid_and_kid():
    features = {"checker": normal(10, seed=1), "inception": normal(10, seed=2, features=8)}
    references = {"checker": normal(10, seed=3), "inception": normal(10, seed=4, features=8)}
    figures = feature_distances(features, references)
    assert figures["fid"] == frechet_distance(features["inception"], references["inception"])
    assert figures["kid"] == kernel_distance(features["inception"], references["inception"])
    assert list(feature_distances({"checker": features["checker"]}, references)) == [
        "frechet_distance",
        "kernel_distance",
    ]


def test_paired_resamples_show_a_difference_that_single_margins_hide():
    references = normal(200, seed=1)
    base = normal(60, seed=2, mean=0.5)
    paired = base + 0.02 * normal(60, seed=3) + 0.05
    sets = {"base": base, "paired": paired, "unpaired": normal(60, seed=4, mean=0.55)}
    margins = bootstrap_margins(sets, references, "base", 40)
    assert margins["base"][1] == 0
    assert 0 < 3 * margins["paired"][1] < margins["paired"][0]
    assert margins["unpaired"][1] > 3 * margins["paired"][1]
    assert margins == bootstrap_margins(sets, references, "base", 40)


def test_margins_are_as_wide_as_the_spread_of_fresh_samples():
    references = normal(500, seed=1)
    drawn = torch.tensor([frechet_distance(normal(80, mean=0.5, seed=seed), references) for seed in range(10, 50)])
    margin = bootstrap_margins({"base": normal(80, mean=0.5, seed=2)}, references, "base", 40)["base"][0]
    assert margin == pytest.approx(1.96 * drawn.std().item(), rel=0.5)
