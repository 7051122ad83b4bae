# SPDX-License-Identifier: Apache-2.0
import argparse
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..models import HybridTokenizer
from ..schedulers import HARTScheduler
from .data_sources import image_preparer, load_image_source
from .precomputed_targets import load_precomputed_targets, precomputed_preparer
from .teacher_forcing import TeacherForcingTargets, teacher_forcing_targets


def training_scales(
    scheduler: HARTScheduler, vae: HybridTokenizer, resolution: int | None, sample_size: int
) -> tuple[int, ...]:
    """
    The schedule of scales of a training resolution, by default that of latents of side `sample_size`.

    Raises:
        ValueError: If the scheduler has no schedule for that resolution.
    """
    resolution = sample_size * vae.spatial_factor if resolution is None else resolution
    known = {schedule[-1] * vae.spatial_factor: tuple(schedule) for schedule in scheduler.config.schedules}
    if resolution not in known:
        raise ValueError(
            f"--resolution {resolution} has no schedule of scales; this model has some for "
            f"{', '.join(str(side) for side in sorted(known))} pixels a side."
        )
    return known[resolution]


def open_training_data(
    args: argparse.Namespace,
    vae: HybridTokenizer,
    scales: Sequence[int],
    column: str,
    precomputed_columns: Sequence[str],
    caption_channels: int | None = None,
) -> Any:
    """
    The source of a training's examples: pictures with captions or labels in `column`, or pre-computed targets, which
    must have one of `precomputed_columns`; embeddings of captions among them must be `caption_channels` wide.

    Raises:
        ValueError: As [`load_image_source`] and [`load_precomputed_targets`]; and if the arguments contradict each
            other or a column is missing.
    """
    if args.precomputed_data_dir is None:
        return load_image_source(
            args.dataset_name,
            args.dataset_config_name,
            args.train_data_dir,
            args.train_shards,
            args.train_iterable,
            args.image_column,
            column,
            args.cache_dir,
        )
    if any((args.dataset_name, args.train_data_dir, args.train_shards, args.train_iterable)):
        raise ValueError("--precomputed_data_dir takes the place of pictures: name no other source of data.")
    if args.random_crop or args.random_flip:
        raise ValueError("Targets that were computed before can be neither cropped nor flipped at random.")
    source = load_precomputed_targets(args.precomputed_data_dir, vae, scales)
    if not set(precomputed_columns) & set(source.column_names):
        raise ValueError(
            f"The targets in {args.precomputed_data_dir} have no column {' or '.join(precomputed_columns)}; they have "
            f"{source.column_names}."
        )
    if "prompt_embeds" in source.column_names and source.features["prompt_embeds"].shape[-1] != caption_channels:
        raise ValueError(
            f"The captions in {args.precomputed_data_dir} are embedded in {source.features['prompt_embeds'].shape[-1]} "
            f"channels, but the transformer reads {caption_channels}."
        )
    return source


def training_preparer(
    args: argparse.Namespace,
    source: Any,
    vae: HybridTokenizer,
    scales: Sequence[int],
    column: str,
    num_classes: int | None = None,
) -> Callable[[Any, torch.Generator], dict[str, Any]]:
    """What [`ExampleStream`] does with an example of `source`, which [`open_training_data`] gave."""
    if args.precomputed_data_dir is not None:
        return precomputed_preparer(num_classes)
    return image_preparer(
        scales[-1] * vae.spatial_factor,
        args.image_column,
        column,
        args.random_crop,
        args.random_flip,
        num_classes,
        source,
    )


def batch_targets(batch: dict[str, Any], vae: HybridTokenizer, scales: Sequence[int]) -> TeacherForcingTargets:
    """The targets of a batch of pictures or of pre-computed targets, on the tokenizer's device."""
    if "codes" in batch:
        latents, codes = (batch[name].to(vae.device, non_blocking=True) for name in ("latents", "codes"))
        return teacher_forcing_targets(vae, scales, latents=latents, codes=codes)
    images = batch["pixel_values"].to(vae.device, non_blocking=True).to(vae.dtype)
    return teacher_forcing_targets(vae, scales, images=images)
