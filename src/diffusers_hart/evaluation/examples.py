# SPDX-License-Identifier: Apache-2.0
"""What a pipeline is evaluated on: prompts, pictures, and statements that a checker can hold pictures to."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from ..training.data import collate, finish_batch, is_endless
from ..training.random_draws import seeded_generator


@dataclass
class ExampleGroup:
    r"""
    Examples that are reported together.

    Args:
        name (`str`): What reports call it.
        conditions (`list[str]` or `list[int]`): Prompts, or class labels.
        captions (`list[str]`): What to write under their pictures.
        statements (`list`, *optional*): What the prompts state, for a checker.
        load_images (`Callable`, *optional*):
            Makes the pictures `(batch_size, 3, side, side)` in [-1, 1] of a range of indices, on a device.
        num_images (`int`, defaults to `0`): How many of these there are.
        references (`range`, defaults to the pictures that are reconstructed):
            Which of them generated pictures are compared with.
        are_of_prompts (`bool`, defaults to `False`): Whether picture `i` shows what prompt `i` says.
    """

    name: str
    conditions: Sequence[str | int]
    captions: Sequence[str]
    statements: Sequence[Any] | None = None
    load_images: Callable[[range, torch.device | str], torch.Tensor] | None = None
    num_images: int = 0
    references: range | None = None
    are_of_prompts: bool = False

    def __post_init__(self):
        if self.references is None:
            self.references = range(self.num_images)


def batches(indices: range, batch_size: int) -> list[range]:
    """Ranges of at most `batch_size` indices."""
    return [indices[start : start + batch_size] for start in range(0, len(indices), batch_size)]


def resize_images(images: torch.Tensor, side: int) -> torch.Tensor:
    """Square pictures in float32, resized to `side` pixels with antialiasing where they are of another size."""
    if images.shape[-1] == side:
        return images.float()
    size = (side, side)
    resized = F.interpolate(images.float(), size=size, mode="bicubic", antialias=True, align_corners=False)
    return resized.clamp(-1, 1)


def shapes_group(name: str, dataset: Any, num_images: int, side: int) -> ExampleGroup:
    r"""
    Examples of the procedural data set of shapes. The references of generated pictures are as many further pictures,
    not those of the prompts themselves.

    Args:
        name (`str`): What reports call the group.
        dataset (`ShapesDataset`): Where they come from.
        num_images (`int`): Number of prompts.
        side (`int`): Side of the pictures in pixels.
    """
    examples = [dataset[i] for i in range(num_images)]

    def load_images(indices: range, device: torch.device | str) -> torch.Tensor:
        batch = collate([examples[i] if i < num_images else dataset[i] for i in indices])
        return resize_images(finish_batch(dataset, batch, device)["pixel_values"], side)

    captions = [example["caption"] for example in examples]
    return ExampleGroup(
        name=name,
        conditions=captions,
        captions=captions,
        statements=[dataset.statement(i) for i in range(num_images)],
        load_images=load_images,
        num_images=num_images,
        references=range(num_images, 2 * num_images),
        are_of_prompts=True,
    )


def pictures_group(
    source: Any,
    prepare: Callable[[Any, torch.Generator], dict[str, Any]],
    num_images: int,
    side: int,
    conditions: Sequence[str | int] | None = None,
    captions: Sequence[str] | None = None,
) -> ExampleGroup:
    r"""
    Examples of pictures of one's own. Of twice as many pictures as are wanted, the second half are the references of
    what is generated; of fewer, the pictures that are reconstructed are the references too.

    Args:
        source (`Sequence` or `Iterable`):
            The pictures, from [`~diffusers_hart.training.data_sources.load_image_source`].
        prepare (`Callable`): From [`~diffusers_hart.training.data_sources.image_preparer`], of that source and size.
        num_images (`int`): Number of pictures wanted.
        side (`int`): Side of the pictures in pixels.
        conditions (`list[str]` or `list[int]`, *optional*): Prompts or labels instead of those of the pictures.
        captions (`list[str]`, *optional*): What to write under what is drawn of `conditions`.

    Raises:
        ValueError: If there are fewer than two pictures, or they have neither captions nor labels and none are given.
    """
    if is_endless(source):
        raw_examples = [source[i] for i in range(2 * num_images)]
    elif hasattr(source, "__len__") and hasattr(source, "__getitem__"):
        raw_examples = [source[i] for i in range(min(len(source), 2 * num_images))]
    else:
        raw_examples = list(itertools.islice(source, 2 * num_images))
    if len(raw_examples) < 2:
        raise ValueError(f"Two reference pictures or more are needed; the data have {len(raw_examples)}.")

    def example(index: int) -> dict[str, Any]:
        return prepare(raw_examples[index], seeded_generator("cpu", index))

    def load_images(indices: range, device: torch.device | str) -> torch.Tensor:
        batch = finish_batch(source, collate([example(index) for index in indices]), device)
        return resize_images(batch["pixel_values"].to(device), side)

    count = min(num_images, len(raw_examples))
    own_conditions = conditions is None
    if own_conditions:
        examples = [example(index) for index in range(count)]
        column = "label" if "label" in examples[0] else "caption"
        if column not in examples[0]:
            raise ValueError("The reference pictures have neither captions nor labels: give prompts.")
        conditions = [example[column] for example in examples]
    return ExampleGroup(
        name="pictures",
        conditions=conditions[:num_images],
        captions=[str(caption) for caption in (captions or conditions)[:num_images]],
        load_images=load_images,
        num_images=count,
        references=range(count, 2 * count) if len(raw_examples) == 2 * num_images else None,
        are_of_prompts=own_conditions,
    )
