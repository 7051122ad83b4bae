# SPDX-License-Identifier: Apache-2.0
import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from .data import image_name, image_to_tensor, read_image


IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif"}


def load_image_source(
    dataset_name: str | None = None,
    dataset_config_name: str | None = None,
    train_data_dir: str | None = None,
    train_shards: str | None = None,
    train_iterable: str | None = None,
    image_column: str = "image",
    caption_column: str | None = "text",
    cache_dir: str | None = None,
) -> Any:
    r"""
    Examples from one of four places, for [`ExampleStream`].

    Args:
        dataset_name (`str`, *optional*): Id of a data set on the Hub, or a folder of `Dataset.save_to_disk`.
        dataset_config_name (`str`, *optional*): Its configuration.
        train_data_dir (`str`, *optional*):
            A folder of pictures with a `metadata.csv` or `metadata.jsonl` of `file_name` and the caption's column; for
            labels, a folder for each class does as well.
        train_shards (`str`, *optional*): Pattern of webdataset tar files.
        train_iterable (`str`, *optional*):
            `path/to/file.py:name` or `module:name` of pairs of a picture and a caption or a label: a sequence, an
            object with items but no length, which is endless, or another one that can be iterated again and again; or a
            function or class that gives one when called without arguments. A function that gives an iterator, such as
            a generator, is called for each epoch. An object with `finish_batch(batch, device)` gives dicts instead of
            pairs and makes the pictures of a batch of them, see [`finish_batch`].
        image_column (`str`, defaults to `"image"`): Column of the pictures.
        caption_column (`str`, *optional*, defaults to `"text"`): Column of the captions or labels, `None` for neither.
        cache_dir (`str`, *optional*): Where `datasets` keeps its files.

    Returns:
        A data set of dicts with these columns, pictures undecoded, or an iterable of pairs.

    Raises:
        ValueError: If not exactly one place is named, a column is missing, or captions and pictures do not match.
    """
    places = [dataset_name, train_data_dir, train_shards, train_iterable]
    if sum(place is not None for place in places) != 1:
        raise ValueError(
            "Name one source of training data: `dataset_name`, `train_data_dir`, `train_shards` or `train_iterable`."
        )
    if train_iterable is not None:
        return _import_iterable(train_iterable)

    import datasets

    if train_data_dir is not None:
        if caption_column is not None:
            _check_metadata(Path(train_data_dir), cache_dir)
        source = datasets.load_dataset("imagefolder", data_dir=train_data_dir, split="train", cache_dir=cache_dir)
    elif train_shards is not None:
        source = datasets.load_dataset(
            "webdataset", data_files={"train": train_shards}, split="train", streaming=True, cache_dir=cache_dir
        )
    elif (Path(dataset_name) / "dataset_info.json").exists():
        source = datasets.load_from_disk(dataset_name)
    else:
        source = datasets.load_dataset(dataset_name, dataset_config_name, split="train", cache_dir=cache_dir)

    columns = list(source.features or next(iter(source)))
    for name in filter(None, (image_column, caption_column)):
        if name not in columns:
            raise ValueError(f"The data set has no column {name!r}; it has {columns}.")
    return source.cast_column(image_column, datasets.Image(decode=False))


def image_preparer(
    resolution: int,
    image_column: str = "image",
    caption_column: str | None = "text",
    random_crop: bool = False,
    random_flip: bool = False,
    num_classes: int | None = None,
    source: Any = None,
) -> Callable[[Any, torch.Generator], dict[str, Any]]:
    r"""
    What [`ExampleStream`] does with an example of [`load_image_source`].

    Args:
        resolution (`int`): Side of the pictures.
        image_column (`str`, defaults to `"image"`): Column of the pictures.
        caption_column (`str`, *optional*, defaults to `"text"`): Column of the captions or labels, `None` for neither.
        random_crop (`bool`, defaults to `False`): Whether to crop at random instead of in the middle.
        random_flip (`bool`, defaults to `False`): Whether to mirror every other picture.
        num_classes (`int`, *optional*): Number of classes; the column then holds labels instead of captions.
        source (*optional*):
            The source. The examples of one that finishes batches have no pictures yet; they are dicts and stay as they
            are, but for their `caption` or `label`.

    Returns:
        `Callable`: Makes a dict of `pixel_values` `(3, resolution, resolution)` in [-1, 1] and, if there is a column for
        it, `caption` (`str`) or `label` (`int`); raises `ValueError` for a caption or label of another kind.

    Raises:
        ValueError: If pictures are to be cropped or flipped at random that the source itself makes.
    """

    def condition(value: Any, image: Any, generator: torch.Generator) -> dict[str, Any]:
        if caption_column is None:
            return {}
        if num_classes is not None:
            return {"label": check_label(value, num_classes, image)}
        return {"caption": choose_caption(value, image, generator)}

    def prepare(example: Any, generator: torch.Generator) -> dict[str, Any]:
        if isinstance(example, dict):
            image, caption = example[image_column], example[caption_column] if caption_column else None
        else:
            image, caption = example if isinstance(example, (tuple, list)) else (example, None)
        pixel_values = image_to_tensor(read_image(image), resolution, generator, random_crop, random_flip)
        return {"pixel_values": pixel_values, **condition(caption, image, generator)}

    def prepare_unfinished(example: Any, generator: torch.Generator) -> dict[str, Any]:
        if not isinstance(example, dict):
            kind = type(example).__name__
            raise ValueError(f"The examples of a source with `finish_batch` must be dicts, not {kind}.")
        value = example.get("caption" if num_classes is None else "label")
        return {**example, **condition(value, None, generator)}

    if not hasattr(source, "finish_batch"):
        return prepare
    if random_crop or random_flip:
        raise ValueError(
            f"{type(source).__name__} makes its pictures itself: leave out --random_crop and --random_flip."
        )
    return prepare_unfinished


