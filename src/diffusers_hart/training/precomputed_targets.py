# SPDX-License-Identifier: Apache-2.0
import itertools
import json
import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from hashlib import blake2b
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from accelerate import PartialState
from diffusers.utils import logging
from tqdm.auto import tqdm

from ..models import HybridTokenizer
from .data import UnreadableImage, is_endless
from .data_sources import check_label
from .random_draws import seeded_generator


logger = logging.get_logger(__name__)

DESCRIPTION_FILE = "targets.json"


def describe_targets(vae: HybridTokenizer, scales: Sequence[int]) -> dict[str, Any]:
    """What targets depend on: the scales and the codebook of the tokenizer."""
    codebook = vae.codebook.weight.detach().float().cpu().numpy()
    return {"scales": list(scales), "codebook": blake2b(codebook.tobytes(), digest_size=16).hexdigest()}


def write_precomputed_targets(
    output_dir: str | Path,
    source: Any,
    prepare: Callable[[Any, torch.Generator], dict[str, Any]],
    encode: Callable[[list[dict[str, Any]]], dict[str, Sequence[Any]]],
    features: dict[str, Any],
    description: dict[str, Any],
    batch_size: int,
    shard_size: int = 512,
    num_workers: int = 0,
    on_bad_image: str = "error",
) -> Path:
    r"""
    Encode every example of a source once, into a folder of data sets of `shard_size` examples that are complete or not
    there. All lie in `{output_dir}.unfinished` until the last one is written; an interrupted run goes on there when it
    is repeated. Processes of one launch share the shards.

    Args:
        output_dir (`str` or `Path`): The folder, which must not exist.
        source, prepare: The examples and what to make of them, as in [`ExampleStream`].
        encode (`Callable`): Makes columns of a list of prepared examples.
        features (`dict[str, Any]`): Features of these columns, as `datasets` knows them.
        description (`dict[str, Any]`): What the columns depend on; kept beside them.
        batch_size (`int`): Number of examples that are encoded at once.
        shard_size (`int`, defaults to `512`): Number of examples of a shard.
        num_workers (`int`, defaults to `0`): Number of processes that read pictures.
        on_bad_image (`str`, defaults to `"error"`): `"error"`, or `"skip"`, which leaves the picture out.

    Returns:
        `Path`: The folder.

    Raises:
        FileExistsError: If the folder exists, or an unfinished one of another description.
        UnreadableImage: If a picture is bad; names the file.
        ValueError: If there is no example, or no end of them.
    """
    import datasets

    if is_endless(source):
        raise ValueError(
            f"{type(source).__name__} has items but no length: an endless source cannot be encoded before the training."
        )
    state = PartialState()
    output_dir = Path(output_dir)
    unfinished = output_dir.with_name(f"{output_dir.name}.unfinished")
    if output_dir.exists():
        raise FileExistsError(f"{output_dir} exists already: pass a new folder, or remove it first.")
    description = {**description, "shard_size": shard_size}
    started = unfinished / "started.json"
    if started.exists() and json.loads(started.read_text()) != description:
        raise FileExistsError(
            f"{unfinished} was begun with another tokenizer, resolution or settings: remove it, or repeat its command."
        )
    state.wait_for_everyone()
    if state.is_main_process:
        unfinished.mkdir(parents=True, exist_ok=True)
        for leftover in unfinished.glob(".shard-*"):  # of a run that was killed
            shutil.rmtree(leftover)
        started.write_text(json.dumps(description))
    state.wait_for_everyone()

    skipped = 0
    own = _missing_shards(source, shard_size, unfinished, state.process_index, state.num_processes)
    for shard, raw_examples in tqdm(own, desc="Shards", disable=not state.is_local_main_process):
        loader = torch.utils.data.DataLoader(
            _Prepared(raw_examples, prepare, on_bad_image, shard.name),
            batch_size,
            collate_fn=list,
            num_workers=num_workers,
        )
        columns = {name: [] for name in features}
        for examples in loader:
            readable = [example for example in examples if example is not None]
            skipped += len(examples) - len(readable)
            if readable:
                for name, values in encode(readable).items():
                    columns[name].extend(values)
        with TemporaryDirectory(prefix=".shard-", dir=unfinished) as temporary:
            folder = Path(temporary) / shard.name
            folder.mkdir()
            if any(columns.values()):  # a data set without rows could not be loaded again
                data = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
                data.save_to_disk(str(folder))
            folder.rename(shard)
    if skipped:
        logger.warning(f"{skipped} unreadable pictures were left out.")

    state.wait_for_everyone()
    if state.is_main_process:
        num_examples = sum(len(data) for data in _shards(unfinished))
        if num_examples == 0:
            raise ValueError("The data set gave no picture that could be read.")
        (unfinished / DESCRIPTION_FILE).write_text(json.dumps({**description, "num_examples": num_examples}))
        started.unlink()
        unfinished.rename(output_dir)
    state.wait_for_everyone()
    return output_dir


