# SPDX-License-Identifier: Apache-2.0
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline
from tqdm.auto import tqdm

from .data_sources import IMAGE_SUFFIXES
from .random_draws import seeded_generator


PRIOR_PREFIX = "prior_"


def list_pictures(folder: str | Path) -> list[Path]:
    """The pictures of a folder by name. Raises `ValueError` if there is no such folder."""
    if not Path(folder).is_dir():
        raise ValueError(f"{folder} is no folder.")
    return sorted(path for path in Path(folder).iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)


class DreamBoothExamples:
    r"""
    Pictures of a subject, with as many of its class beside them: pairs for [`pair_preparer`].

    Args:
        instances (`Sequence`): Examples of the subject.
        classes (`Sequence`, *optional*): Examples of its class.
        minimum (`int`, defaults to `1`): Least number of pairs; pictures are repeated to reach it.
    """

    def __init__(self, instances: Sequence[Any], classes: Sequence[Any] | None = None, minimum: int = 1):
        self.instances = instances
        self.classes = classes
        self.repeats = math.ceil(max(minimum, len(classes or ())) / len(instances))

    def __len__(self) -> int:
        return self.repeats * len(self.instances)

    def __getitem__(self, index: int) -> tuple[Any, Any | None]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        other = self.classes[index % len(self.classes)] if self.classes else None
        return self.instances[index % len(self.instances)], other


def pair_preparer(
    prepare: Callable[[Any, torch.Generator], dict[str, Any]],
    prepare_class: Callable[[Any, torch.Generator], dict[str, Any]],
) -> Callable[[Any, torch.Generator], dict[str, Any]]:
    """What [`ExampleStream`] does with a pair of [`DreamBoothExamples`]: one dict, the class's names with a prefix."""

    def prepare_pair(pair: tuple[Any, Any | None], generator: torch.Generator) -> dict[str, Any]:
        instance, other = pair
        example = prepare(instance, generator)
        if other is None:
            return example
        return example | {f"{PRIOR_PREFIX}{name}": value for name, value in prepare_class(other, generator).items()}

    return prepare_pair


def split_prior(batch: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """A batch of pairs as two batches: of the subject and of its class, the latter empty where there is none."""
    prior = {name.removeprefix(PRIOR_PREFIX): value for name, value in batch.items() if name.startswith(PRIOR_PREFIX)}
    return {name: value for name, value in batch.items() if not name.startswith(PRIOR_PREFIX)}, prior


def draw_class_pictures(
    pipe: DiffusionPipeline,
    accelerator: Accelerator,
    folder: str | Path,
    prompt: str,
    count: int,
    batch_size: int,
    seed: int,
    **options: Any,
) -> list[Path]:
    r"""
    Fill a folder with pictures of a class as the model draws them, up to `count`, shared among the processes. A picture
    follows from the seed and its place in the folder.

    Args:
        pipe (`DiffusionPipeline`): What draws.
        accelerator (`Accelerator`): Of the run.
        folder (`str` or `Path`): The folder; pictures that it holds are kept.
        prompt (`str`): What to draw.
        count (`int`): Number of pictures.
        batch_size (`int`): Pictures to draw at once.
        seed (`int`): Seed of the run.
        options: Further arguments of the pipeline.

    Returns:
        `list[Path]`: All pictures of the folder, at least `count`.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    found = list_pictures(folder)
    accelerator.wait_for_everyone()  # before any process adds to them
    names = {path.stem for path in found}
    places = [place for place in range(count) if f"class-{place:05d}" not in names][: max(0, count - len(found))]
    own = places[accelerator.process_index :: accelerator.num_processes]
    pipe.set_progress_bar_config(disable=True)
    for start in tqdm(range(0, len(own), batch_size), desc="Class pictures", disable=not accelerator.is_main_process):
        batch = own[start : start + batch_size]
        generators = [seeded_generator("cpu", seed, "class picture", place) for place in batch]
        # Blocks compiled for training steps would be compiled anew for each scale.
        with accelerator.autocast(), torch.compiler.set_stance("force_eager"):
            images = pipe(prompt, num_images_per_prompt=len(batch), generator=generators, **options).images
        for place, image in zip(batch, images):
            unfinished = folder / f".class-{place:05d}.unfinished"
            image.save(unfinished, format="PNG")
            unfinished.rename(folder / f"class-{place:05d}.png")
    accelerator.wait_for_everyone()
    return list_pictures(folder)
