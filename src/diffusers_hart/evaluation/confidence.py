# SPDX-License-Identifier: Apache-2.0
import math
from collections.abc import Sequence
from statistics import NormalDist

import torch


Z_95 = NormalDist().inv_cdf(0.975)  # standard deviations to both sides that hold 95 % of a normal distribution


def wilson_interval(successes: int, trials: int) -> tuple[float, float]:
    """
    The 95 % confidence interval of a share after Wilson, which also holds for few trials and for shares near 0 and 1.

    Raises:
        ValueError: If there are no trials, or more successes than trials.
    """
    if trials < 1 or not 0 <= successes <= trials:
        raise ValueError(f"There must be trials and at most as many successes, not {successes} of {trials}.")
    share, weight = successes / trials, Z_95**2 / trials
    center = (share + weight / 2) / (1 + weight)
    margin = math.sqrt(share * (1 - share) * weight + weight**2 / 4) / (1 + weight)
    return max(0.0, center - margin), min(1.0, center + margin)


def estimated_share(outcomes: Sequence[bool]) -> dict[str, float | int]:
    """The `value` of a share, `low` and `high` of its [`wilson_interval`], and of how many outcomes (`count`)."""
    low, high = wilson_interval(sum(outcomes), len(outcomes))
    return {"value": sum(outcomes) / len(outcomes), "low": low, "high": high, "count": len(outcomes)}


def estimated_mean(values: Sequence[float] | torch.Tensor) -> dict[str, float]:
    """
    The `value` of a mean and its 95 % margin `plus_minus`, from the spread of the values. Of paired values of two
    settings, the mean of their differences is the better comparison: what is common to both is not in its margin.
    """
    values = torch.as_tensor(values, dtype=torch.float64)
    margin = Z_95 * values.std().item() / math.sqrt(len(values)) if len(values) > 1 else math.inf
    return {"value": values.mean().item(), "plus_minus": margin}


def paired_difference(outcomes: Sequence[bool], base: Sequence[bool]) -> dict[str, float]:
    """
    The difference (`value`) of two shares of the same trials, and its 95 % margin `plus_minus` after Agresti and Min,
    which is not 0 where no trial came out differently: half a trial is added to each of the four ways a pair can come
    out.
    """
    gained = sum(own and not other for own, other in zip(outcomes, base, strict=True))
    lost = sum(other and not own for own, other in zip(outcomes, base))
    count, changed = len(outcomes) + 2, gained + lost + 1
    margin = Z_95 * math.sqrt(changed - (gained - lost) ** 2 / count) / count
    return {"value": (gained - lost) / len(outcomes), "plus_minus": margin}
