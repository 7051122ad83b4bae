# SPDX-License-Identifier: Apache-2.0
import io
import itertools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageOps
import torch
from diffusers.utils import logging

from .random_draws import seeded_generator


logger = logging.get_logger(__name__)

MOST_SKIPPED_OF_ENDLESS = 100


class UnreadableImage(ValueError):
    """A picture that cannot be opened or is cut short; says which."""


def image_name(image: Any) -> str:
    """What to call a picture in a message: its path, where it has one."""
    if isinstance(image, dict):
        image = image.get("path")
    elif isinstance(image, PIL.Image.Image):
        image = getattr(image, "filename", None)
    return str(image) if image and not isinstance(image, bytes) else "a picture without a name"


def read_image(image: PIL.Image.Image | dict[str, Any] | str | Path | bytes) -> PIL.Image.Image:
    """
    An upright RGB picture from what data sets hold: a PIL image, a path, bytes, or the undecoded form of `datasets`, a
    dict of `path` and `bytes`.

    Raises:
        UnreadableImage: If it cannot be opened or is cut short; names the file.
    """
    content = (image["bytes"] or image["path"]) if isinstance(image, dict) else image
    try:
        if not isinstance(content, PIL.Image.Image):
            content = PIL.Image.open(io.BytesIO(content) if isinstance(content, bytes) else content)
        return PIL.ImageOps.exif_transpose(content).convert("RGB")
    except (OSError, SyntaxError, ValueError, PIL.Image.DecompressionBombError) as error:
        raise UnreadableImage(f"{image_name(image)} is not a readable picture: {error}") from error


def image_to_tensor(
    image: PIL.Image.Image,
    resolution: int,
    generator: torch.Generator,
    random_crop: bool = False,
    random_flip: bool = False,
) -> torch.Tensor:
    """
    A square tensor `(3, resolution, resolution)` in [-1, 1]: the shorter side is resized to `resolution`, the longer
    one cropped in its middle or at random.
    """
    scale = resolution / min(image.size)
    size = tuple(max(resolution, round(side * scale)) for side in image.size)
    image = image.resize(size, PIL.Image.Resampling.LANCZOS) if size != image.size else image
    *crop, flip = torch.rand(3, generator=generator).tolist()
    crop_x, crop_y = crop if random_crop else (0.5, 0.5)
    left, top = round(crop_x * (size[0] - resolution)), round(crop_y * (size[1] - resolution))
    image = image.crop((left, top, left + resolution, top + resolution))
    if random_flip and flip < 0.5:
        image = image.transpose(PIL.Image.Transpose.FLIP_LEFT_RIGHT)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1


def is_endless(source: Any) -> bool:
    """Whether a source gives an example for each position, however far: it has items, but no length."""
    has_items = hasattr(source, "__getitem__") and not hasattr(source, "__len__")
    return has_items and not isinstance(source, torch.utils.data.IterableDataset)  # which inherits an item of its own


