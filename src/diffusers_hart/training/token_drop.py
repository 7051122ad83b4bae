# SPDX-License-Identifier: Apache-2.0
from collections.abc import Sequence

import torch

from .random_draws import draw_subsets, seeded_generator


# Kept tokens come in multiples of this and are at least as many: steps then share a few shapes, for which attention
# kernels are planned and memory is laid out once.
KEPT_TOKENS_STEP = 32


def drop_fraction(seed: int, step: int, mean: float = 1.0, deviation: float = 0.25, low: float = 0.5) -> float:
    """
    The share of last-scale tokens that a step goes without: a normal draw truncated to [`low`, 1], one for all
    processes (section 3.3 of the [paper](https://huggingface.co/papers/2410.10812)).
    """
    generator = seeded_generator("cpu", seed, "drop fraction", step)
    while True:
        fraction = torch.empty(()).normal_(mean, deviation, generator=generator).item()
        if low <= fraction <= 1:
            return fraction


def num_kept_tokens(num_tokens: int, fraction: float) -> int:
    """How many of `num_tokens` tokens are left when `fraction` of them are dropped."""
    kept = round(num_tokens * (1 - fraction) / KEPT_TOKENS_STEP) * KEPT_TOKENS_STEP
    return min(num_tokens, max(KEPT_TOKENS_STEP, kept))


def kept_tokens(
    num_tokens: int,
    fraction: float,
    seed: int,
    positions: Sequence[int] | torch.Tensor,
    device: torch.device | str,
) -> torch.LongTensor:
    """
    Which tokens of the last scale a step goes through, a different random choice for each sample.

    Args:
        num_tokens (`int`): Number of tokens of the last scale.
        fraction (`float`): Share of them to drop, to the nearest multiple of 32 kept tokens, at least 32.
        seed (`int`): Seed of the run.
        positions (`Sequence[int]` or `torch.LongTensor` of shape `(batch_size,)`): The samples' positions in the run.
        device (`torch.device` or `str`): Where to draw.

    Returns:
        `torch.LongTensor` of shape `(batch_size, kept)`, ascending.
    """
    return draw_subsets(num_tokens, num_kept_tokens(num_tokens, fraction), device, seed, "token drop", positions)
