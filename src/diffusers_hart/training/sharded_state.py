# SPDX-License-Identifier: Apache-2.0
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.checkpointing import (
    load_accelerator_state,
    load_custom_state,
    save_accelerator_state,
    save_custom_state,
)
from accelerate.utils import SAFE_WEIGHTS_NAME
from safetensors.torch import load_file
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.tensor import DTensor, distribute_tensor


class WholeOptimizer:
    """
    The state of an optimizer of sharded parameters (FSDP 2) as it is where nothing is sharded, numbered by the place of
    the parameters. Every process must take part.

    Args:
        optimizer (`torch.optim.Optimizer`): The optimizer, or accelerate's wrapper of it.
        keeps (`bool`): Whether this process keeps what is gathered.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, keeps: bool):
        self.optimizer = optimizer
        self.keeps = keeps

    def state_dict(self) -> dict[str, Any]:
        state_dict = self.optimizer.state_dict()
        state = {}
        for number, values in state_dict["state"].items():
            state[number] = {}
            for name, value in values.items():
                value = value.full_tensor() if isinstance(value, DTensor) else value
                if self.keeps:
                    state[number][name] = value.cpu() if isinstance(value, torch.Tensor) else value
        return {**state_dict, "state": state}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        state = {}
        for number, values in state_dict["state"].items():
            parameter = parameters[number]
            state[number] = {
                name: distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)
                if isinstance(value, torch.Tensor) and value.shape == parameter.shape
                else value
                for name, value in values.items()
            }
        self.optimizer.load_state_dict({**state_dict, "state": state})


def save_sharded_state(accelerator: Accelerator, folder: Path) -> None:
    """
    What `accelerator.save_state` saves, of sharded models (FSDP 2) in the files it writes of whole ones. accelerate has
    files of its own for shards, which no other kind of run reads.
    """
    folder.mkdir(parents=True, exist_ok=True)
    save_accelerator_state(
        folder,
        [accelerator.get_state_dict(model) for model in accelerator._models],
        [WholeOptimizer(optimizer, accelerator.is_main_process) for optimizer in accelerator._optimizers],
        accelerator._schedulers,
        accelerator._dataloaders,
        accelerator.process_index,
        accelerator.step,
        accelerator.scaler,
    )
    for i, registered in enumerate(accelerator._custom_objects):
        save_custom_state(registered, folder, i)


def load_sharded_state(accelerator: Accelerator, folder: Path) -> None:
    """What `accelerator.load_state` loads, into sharded models (FSDP 2) from files of whole ones."""
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    for i, model in enumerate(accelerator._models):
        file = folder / (SAFE_WEIGHTS_NAME if i == 0 else SAFE_WEIGHTS_NAME.replace(".", f"_{i}."))
        set_model_state_dict(model, load_file(file) if accelerator.is_main_process else {}, options=options)
    load_accelerator_state(
        folder,
        [],
        [WholeOptimizer(optimizer, accelerator.is_main_process) for optimizer in accelerator._optimizers],
        accelerator._schedulers,
        accelerator._dataloaders,
        accelerator.process_index,
        accelerator.scaler,
    )
    for i, registered in enumerate(accelerator._custom_objects):
        load_custom_state(registered, folder, i)
