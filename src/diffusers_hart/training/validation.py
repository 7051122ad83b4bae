# SPDX-License-Identifier: Apache-2.0
import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline
from diffusers.utils import make_image_grid

from .random_draws import seeded_generator


def log_image_grid(
    accelerator: Accelerator, images: list[PIL.Image.Image], columns: int, output_dir: str | Path, step: int
) -> Path:
    """
    Save pictures as one grid, `{output_dir}/validation/step-{step}.png`, and give them to the trackers that take
    pictures. Only for the main process.

    Args:
        accelerator (`Accelerator`): Its trackers are used.
        images (`list[PIL.Image.Image]`): The pictures, row by row.
        columns (`int`): Number of pictures in a row.
        output_dir (`str` or `Path`): Folder of the run.
        step (`int`): Number of optimizer steps so far.

    Returns:
        `Path`: The file.
    """
    path = Path(output_dir) / "validation" / f"step-{step:06d}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    make_image_grid(images, rows=len(images) // columns, cols=columns).save(path)
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            pixels = np.stack([np.asarray(image) for image in images])
            tracker.log_images({"validation": pixels}, step=step, dataformats="NHWC")
        elif tracker.name == "wandb":
            tracker.log_images({"validation": images}, step=step)
    return path


def log_validation(
    args: argparse.Namespace,
    accelerator: Accelerator,
    pipe: DiffusionPipeline,
    conditions: Sequence[dict[str, Any]],
    step: int,
) -> Path:
    r"""
    Draw `--num_validation_images` pictures of each condition, from the same random numbers each time, a row of a grid
    each, and log it as [`log_image_grid`] does.

    Args:
        args (`argparse.Namespace`): The arguments of [`add_hart_arguments`] and [`add_training_arguments`].
        accelerator (`Accelerator`): Its precision and trackers are used.
        pipe (`DiffusionPipeline`): What draws.
        conditions (`Sequence[dict[str, Any]]`): Arguments of the pipeline, for `--num_validation_images` pictures each.
        step (`int`): Number of optimizer steps so far.

    Returns:
        `Path`: The file of the grid.
    """
    pipe.set_progress_bar_config(disable=True)
    images = []
    for condition in conditions:
        places = range(args.num_validation_images)
        generators = [seeded_generator("cpu", args.seed, "validation", place) for place in places]
        # Blocks compiled for training steps would be compiled anew for each scale.
        with accelerator.autocast(), torch.compiler.set_stance("force_eager"):
            drawn = pipe(**condition, guidance_scale=args.validation_guidance_scale, generator=generators)
        images += drawn.images
    return log_image_grid(accelerator, images, args.num_validation_images, args.output_dir, step)
