# SPDX-License-Identifier: Apache-2.0
import statistics

import pytest
import torch

from diffusers_hart.training import drop_fraction, kept_tokens
from diffusers_hart.training.token_drop import num_kept_tokens


def test_the_fraction_that_is_dropped():
    fractions = [drop_fraction(seed=0, step=step) for step in range(5000)]
    assert all(0.5 <= fraction <= 1 for fraction in fractions)
    assert statistics.mean(fractions) == pytest.approx(0.82, abs=0.01)
    assert drop_fraction(0, 7) == fractions[7] != drop_fraction(1, 7)


def test_what_is_left_of_the_published_sizes():
    kept = [num_kept_tokens(4096, drop_fraction(seed=0, step=step)) for step in range(5000)]
    assert all(count % 32 == 0 for count in kept)
    assert min(kept) == 32 and max(kept) == 2048
    assert 1 - statistics.mean(kept) / 4096 == pytest.approx(0.82, abs=0.01)
    assert num_kept_tokens(256, 0.99) == num_kept_tokens(4096, 1.0) == 32
    assert num_kept_tokens(16, 0.9) == 16  # fewer tokens than are kept at least


def test_each_sample_keeps_a_choice_of_its_own():
    kept = kept_tokens(256, 0.75, seed=0, positions=range(8), device="cpu")
    assert kept.shape == (8, 64) and kept.dtype == torch.int64
    assert (kept.diff(dim=1) > 0).all() and kept.min() >= 0 and kept.max() < 256
    assert len({tuple(row.tolist()) for row in kept}) == 8


def test_every_token_is_as_likely():
    kept = kept_tokens(128, 0.75, seed=0, positions=range(4000), device="cpu")
    counts = torch.bincount(kept.flatten(), minlength=128) / 4000
    assert counts.mean().item() == 0.25
    assert (counts - 0.25).abs().max() < 0.03  # more than four deviations


def test_processes_and_batches_choose_alike():
    one = kept_tokens(256, 0.6, seed=3, positions=range(4), device="cpu")
    two = [kept_tokens(256, 0.6, seed=3, positions=positions, device="cpu") for positions in ([0, 1], [2, 3])]
    assert torch.equal(one, torch.cat(two))
    assert not torch.equal(one, kept_tokens(256, 0.6, seed=4, positions=range(4), device="cpu"))
