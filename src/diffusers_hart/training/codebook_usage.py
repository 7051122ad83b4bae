# SPDX-License-Identifier: Apache-2.0
import itertools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn as nn


class CodebookUsage:
    r"""
    Which codes are used at which scale, and for how many steps each has not been used at any. A codebook that is
    trained from scratch tends to collapse, on the coarse scales first. It can be registered with accelerate for
    checkpoints.

    Args:
        codebook_size (`int`): Number of codes.
        scales (`Sequence[int]`): Sides of the scales.
    """

    def __init__(self, codebook_size: int, scales: Sequence[int]):
        self.scales = tuple(scales)
        self.used = torch.zeros(len(self.scales), codebook_size, dtype=torch.bool)
        self.unused_steps = torch.zeros(codebook_size, dtype=torch.long)

    def update(self, codes: torch.LongTensor) -> None:
        """Take note of one step's codes `(batch_size, L)`, those of all processes."""
        # On the codes' device: a step does not wait for them.
        self.used, self.unused_steps = self.used.to(codes.device), self.unused_steps.to(codes.device)
        used = torch.zeros_like(self.used)
        scale_of_token = [k for k, side in enumerate(self.scales) for _ in range(side * side)]
        used[torch.tensor(scale_of_token).to(codes.device, non_blocking=True).expand_as(codes), codes] = True
        self.used |= used
        self.unused_steps = (self.unused_steps + 1).masked_fill(used.any(0), 0)

    def report(self) -> dict[str, float]:
        """The share of codes that each scale has used since the last report, as `codebook_usage/{side}x{side}`."""
        shares = self.used.float().mean(1).tolist()
        self.used.zero_()
        return {f"codebook_usage/{side}x{side}": share for side, share in zip(self.scales, shares)}

    def restart(
        self,
        codebook: nn.Embedding,
        scale_residuals: torch.Tensor,
        steps: int,
        generator: torch.Generator,
    ) -> int:
        r"""
        Give codes that no scale has used for a while a new start: they become what the scales were just asked to code,
        every scale in turn, no vector twice.

        Args:
            codebook (`nn.Embedding`): The codes' vectors, changed in place.
            scale_residuals (`torch.Tensor` of shape `(batch_size, L, channels)`):
                What the scales were asked to code, of all processes.
            steps (`int`): A code that was not used in the last so many steps is restarted.
            generator (`torch.Generator`): On the CPU; decides what they become.

        Returns:
            `int`: Number of codes that were restarted, at most that of the vectors given.
        """
        unused = (self.unused_steps >= steps).nonzero().flatten()
        if len(unused) == 0:
            return 0
        candidates = [
            residuals.flatten(0, 1)
            for residuals in scale_residuals.split([side * side for side in self.scales], dim=1)
        ]
        # Each scale's vectors in random order; the first of every scale come before the second of any.
        orders = [torch.randperm(len(vectors), generator=generator)[: len(unused)] for vectors in candidates]
        turns = sorted((turn, k) for k, order in enumerate(orders) for turn in range(len(order)))[: len(unused)]
        unused = unused[: len(turns)]
        starts = list(itertools.accumulate((len(vectors) for vectors in candidates), initial=0))
        chosen = torch.tensor([starts[k] + orders[k][turn].item() for turn, k in turns])
        with torch.no_grad():
            chosen_vectors = torch.cat(candidates)[chosen.to(candidates[0].device)]
            codebook.weight[unused] = chosen_vectors.to(codebook.weight.dtype)
        self.unused_steps[unused] = 0
        return len(unused)

    def state_dict(self) -> dict[str, Any]:
        return {"used": self.used.cpu(), "unused_steps": self.unused_steps.cpu()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.used, self.unused_steps = state_dict["used"], state_dict["unused_steps"]
