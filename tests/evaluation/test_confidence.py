# SPDX-License-Identifier: Apache-2.0
import math

import pytest
import torch

from diffusers_hart.evaluation import (
    estimated_mean,
    estimated_share,
    paired_difference,
    prompt_following,
    wilson_interval,
)


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [
        (0, 10, 0.0, 0.277533),
        (10, 10, 0.722467, 1.0),
        (8, 10, 0.490162, 0.943318),
        (15, 148, 0.062390, 0.160496),  # example of Newcombe 1998, method 3: 0.0624 to 0.1605
        (81, 263, 0.255280, 0.366211),  # another: 0.2553 to 0.3662
    ],
)
def test_wilson_interval_against_known_values(successes, trials, low, high):
    assert wilson_interval(successes, trials) == pytest.approx((low, high), abs=1e-5)


@pytest.mark.parametrize(("successes", "trials"), [(0, 0), (3, 2), (-1, 2)])
def test_shares_of_nothing(successes, trials):
    with pytest.raises(ValueError, match=f"not {successes} of {trials}"):
        wilson_interval(successes, trials)


def test_the_margin_of_a_mean_holds_the_truth_in_95_of_100_samples():
    samples = torch.randn(2000, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 3
    means = [estimated_mean(sample) for sample in samples]
    hits = sum(abs(mean["value"] - 3) < mean["plus_minus"] for mean in means) / len(means)
    assert 0.92 < hits < 0.97
    assert estimated_mean([1.0])["plus_minus"] == math.inf


def test_attributes_count_where_they_are_stated():
    verdicts = [{"count": True, "color": True}, {"count": True, "color": False}, {"count": True}]
    found = prompt_following(verdicts)
    assert found["right"] == estimated_share([True, False, True])
    assert found["right"]["value"] == pytest.approx(2 / 3)
    assert (found["attributes"]["count"]["value"], found["attributes"]["count"]["count"]) == (1, 3)
    assert (found["attributes"]["color"]["value"], found["attributes"]["color"]["count"]) == (0.5, 2)


def test_the_margin_of_a_paired_difference_holds_the_truth_in_95_of_100_samples():
    generator = torch.Generator().manual_seed(0)
    hits = []
    for _ in range(1000):
        base = torch.rand(60, generator=generator) < 0.6
        lost = torch.rand(60, generator=generator) < 0.25  # a quarter of what was right
        found = paired_difference((base & ~lost).tolist(), base.tolist())
        hits.append(abs(found["value"] + 0.15) <= found["plus_minus"])
    assert 0.92 < sum(hits) / len(hits) < 0.98


def test_pairs_that_all_agree_still_have_a_margin():
    found = paired_difference([True] * 48, [True] * 48)
    assert found["value"] == 0
    assert found["plus_minus"] == pytest.approx(1.96 / 50, rel=1e-3)
    assert paired_difference([True, False], [False, False])["value"] == 0.5