def load_precomputed_targets(folder: str | Path, vae: HybridTokenizer, scales: Sequence[int]) -> Any:
    """
    The data set that [`write_precomputed_targets`] wrote; its rows are dicts of tensors, texts and numbers.

    Raises:
        ValueError: If the folder holds none, or targets of another tokenizer or of other scales.
    """
    import datasets

    path = Path(folder) / DESCRIPTION_FILE
    if not path.exists():
        raise ValueError(
            f"{folder} holds no pre-computed targets, or unfinished ones: precompute_targets.py makes them."
        )
    found = json.loads(path.read_text())
    for name, expected in describe_targets(vae, scales).items():
        if found[name] != expected:
            raise ValueError(
                f"The targets in {folder} do not fit this training: their {name} is {found[name]}, not {expected}. "
                "Compute them anew with this tokenizer and resolution."
            )
    return datasets.concatenate_datasets(list(_shards(Path(folder)))).with_format("torch")


def precomputed_preparer(num_classes: int | None = None) -> Callable[[Any, torch.Generator], dict[str, Any]]:
    """What [`ExampleStream`] does with a row of [`load_precomputed_targets`]: nothing but to check its label."""

    def prepare(row: dict[str, Any], generator: torch.Generator) -> dict[str, Any]:
        if num_classes is None:
            return row
        return {**row, "label": check_label(row["label"], num_classes, None)}

    return prepare


class _Prepared(torch.utils.data.Dataset):
    """Prepared examples; `None` in place of an unreadable one that is to be left out."""

    def __init__(self, raw_examples: list[Any], prepare: Callable, on_bad_image: str, name: str):
        self.raw_examples = raw_examples
        self.prepare = prepare
        self.on_bad_image = on_bad_image
        self.name = name

    def __len__(self) -> int:
        return len(self.raw_examples)

    def __getitem__(self, index: int) -> dict[str, Any] | None:
        try:
            return self.prepare(self.raw_examples[index], seeded_generator("cpu", "caption", self.name, index))
        except UnreadableImage as error:
            if self.on_bad_image == "error":
                raise
            logger.warning(f"Left out: {error}")
            return None


def _missing_shards(
    source: Any, shard_size: int, folder: Path, process_index: int, num_processes: int
) -> Iterator[tuple[Path, list[Any]]]:
    """The shards of this process that are not written yet, each with its raw examples."""
    has_items = hasattr(source, "__len__") and hasattr(source, "__getitem__")
    examples: Iterable[Any] = () if has_items else iter(source)
    for index in range(math.ceil(len(source) / shard_size)) if has_items else itertools.count():
        shard = folder / f"shard-{index:06d}"
        if not has_items:
            raw_examples = list(itertools.islice(examples, shard_size))
            if not raw_examples:
                return
        if index % num_processes != process_index or shard.exists():
            continue
        if has_items:
            end = min(len(source), (index + 1) * shard_size)
            raw_examples = [source[i] for i in range(index * shard_size, end)]
        yield shard, raw_examples


def _shards(folder: Path) -> Iterator[Any]:
    import datasets

    for shard in sorted(folder.glob("shard-*")):
        if (shard / "dataset_info.json").exists():
            yield datasets.load_from_disk(str(shard))
