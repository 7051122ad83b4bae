# SPDX-License-Identifier: Apache-2.0
"""Reading configs and weights from files that may come from anywhere: nothing in them is ever run."""

import json
import pickle
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file


def read_json(path: Path) -> dict[str, Any]:
    """
    A JSON object.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it holds something else.
    """
    if not path.is_file():
        raise FileNotFoundError(f"There is no {path}.")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}.") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object, not {type(value).__name__}.")
    return value


def find_weights(folder: Path, names: tuple[str, ...], advice: str = "") -> Path:
    """
    The first file of these names, or index of a sharded one, that the folder has. An error ends with the advice.

    Raises:
        FileNotFoundError: If it has none of them.
    """
    for name in names:
        for path in (folder / name, folder / f"{name}.index.json"):
            if path.is_file():
                return path
    raise FileNotFoundError(f"There are no weights in {folder}: expected {' or '.join(names)}.{advice}")


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """
    The tensors of a safetensors file, a pickle of plain tensors, or the shards that an index lists.

    Raises:
        FileNotFoundError: If a shard is missing.
        ValueError: If a file is damaged or holds anything but tensors. Code in a pickle is not run.
    """
    if path.name.endswith(".index.json"):
        shards = read_json(path).get("weight_map")
        if not isinstance(shards, dict):
            raise ValueError(f"{path} has no `weight_map`, which an index of shards needs.")
        weights = {}
        for shard in sorted(set(shards.values())):
            if Path(shard).name != shard:
                raise ValueError(f"{path} lists {shard!r}, which is not a file beside it.")
            if not (path.parent / shard).is_file():
                raise FileNotFoundError(f"{path} lists {shard}, which is missing.")
            weights |= read_weights(path.parent / shard)
        return weights

    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} is not a pickle of plain tensors: either it is damaged or it holds code. It was not run."
        ) from error
    except (SafetensorError, RuntimeError, EOFError, ValueError, KeyError, TypeError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(
            f"{path} cannot be read, it is damaged or incomplete ({reason}). Download it again; in a git clone, "
            "`git lfs pull` fetches what is only a pointer."
        ) from error
    if not isinstance(weights, dict) or not all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in weights.items()
    ):
        raise ValueError(f"{path} must hold tensors by name and nothing else.")
    return weights
