# SPDX-License-Identifier: Apache-2.0
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from torch.distributed.tensor import DTensor, distribute_tensor


class CheckpointedEMA(EMAModel):
    """
    diffusers' `EMAModel` as accelerate's checkpoints need it: the averages are saved whole, also where the parameters
    are sharded over processes (FSDP 2), and loaded back to where the parameters are. The arguments are the same.
    """

    def state_dict(self) -> dict[str, Any]:
        whole = (value.full_tensor() if isinstance(value, DTensor) else value for value in self.shadow_params)
        return {**super().state_dict(), "shadow_params": [value.cpu() for value in whole]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        averages = self.shadow_params
        super().load_state_dict(state_dict)
        self.shadow_params = [
            distribute_tensor(loaded.to(average.device), average.device_mesh, average.placements)
            if isinstance(average, DTensor)
            else loaded.to(average.device)
            for loaded, average in zip(self.shadow_params, averages)
        ]

    @contextmanager
    def applied_to(self, parameters: Iterable[torch.nn.Parameter]) -> Iterator[None]:
        """Within this context the parameters hold their averages."""
        parameters = list(parameters)
        self.store(parameters)
        self.copy_to(parameters)
        try:
            yield
        finally:
            self.restore(parameters)
