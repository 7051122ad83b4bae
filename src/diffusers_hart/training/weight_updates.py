# SPDX-License-Identifier: Apache-2.0
import argparse
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.nn as nn
from accelerate import Accelerator, DistributedType
from diffusers import ModelMixin
from diffusers.optimization import get_scheduler
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, get_wsd_schedule

from .ema import CheckpointedEMA
from .gradient_graphs import GradientGraphs
from .train_loop import create_optimizer


MODELS = (ModelMixin, PreTrainedModel)


def create_lr_scheduler(
    args: argparse.Namespace, optimizer: torch.optim.Optimizer
) -> torch.optim.lr_scheduler.LRScheduler:
    r"""
    The schedule of the learning rate, from the arguments of [`add_training_arguments`]. That of `warmup_stable_decay`
    grows and falls linearly, to 0 after the last step.

    Raises:
        ValueError: If its decay has no length or no room, or if another schedule was given one.
    """
    if args.lr_scheduler != "warmup_stable_decay":
        if args.lr_decay_steps is not None:
            raise ValueError(
                f"--lr_scheduler {args.lr_scheduler} takes no --lr_decay_steps; warmup_stable_decay does."
            )
        return get_scheduler(
            args.lr_scheduler,
            optimizer,
            num_warmup_steps=args.lr_warmup_steps,
            num_training_steps=args.max_train_steps,
        )
    if args.lr_decay_steps is None:
        raise ValueError(
            "--lr_scheduler warmup_stable_decay needs --lr_decay_steps, the number of last steps that decay."
        )
    if args.lr_warmup_steps + args.lr_decay_steps > args.max_train_steps:
        raise ValueError(
            f"{args.lr_warmup_steps} --lr_warmup_steps and {args.lr_decay_steps} --lr_decay_steps are more than the "
            f"{args.max_train_steps} steps of the run."
        )
    return get_wsd_schedule(
        optimizer,
        num_warmup_steps=args.lr_warmup_steps,
        num_decay_steps=args.lr_decay_steps,
        num_training_steps=args.max_train_steps,
        decay_type="linear",
    )


class WeightUpdates:
    r"""
    What changes the weights of a training module: the optimizer, its learning rate and, with `--use_ema`, their
    moving average. All are prepared by or registered with the accelerator, so that its checkpoints hold them.

    Args:
        args (`argparse.Namespace`): The arguments of [`add_training_arguments`].
        accelerator (`Accelerator`): Of the run.
        module (`nn.Module`):
            The module, whose children are the models of diffusers or transformers, not prepared yet; `module` of this
            object is the prepared one.

    Raises:
        ValueError: If averages are asked for under FSDP 1, whose shards cannot be averaged one by one.
    """

    def __init__(self, args: argparse.Namespace, accelerator: Accelerator, module: nn.Module):
        self.accelerator = accelerator
        self.max_grad_norm = args.max_grad_norm
        self.models = {name: model for name, model in module.named_children() if isinstance(model, MODELS)}
        self.is_sharded = accelerator.distributed_type == DistributedType.FSDP
        if args.use_ema and self.is_sharded and not accelerator.is_fsdp2:
            raise ValueError("--use_ema with FSDP needs `fsdp_version: 2` in the configuration of accelerate.")

        optimizer = create_optimizer(args, module.parameters(), accelerator)
        # Not prepared: a prepared schedule advances once a process and would go by another clock than the data.
        self.lr_scheduler = create_lr_scheduler(args, optimizer)
        if accelerator.is_fsdp2:  # would cast parameters instead, also those of layers that must stay precise
            accelerator.state.fsdp_plugin.mixed_precision_policy = None
            module.forward = accelerator.autocast()(module.forward)
        self.module, self.optimizer = accelerator.prepare(module, optimizer)
        self.graphs = GradientGraphs(accelerator, self.module) if getattr(args, "cuda_graphs", False) else None
        accelerator.register_for_checkpointing(self.lr_scheduler)
        # As it is now: phases of a training may leave out some for a while, whose averages stay.
        self.trained = [parameter for parameter in self.module.parameters() if parameter.requires_grad]
        self.ema = None
        if args.use_ema:
            foreach = not self.is_sharded  # sharded tensors have no copies of many at once
            self.ema = CheckpointedEMA(self.trained, decay=args.ema_decay, foreach=foreach)
            accelerator.register_for_checkpointing(self.ema)

    def step(
        self,
        compute: Callable[[dict[str, Any]], dict[str, torch.Tensor]],
        batch: dict[str, Any],
        kind: Hashable = None,
    ) -> dict[str, torch.Tensor]:
        r"""
        One micro-batch: its losses, their gradient and, at the last one of a step, the update of the weights.

        Args:
            compute (`Callable`): Makes losses of shape `()`, `loss` among them, of a batch.
            batch (`dict[str, Any]`): The micro-batch.
            kind (`Hashable`, *optional*): With `--cuda_graphs`, batches of one kind are computed in the same way.

        Returns:
            `dict[str, torch.Tensor]`: The losses and, after an update, its figures.
        """
        if self.graphs is not None:
            return self.graphs(compute, batch, kind) | self._apply()
        with self.accelerator.accumulate(self.module):
            losses = compute(batch)
            return losses | self.update(losses["loss"])

    def update(self, loss: torch.Tensor) -> dict[str, torch.Tensor]:
        """
        The gradient of a micro-batch's loss and, at the last one of a step, the update of the weights. To be called
        within `accelerator.accumulate`.

        Returns:
            `dict[str, torch.Tensor]`: Figures to log after an update, otherwise none.
        """
        self.accelerator.backward(loss)
        return self._apply() if self.accelerator.sync_gradients else {}

    def _apply(self) -> dict[str, torch.Tensor]:
        """Update the weights by their gradients."""
        learning_rate = self.lr_scheduler.get_last_lr()[0]
        figures = {"learning_rate": torch.full((), learning_rate, device=self.accelerator.device)}
        grad_norm = self.accelerator.clip_grad_norm_(self.module.parameters(), self.max_grad_norm)
        if self.accelerator.scaler is None:  # with fp16 a norm that is not finite is a step that the scaler leaves out
            figures["grad_norm"] = grad_norm.full_tensor() if isinstance(grad_norm, DTensor) else grad_norm
        self.optimizer.step()
        self.lr_scheduler.step()
        if self.graphs is None:
            self.optimizer.zero_grad()
        if self.ema is not None:
            self.ema.step(self.trained)
        return figures

    @contextmanager
    def for_inference(self) -> Iterator[dict[str, ModelMixin | PreTrainedModel]]:
        """
        The models as they would be saved now: with their averages, if there are any, and whole. Every process must
        enter this context; the models are given to the main process, the others get none.
        """
        averaged = nullcontext() if self.ema is None else self.ema.applied_to(self.trained)
        with averaged:
            models = self._gathered() if self.is_sharded else self.models
            yield models if self.accelerator.is_main_process else {}

    def _gathered(self) -> dict[str, ModelMixin | PreTrainedModel]:
        """Unsharded copies, on the main process."""
        state_dict = self.accelerator.get_state_dict(self.module)
        if not self.accelerator.is_main_process:
            return {}
        copies = {}
        for name, model in self.models.items():
            make = type(model).from_config if isinstance(model, ModelMixin) else type(model)
            copies[name] = make(model.config)
            prefix = f"{name}."
            weights = {key.removeprefix(prefix): w for key, w in state_dict.items() if key.startswith(prefix)}
            copies[name].load_state_dict(weights)
            copies[name].to(self.accelerator.device)
        return copies
