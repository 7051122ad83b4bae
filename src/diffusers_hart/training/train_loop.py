# SPDX-License-Identifier: Apache-2.0
import argparse
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import KwargsHandler, ProjectConfiguration
from diffusers.utils import logging
from tqdm.auto import tqdm

from .checkpoints import resume_from_checkpoint, save_checkpoint
from .data import ExampleStream, collate, finish_batch
from .metrics_file import MetricsFile


logger = logging.get_logger(__name__)


class NonFiniteLoss(RuntimeError):
    """The loss is no longer a number; the last checkpoint is whole."""


def create_accelerator(args: argparse.Namespace, kwargs_handlers: Sequence[KwargsHandler] = ()) -> Accelerator:
    r"""
    The accelerator of a run, from the arguments of [`add_training_arguments`]. Besides the tracker that was asked for it
    logs to `metrics.jsonl` in the run's folder. `kwargs_handlers` are accelerate's own.

    Raises:
        ImportError: If the tracker is not installed.
    """
    trackers = [MetricsFile(Path(args.output_dir) / "metrics.jsonl")]
    if args.report_to is not None:
        trackers.append(args.report_to)
    accelerator = Accelerator(
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        mixed_precision=args.mixed_precision,
        log_with=trackers,
        kwargs_handlers=list(kwargs_handlers),
        project_config=ProjectConfiguration(
            project_dir=args.output_dir, logging_dir=f"{args.output_dir}/{args.logging_dir}"
        ),
    )
    if len(accelerator.log_with) < len(trackers):
        raise ImportError(f"--report_to {args.report_to} needs a package that is not installed.")
    simple = {k: v for k, v in vars(args).items() if isinstance(v, (int, float, str, bool)) and k != "hub_token"}
    accelerator.init_trackers("diffusers-hart", config=simple)
    if args.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
    return accelerator


def create_optimizer(args: argparse.Namespace, parameters: Any, accelerator: Accelerator) -> torch.optim.Optimizer:
    """AdamW from the arguments; weights decay, biases, norms and other vectors do not."""
    learning_rate = args.learning_rate
    if args.scale_lr:
        learning_rate *= args.train_batch_size * args.gradient_accumulation_steps * accelerator.num_processes / 256
    if args.use_8bit_adam:
        try:
            from bitsandbytes.optim import AdamW8bit as optimizer_class
        except ImportError as error:
            raise ImportError("--use_8bit_adam needs bitsandbytes: pip install bitsandbytes") from error
    else:
        optimizer_class = partial(torch.optim.AdamW, fused=True if accelerator.device.type == "cuda" else None)
    parameters = [parameter for parameter in parameters if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": args.adam_weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return optimizer_class(
        [group for group in groups if group["params"]],
        lr=learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        eps=args.adam_epsilon,
    )


def mean_figures(figures: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The figures of a step from those of its micro-batches, each the mean over the micro-batches that have it."""
    names = dict.fromkeys(name for of_one in figures for name in of_one)
    values = {name: [of_one[name].detach().float() for of_one in figures if name in of_one] for name in names}
    return {name: torch.stack(found).mean() for name, found in values.items()}


def train(
    args: argparse.Namespace,
    accelerator: Accelerator,
    source: Any,
    prepare: Callable[[Any, torch.Generator], dict[str, Any]],
    training_step: Callable[[list[dict[str, Any]], int], dict[str, torch.Tensor]],
    validate: Callable[[int], None] | None = None,
) -> int:
    r"""
    Run the steps of a training: the data in its order, resuming, progress, trackers, checkpoints and validation. What a
    step does is the caller's.

    Args:
        args (`argparse.Namespace`): The arguments of [`add_training_arguments`] and [`add_data_arguments`].
        accelerator (`Accelerator`): Everything that checkpoints hold must be prepared or registered with it.
        source, prepare:
            The examples and what to make of them, as in [`ExampleStream`]; batches go through [`finish_batch`].
        training_step (`Callable`):
            Takes the micro-batches of one step and the number of steps before it; updates the weights and returns
            figures to log, of shape `()`: `loss` among them and, where it must be finite too, `grad_norm`.
        validate (`Callable`, *optional*):
            Called on every process, since sharded weights are gathered by all, every `validation_steps` steps and at the
            end, with the number of steps.

    Returns:
        `int`: Number of steps the run has made.

    Raises:
        NonFiniteLoss: If the loss or `grad_norm` is not finite. Nothing is saved then; the last checkpoint stays.
    """
    first_step = resume_from_checkpoint(accelerator, args.output_dir, args.resume_from_checkpoint)
    micro_batch = args.train_batch_size * accelerator.num_processes
    stream = ExampleStream(
        source,
        prepare,
        args.train_batch_size,
        accelerator.process_index,
        accelerator.num_processes,
        args.seed,
        start=first_step * micro_batch * args.gradient_accumulation_steps,
        on_bad_image=args.on_bad_image,
    )
    loader = torch.utils.data.DataLoader(
        stream,
        args.train_batch_size,
        collate_fn=collate,
        num_workers=args.dataloader_num_workers,
        pin_memory=accelerator.device.type == "cuda",
        drop_last=True,
    )
    batches: Iterator[dict[str, Any]] = iter(loader)
    skipped = 0
    progress_bar = tqdm(
        initial=first_step,
        total=args.max_train_steps,
        desc="Steps",
        disable=not accelerator.is_local_main_process,
    )
    for step in range(first_step, args.max_train_steps):
        micro_batches = [
            finish_batch(source, next(batches), accelerator.device, args.resolution)
            for _ in range(args.gradient_accumulation_steps)
        ]
        logs = training_step(micro_batches, step)
        done = step + 1
        # Filled on the device: a copy would wait for it, and reading the figures below is to be the only wait.
        skipped_here = sum(batch["skipped"] for batch in micro_batches)
        skipped_here = torch.full((), float(skipped_here), device=accelerator.device)
        values = torch.stack([*(value.detach().float() for value in logs.values()), skipped_here])
        *means, mean_skipped = accelerator.reduce(values, reduction="mean").tolist()
        skipped += round(mean_skipped * accelerator.num_processes)
        logged = {**dict(zip(logs, means)), "skipped_images": skipped}
        if done % args.logging_steps == 0 or done == args.max_train_steps or step == first_step:
            accelerator.log(logged, step=done)
            progress_bar.set_postfix({name: f"{value:.4g}" for name, value in logged.items()})
        not_finite = [name for name in ("loss", "grad_norm") if not math.isfinite(logged.get(name, 0.0))]
        if not_finite:
            raise NonFiniteLoss(
                f"`{not_finite[0]}` of step {done} is not finite. Training stopped; resume from the last checkpoint with "
                "another precision or seed, or start anew with a lower learning rate."
            )
        progress_bar.update()
        if done % args.checkpointing_steps == 0 or done == args.max_train_steps:
            save_checkpoint(accelerator, args.output_dir, done, args.checkpoints_total_limit)
        if validate is not None and (done % args.validation_steps == 0 or done == args.max_train_steps):
            validate(done)
            accelerator.wait_for_everyone()
    progress_bar.close()
    if skipped:
        logger.warning(f"{skipped} unreadable pictures were skipped.")
    return max(first_step, args.max_train_steps)
