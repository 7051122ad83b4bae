# SPDX-License-Identifier: Apache-2.0
from collections.abc import Sequence

import torch


class CodebookStatistics:
    r"""
    How often each scale uses each code, over any number of pictures.

    Args:
        codebook_size (`int`): Number of codes.
        scales (`Sequence[int]`): Sides of the scales.
    """

    def __init__(self, codebook_size: int, scales: Sequence[int]):
        self.scales = tuple(scales)
        self.counts = torch.zeros(len(self.scales), codebook_size, dtype=torch.long)

    def update(self, codes: torch.LongTensor) -> None:
        """Count the codes `(batch_size, L)` of a batch."""
        for k, scale_codes in enumerate(codes.split([side * side for side in self.scales], dim=1)):
            self.counts[k] += scale_codes.flatten().bincount(minlength=self.counts.shape[1]).cpu()

    def report(self) -> list[dict[str, float | int]]:
        """
        Of each scale: its `side`, the number of `tokens` there were, the share of the codebook that was `used` and its
        `perplexity`, the number of codes that would be as diverse if all were used equally often.
        """
        rows = []
        for side, counts in zip(self.scales, self.counts):
            shares = counts.double() / counts.sum().clamp_min(1)
            rows.append(
                {
                    "side": side,
                    "tokens": counts.sum().item(),
                    "used": (counts > 0).double().mean().item(),
                    "perplexity": torch.special.entr(shares).sum().exp().item(),
                }
            )
        return rows
