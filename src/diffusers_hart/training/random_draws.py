# SPDX-License-Identifier: Apache-2.0
import math
from collections.abc import Sequence
from hashlib import blake2b

import torch


# Odd constants of splitmix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014), as the
# signed numbers that int64 holds; products wrap around.
GOLDEN = 0x9E3779B97F4A7C15 - 2**64
MIX_1 = 0xBF58476D1CE4E5B9 - 2**64
MIX_2 = 0x94D049BB133111EB - 2**64


def seeded_generator(device: torch.device | str, *key: int | str) -> torch.Generator:
    """
    A generator on `device` that is a function of `key` alone, for example `(seed, "drop fraction", step)`. Draws of
    different names or steps are independent of each other, whatever their number and order. For draws of a batch's
    samples, [`draw_uniform`] and its kin take a few operations where a generator each would take a launch each.
    """
    return torch.Generator(device).manual_seed(_digest(key, size=7))


def draw_bits(
    shape: Sequence[int], device: torch.device | str, seed: int, name: str, positions: Sequence[int] | torch.Tensor
) -> torch.LongTensor:
    """
    64 random bits an element. An element is a function of the seed, the draw's name, the sample's position in the whole
    run and its own index in the sample's draw: a sample gets the same numbers on whichever process and device, in
    whichever batch it is seen.

    Args:
        shape (`Sequence[int]`): Shape of one sample's draw.
        device (`torch.device` or `str`): Where to draw.
        seed (`int`): Seed of the run.
        name (`str`): What the draw is for.
        positions (`Sequence[int]` or `torch.LongTensor` of shape `(batch_size,)`):
            How many samples the run had seen before each of these.

    Returns:
        `torch.LongTensor` of shape `(batch_size, *shape)`.
    """
    # Small and from ordinary memory: the copy does not wait for the device.
    positions = torch.as_tensor(positions, dtype=torch.int64).to(device, non_blocking=True)
    index = torch.arange(1, math.prod(shape) + 1, device=device)
    key = _digest((seed, name), size=8) - 2**63
    bits = _mix(positions * GOLDEN + key)[:, None] + index * GOLDEN
    return _mix(bits).unflatten(1, tuple(shape)) if shape else _mix(bits).squeeze(1)


def draw_uniform(
    shape: Sequence[int], device: torch.device | str, seed: int, name: str, positions: Sequence[int] | torch.Tensor
) -> torch.Tensor:
    """Uniform numbers in [0, 1), float32 multiples of 2^-24; the arguments are those of [`draw_bits`]."""
    return _shift(draw_bits(shape, device, seed, name, positions), 40).float().mul_(2**-24)


def draw_normal(
    shape: Sequence[int], device: torch.device | str, seed: int, name: str, positions: Sequence[int] | torch.Tensor
) -> torch.Tensor:
    """
    Standard normal numbers, float32, at most 5.4 from 0; the arguments are those of [`draw_bits`]. Devices may differ
    in the last digits.
    """
    # The middles of 2^24 equal parts of (-1, 1), which float32 holds exactly.
    odd = _shift(draw_bits(shape, device, seed, name, positions), 40).mul_(2).sub_(2**24 - 1)
    return odd.float().mul_(2**-24).erfinv_().mul_(math.sqrt(2))


def draw_integers(
    high: int,
    shape: Sequence[int],
    device: torch.device | str,
    seed: int,
    name: str,
    positions: Sequence[int] | torch.Tensor,
) -> torch.LongTensor:
    """Whole numbers in [0, `high`), `high` at most 2^31; the other arguments are those of [`draw_bits`]."""
    return _shift(_shift(draw_bits(shape, device, seed, name, positions), 32).mul_(high), 32)


def draw_subsets(
    count: int,
    size: int,
    device: torch.device | str,
    seed: int,
    name: str,
    positions: Sequence[int] | torch.Tensor,
) -> torch.LongTensor:
    """
    For each sample `size` different numbers of [0, `count`), any choice as likely, ascending; the other arguments are
    those of [`draw_bits`].

    Returns:
        `torch.LongTensor` of shape `(batch_size, size)`.
    """
    order = draw_bits((count,), device, seed, name, positions).argsort(dim=1)
    return order[:, :size].sort(dim=1).values


def _digest(key: Sequence[int | str], size: int) -> int:
    return int.from_bytes(blake2b("/".join(str(part) for part in key).encode(), digest_size=size).digest(), "big")


def _shift(bits: torch.Tensor, count: int) -> torch.Tensor:
    """A logical shift to the right: the sign moves down with the other bits."""
    return (bits >> count).bitwise_and_(2 ** (64 - count) - 1)


def _mix(bits: torch.Tensor) -> torch.Tensor:
    """The finalizer of splitmix64: a permutation of 64-bit numbers in which each bit depends on all."""
    bits = (bits ^ _shift(bits, 30)).mul_(MIX_1)
    bits = (bits ^ _shift(bits, 27)).mul_(MIX_2)
    return bits ^ _shift(bits, 31)