class ExampleStream(torch.utils.data.IterableDataset):
    r"""
    An endless stream of examples in an order that depends on the seed alone. Position `p` of the stream is the `p`-th
    sample of the whole run; a process gets every `world_size`-th block of `batch_size` positions, so that the processes
    together see what a single one with the global batch would, and a run that is resumed goes on where it was.

    Args:
        source (`Sequence` or `Iterable`):
            The examples. One with a length and items is shuffled anew each epoch; one with items alone is endless, and
            item `p` is the example of position `p`; any other is read in its own order, again and again.
        prepare (`Callable`):
            Makes a dict of tensors and strings of one example and a generator for its augmentation; may raise
            [`UnreadableImage`].
        batch_size (`int`): Number of examples in a block.
        rank (`int`, defaults to `0`), world_size (`int`, defaults to `1`): Which process this is, of how many.
        seed (`int`, defaults to `0`): Seed of the run.
        start (`int`, defaults to `0`): Number of positions, of all processes, that are over already.
        shuffle (`bool`, defaults to `True`): Whether to shuffle a source that has items.
        on_bad_image (`str`, defaults to `"error"`):
            `"error"`, or `"skip"`: the next picture takes its place (in a source without items the last good one) and
            the example's `skipped` counts it. In an endless source one of the next 100 must be good.

    Raises:
        ValueError: If the source is too small for one batch of all processes.
    """

    def __init__(
        self,
        source: Any,
        prepare: Callable[[Any, torch.Generator], dict[str, Any]],
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        start: int = 0,
        shuffle: bool = True,
        on_bad_image: str = "error",
    ):
        super().__init__()
        if on_bad_image not in ("error", "skip"):
            raise ValueError(f"`on_bad_image` must be 'error' or 'skip', not {on_bad_image!r}.")
        if start % (batch_size * world_size):
            raise ValueError(f"`start`={start} is not a whole number of batches of {batch_size * world_size}.")
        has_length = hasattr(source, "__len__") and hasattr(source, "__getitem__")
        self.has_items = has_length or is_endless(source)
        self.length = len(source) if has_length else None
        self.source = source
        self.prepare = prepare
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size
        self.seed = seed
        self.start = start
        self.shuffle = shuffle
        self.on_bad_image = on_bad_image
        if self.length is not None:
            self._check_size(self.length)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        last_good = None
        most_skipped = 0 if not self.has_items else MOST_SKIPPED_OF_ENDLESS if self.length is None else self.length
        for position, raw in self._own_positions():
            skipped = 0
            while True:
                try:
                    item = self._item(position, skipped) if self.has_items else raw
                    example = self.prepare(item, seeded_generator("cpu", self.seed, "augmentation", position))
                    break
                except UnreadableImage as error:
                    if self.on_bad_image == "error":
                        raise
                    skipped += 1
                    logger.warning(f"Skipped: {error}")
                    if skipped < most_skipped:
                        continue
                    if last_good is None:
                        raise UnreadableImage(f"No picture before it could be read either: {error}") from error
                    example = last_good
                    break
            last_good = example
            yield {**example, "position": position, "skipped": skipped}

    def _check_size(self, num_examples: int):
        if num_examples < self.batch_size * self.world_size:
            raise ValueError(
                f"The data set has {num_examples} examples, too few for one batch of {self.batch_size} on each of "
                f"{self.world_size} processes."
            )

    def _own_positions(self) -> Iterator[tuple[int, Any]]:
        """Positions of this process and this worker of its data loader, and the raw example of a source in order."""
        worker = torch.utils.data.get_worker_info()
        workers, worker_id = (worker.num_workers, worker.id) if worker is not None else (1, 0)

        def is_own(position: int) -> bool:
            block = (position - self.start) // self.batch_size
            return block % self.world_size == self.rank and block // self.world_size % workers == worker_id

        if self.has_items:
            yield from ((position, None) for position in itertools.count(self.start) if is_own(position))
            return
        for position, raw in enumerate(self._repeated()):
            if position >= self.start and is_own(position):
                yield position, raw

    def _repeated(self) -> Iterator[Any]:
        for epoch in itertools.count():
            count = 0
            for raw in self.source:
                count += 1
                yield raw
            if count == 0 and epoch > 0:
                raise ValueError(f"The data set gave no examples in epoch {epoch}; an iterator can be read once only.")
            self._check_size(count)

    def _item(self, position: int, skipped: int) -> Any:
        if self.length is None:
            return self.source[position + skipped]
        epoch, place = divmod(position, self.length)
        index = self._order(epoch)[place] if self.shuffle else place
        return self.source[(int(index) + skipped) % self.length]

    def _order(self, epoch: int) -> torch.Tensor:
        if getattr(self, "_epoch", None) != epoch:
            generator = seeded_generator("cpu", self.seed, "epoch", epoch)
            self._epoch, self._epoch_order = epoch, torch.randperm(self.length, generator=generator)
        return self._epoch_order


def collate(examples: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """A batch: tensors and numbers stacked, except for `position`, which stays a list, as do strings."""
    examples = list(examples)
    batch = {}
    for name, first in examples[0].items():
        values = [example[name] for example in examples]
        if isinstance(first, torch.Tensor):
            batch[name] = torch.stack(values)
        elif name == "skipped":
            batch[name] = sum(values)
        else:
            batch[name] = values
    return batch


@torch.no_grad()
def finish_batch(
    source: Any, batch: dict[str, Any], device: torch.device | str, resolution: int | None = None
) -> dict[str, Any]:
    """
    A batch with its pictures: what the `finish_batch(batch, device)` of its source makes of it, such as pictures drawn
    on the device, or the batch itself where the source has no such method.

    Raises:
        ValueError: If the source adds no `pixel_values` `(batch_size, 3, resolution, resolution)`.
    """
    if not hasattr(source, "finish_batch"):
        return batch
    batch = {**batch, **source.finish_batch(batch, device)}
    pixel_values = batch.get("pixel_values")
    found = list(pixel_values.shape) if isinstance(pixel_values, torch.Tensor) else f"a {type(pixel_values).__name__}"
    side = found[-1] if resolution is None and isinstance(found, list) and len(found) == 4 else resolution
    if not isinstance(found, list) or found[1:] != [3, side, side]:
        side = "resolution" if side is None else side
        raise ValueError(
            f"`finish_batch` of {type(source).__name__} must add `pixel_values`, a tensor "
            f"(batch_size, 3, {side}, {side}), not {found}."
        )
    return batch