def choose_caption(caption: Any, image: Any, generator: torch.Generator) -> str:
    """The caption of a picture, or one of several; raises `ValueError`, naming the picture, if it is no text."""
    if isinstance(caption, (list, tuple)) and caption:
        caption = caption[torch.randint(len(caption), (), generator=generator).item()]
    if not isinstance(caption, str):
        raise ValueError(f"The caption of {image_name(image)} must be a text, not {caption!r}.")
    return caption


def check_label(label: Any, num_classes: int, image: Any) -> int:
    """The label of a picture, which must be one of `num_classes`; raises `ValueError`, naming the picture."""
    if isinstance(label, (str, bool)) or not hasattr(label, "__index__") or not 0 <= int(label) < num_classes:
        raise ValueError(
            f"The label of {image_name(image)} must be an integer in [0, {num_classes}), not {label!r}. Names of classes "
            "can be made labels by `class_encode_column` of `datasets`."
        )
    return int(label)


def _check_metadata(folder: Path, cache_dir: str | None) -> None:
    """Raises `ValueError` unless captions and pictures of a folder match one to one; labelled folders have none."""
    import datasets

    tables = [path for name in ("metadata.csv", "metadata.jsonl") for path in folder.rglob(name)]
    if not tables:
        return
    named = set()
    for table in tables:
        kind = "csv" if table.suffix == ".csv" else "json"
        rows = datasets.load_dataset(kind, data_files=str(table), split="train", cache_dir=cache_dir)
        if "file_name" not in rows.column_names:
            raise ValueError(f"{table} has no column 'file_name'; it has {rows.column_names}.")
        named |= {(table.parent / name).resolve() for name in rows["file_name"]}
    present = {path.resolve() for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES}
    problems = []
    for what, paths in (
        ("captions without a picture", named - present),
        ("pictures without a caption", present - named),
    ):
        if paths:
            first = ", ".join(str(path.relative_to(folder.resolve())) for path in sorted(paths)[:5])
            problems.append(f"{len(paths)} {what} ({first}{', ...' if len(paths) > 5 else ''})")
    if problems:
        raise ValueError(f"The captions of {folder} do not match its pictures: {' and '.join(problems)}.")


def _import_iterable(reference: str) -> Any:
    module_name, _, name = reference.rpartition(":")
    if not module_name:
        raise ValueError(f"`train_iterable` must be 'path/to/file.py:name' or 'module:name', not {reference!r}.")
    if module_name.endswith(".py"):
        path = Path(module_name)
        if not path.exists():
            raise ValueError(f"`train_iterable` names {path}, which does not exist.")
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[path.stem] = module
        spec.loader.exec_module(module)
    else:
        module = importlib.import_module(module_name)
    if not hasattr(module, name):
        raise ValueError(f"`train_iterable`: {module_name} has no {name!r}.")
    found = getattr(module, name)
    result = found() if callable(found) else found
    if not (hasattr(result, "__iter__") or hasattr(result, "__getitem__")):
        raise ValueError(f"`train_iterable`: {reference} gives a {type(result).__name__}, which cannot be iterated.")
    return _CalledEachEpoch(found) if callable(found) and isinstance(result, Iterator) else result


class _CalledEachEpoch:
    """What a function that gives an iterator gives, again and again."""

    def __init__(self, function: Callable[[], Iterator[Any]]):
        self.function = function

    def __iter__(self) -> Iterator[Any]:
        return self.function()
