# SPDX-License-Identifier: Apache-2.0
from collections.abc import Callable
from typing import Any

import torch
from diffusers.utils import logging
from tqdm.auto import tqdm

from .data import UnreadableImage, collate
from .random_draws import seeded_generator


logger = logging.get_logger(__name__)

LARGEST_CACHED_BY_DEFAULT = 200


def can_cache(source: Any, random_crop: bool, random_flip: bool) -> bool:
    """Whether the examples of a source are the same each time and can be counted."""
    has_length = hasattr(source, "__len__") and hasattr(source, "__getitem__")
    return has_length and not hasattr(source, "finish_batch") and not (random_crop or random_flip)


def cache_examples(
    source: Any,
    prepare: Callable[[Any, torch.Generator], dict[str, Any]],
    encode: Callable[[dict[str, Any]], dict[str, Any]],
    seed: int = 0,
    on_bad_image: str = "error",
    progress: bool = False,
) -> list[dict[str, Any]]:
    r"""
    All examples of a source in memory, encoded once. Where a picture has several captions, one is chosen for good.

    Args:
        source, prepare: The examples and what to make of them, as in [`ExampleStream`].
        encode (`Callable`): What frozen models make of a batch of one example: tensors and lists of one item each.
        seed (`int`, defaults to `0`): Seed of the run.
        on_bad_image (`str`, defaults to `"error"`): `"error"`, or `"skip"`, which leaves the picture out.
        progress (`bool`, defaults to `False`): Whether to show the progress.

    Returns:
        `list[dict[str, Any]]`: The examples, tensors on the CPU.

    Raises:
        UnreadableImage: If a picture is bad; names the file.
        ValueError: If there is no example.
    """
    examples = []
    for index in tqdm(range(len(source)), desc="Encoding", disable=not progress):
        try:
            example = prepare(source[index], seeded_generator("cpu", seed, "cached", index))
        except UnreadableImage as error:
            if on_bad_image == "error":
                raise
            logger.warning(f"Left out: {error}")
            continue
        encoded = encode(collate([example]))
        examples.append(
            {name: value[0].cpu() if isinstance(value, torch.Tensor) else value[0] for name, value in encoded.items()}
        )
    if not examples:
        raise ValueError("The data set gave no picture that could be read.")
    return examples
