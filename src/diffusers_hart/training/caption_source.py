# SPDX-License-Identifier: Apache-2.0
from collections.abc import Callable, Iterator
from typing import Any

import torch

from .data_sources import choose_caption


def captions_alone(source: Any, caption_column: str = "text") -> Any:
    """
    The source without what makes its pictures: their columns are not read, and its `finish_batch` is not called.

    Args:
        source: What [`load_image_source`] gives.
        caption_column (`str`, defaults to `"text"`): Column of the captions, where there are columns.
    """
    if hasattr(source, "select_columns"):
        return source.select_columns([caption_column])
    if not hasattr(source, "finish_batch"):
        return source
    if not hasattr(source, "__getitem__"):
        return _InOrder(source)
    return _SizedItems(source) if hasattr(source, "__len__") else _Items(source)


def caption_preparer(caption_column: str = "text") -> Callable[[Any, torch.Generator], dict[str, Any]]:
    """
    What [`ExampleStream`] does with an example of [`captions_alone`]: a dict of its `caption`. Examples are texts, pairs
    of a picture and a caption, or dicts with the captions under `caption_column` or `"caption"`; of several captions
    one is chosen.
    """

    def prepare(example: Any, generator: torch.Generator) -> dict[str, Any]:
        if isinstance(example, dict):
            example = example[caption_column] if caption_column in example else example.get("caption")
        elif isinstance(example, (tuple, list)):
            example = example[1] if len(example) > 1 else None
        return {"caption": choose_caption(example, None, generator)}

    return prepare


class _Items:
    def __init__(self, source: Any):
        self.source = source

    def __getitem__(self, index: int) -> Any:
        return self.source[index]


class _SizedItems(_Items):
    def __len__(self) -> int:
        return len(self.source)


class _InOrder:
    def __init__(self, source: Any):
        self.source = source

    def __iter__(self) -> Iterator[Any]:
        return iter(self.source)
