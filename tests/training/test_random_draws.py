# SPDX-License-Identifier: Apache-2.0
import math
from hashlib import blake2b

import pytest
import torch

from diffusers_hart.training.random_draws import (
    draw_bits,
    draw_integers,
    draw_normal,
    draw_subsets,
    draw_uniform,
    seeded_generator,
)


def test_a_generator_is_a_function_of_its_key():
    def draw(*key):
        return torch.randn(3, generator=seeded_generator("cpu", *key)).tolist()

    assert draw(0, "noise", 1) == draw(0, "noise", 1)
    others = [
        draw(1, "noise", 1),
        draw(0, "codes", 1),
        draw(0, "noise", 2),
        draw(0, "noise", 11),
        draw(0, "noise1", 1),
    ]
    assert all(other != draw(0, "noise", 1) for other in others)


def splitmix(state):
    """The finalizer in the unbounded integers of Python."""
    mask = 2**64 - 1
    state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & mask
    state = (state ^ state >> 27) * 0x94D049BB133111EB & mask
    return state ^ state >> 31


def test_bits_are_those_of_unbounded_integers():
    bits = draw_bits((2, 3), "cpu", 5, "a name", [0, 7, 2**40])
    mask, golden = 2**64 - 1, 0x9E3779B97F4A7C15
    key = int.from_bytes(blake2b(b"5/a name", digest_size=8).digest(), "big") - 2**63
    expected = [
        [splitmix(splitmix(position * golden + key & mask) + index * golden & mask) for index in range(1, 7)]
        for position in (0, 7, 2**40)
    ]
    assert [[value & mask for value in sample] for sample in bits.flatten(1).tolist()] == expected
    assert torch.equal(draw_uniform((2, 3), "cpu", 5, "a name", [0, 7, 2**40]), (bits >> 40 & 2**24 - 1) / 2**24)


DRAWS = {
    "uniform": lambda positions: draw_uniform((3, 2), "cpu", 0, "noise", positions),
    "normal": lambda positions: draw_normal((3, 2), "cpu", 0, "noise", positions),
    "integers": lambda positions: draw_integers(1000, (3, 2), "cpu", 0, "noise", positions),
    "subsets": lambda positions: draw_subsets(50, 6, "cpu", 0, "noise", positions).unflatten(1, (3, 2)),
}


@pytest.mark.parametrize("kind", DRAWS)
def test_a_sample_draws_the_same_in_every_batch(kind):
    draw = DRAWS[kind]
    whole = draw(range(6))
    assert whole.shape == (6, 3, 2)
    assert len({tuple(sample.flatten().tolist()) for sample in whole}) == 6
    parts = [draw(positions) for positions in ([0, 1], torch.tensor([2]), [3, 4, 5])]
    assert torch.equal(whole, torch.cat(parts))
    assert torch.equal(whole.flip(0), draw(range(5, -1, -1)))


def test_one_number_a_sample():
    scalars = draw_uniform((), "cpu", 0, "noise", range(6))
    assert scalars.shape == (6,) and torch.equal(scalars, draw_uniform((1,), "cpu", 0, "noise", range(6))[:, 0])


def chi_square(counts):
    expected = counts.sum() / len(counts)
    return ((counts - expected).square() / expected).sum().item()


def test_uniform_numbers():
    numbers = draw_uniform((100,), "cpu", 1, "noise", range(2000))
    assert numbers.dtype == torch.float32 and numbers.min() >= 0 and numbers.max() < 1
    assert numbers.mean().item() == pytest.approx(1 / 2, abs=0.003)
    assert numbers.var().item() == pytest.approx(1 / 12, abs=0.001)
    for bits in (numbers, numbers * 256 % 1):  # the high ones and those in the middle
        assert chi_square(torch.histc(bits, 16, 0, 1)) < 40  # 15 degrees of freedom: 1 of 2000 exceeds it


def test_normal_numbers():
    numbers = draw_normal((100,), "cpu", 1, "noise", range(2000)).double()
    assert numbers.mean().item() == pytest.approx(0, abs=0.008)
    assert numbers.var().item() == pytest.approx(1, abs=0.012)
    assert (numbers**3).mean().item() == pytest.approx(0, abs=0.03)
    assert (numbers**4).mean().item() == pytest.approx(3, abs=0.1)
    assert 4 < numbers.abs().max() < 5.5
    bounds = torch.distributions.Normal(0, 1).icdf(torch.arange(1, 16) / 16)
    assert chi_square(torch.bincount(torch.bucketize(numbers.flatten().float(), bounds), minlength=16)) < 40


def test_whole_numbers():
    numbers = draw_integers(16, (100,), "cpu", 1, "timestep", range(2000))
    assert numbers.dtype == torch.int64 and numbers.min() == 0 and numbers.max() == 15
    assert chi_square(torch.bincount(numbers.flatten(), minlength=16)) < 40


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ((0, "noise", range(0, 1000)), (0, "noise", range(1, 1001))),
        ((0, "noise", range(0, 1000)), (0, "codes", range(0, 1000))),
        ((0, "noise", range(0, 1000)), (1, "noise", range(0, 1000))),
    ],
    ids=["positions", "names", "seeds"],
)
def test_neighbours_are_independent(first, second):
    draws = [draw_uniform((100,), "cpu", *key).flatten() for key in (first, second)]
    assert torch.corrcoef(torch.stack(draws))[0, 1].abs().item() < 4 / math.sqrt(100_000)


def test_elements_are_independent():
    numbers = draw_uniform((100,), "cpu", 0, "noise", range(1000))
    for distance in (1, 2, 10):
        pairs = torch.stack([numbers[:, distance:].flatten(), numbers[:, :-distance].flatten()])
        assert torch.corrcoef(pairs)[0, 1].abs().item() < 4 / math.sqrt(pairs.shape[1])


def test_subsets():
    chosen = draw_subsets(20, 5, "cpu", 0, "token drop", range(4000))
    assert chosen.shape == (4000, 5) and (chosen.diff(dim=1) > 0).all()
    assert chosen.min() == 0 and chosen.max() == 19
    counts = torch.bincount(chosen.flatten(), minlength=20) / 4000
    assert (counts - 0.25).abs().max() < 0.03
    # Pairs are as likely as in a random choice, 5/20 * 4/19, neighbours among them.
    together = (chosen.diff(dim=1) == 1).sum().item() / 4000
    assert together == pytest.approx(19 * 5 / 20 * 4 / 19, abs=0.05)
    assert draw_subsets(5, 5, "cpu", 0, "token drop", [3]).tolist() == [[0, 1, 2, 3, 4]]


@pytest.mark.gpu
def test_devices_agree():
    positions = [0, 5, 123456]
    for draw in (draw_bits, draw_uniform):
        assert torch.equal(
            draw((7, 3), "cpu", 0, "noise", positions), draw((7, 3), "cuda", 0, "noise", positions).cpu()
        )
    assert torch.equal(
        draw_subsets(256, 64, "cpu", 0, "noise", positions), draw_subsets(256, 64, "cuda", 0, "noise", positions).cpu()
    )
    torch.testing.assert_close(
        draw_normal((99,), "cpu", 0, "noise", positions), draw_normal((99,), "cuda", 0, "noise", positions).cpu()
    )


def test_the_global_random_state_is_left_alone():
    state = torch.get_rng_state()
    for draw in DRAWS.values():
        draw(range(6))
    assert torch.equal(state, torch.get_rng_state())
