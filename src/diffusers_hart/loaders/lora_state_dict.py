# SPDX-License-Identifier: Apache-2.0
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import torch
import torch.nn as nn
from diffusers.utils.peft_utils import get_peft_kwargs
from peft import LoraConfig


PEFT_PREFIX = "base_model.model."
# What tensors do not tell of an adapter; the rest of a configuration is read off them.
SETTINGS = ("lora_alpha", "alpha_pattern", "use_rslora")
NUM_NAMED_KEYS = 3


def module_name(key: str) -> str:
    """The layer that a key such as `transformer_blocks.0.attn.to_q.lora_A.weight` belongs to."""
    return key.split(".lora_")[0]


def split_components(
    state_dict: dict[str, torch.Tensor], metadata: dict[str, Any] | None, models: Mapping[str, nn.Module]
) -> dict[str, tuple[dict[str, torch.Tensor], dict[str, Any]]]:
    """
    The tensors and the metadata of each component, without its prefix. Keys that have no component's prefix, as peft
    writes them, all belong to the component whose layers they name.

    Args:
        state_dict (`dict[str, torch.Tensor]`): An adapter of a pipeline, or of one of its models.
        metadata (`dict[str, Any]`, *optional*): Its settings, with the same prefixes.
        models (`Mapping[str, nn.Module]`): The components; where there is none of a name, its tensors are not checked.

    Raises:
        ValueError: If tensors belong to no component; names the first ones.
    """
    metadata = metadata or {}
    prefixed = [key for key in state_dict if key.split(".")[0] in models]
    if not prefixed:
        known = {name: set() if model is None else dict(model.named_modules()) for name, model in models.items()}
        matches = {name: sum(module_name(key) in layers for key in state_dict) for name, layers in known.items()}
        best = max(matches, key=matches.get)
        if matches[best] == 0:
            _raise_for_foreign_keys(list(state_dict), state_dict, f"any of {list(models)}")
        return {best: (dict(state_dict), dict(metadata))}
    if foreign := [key for key in state_dict if key.split(".")[0] not in models]:
        _raise_for_foreign_keys(foreign, state_dict, f"any of {list(models)}")

    parts: dict[str, tuple[dict[str, torch.Tensor], dict[str, Any]]] = {}
    for name in models:
        of_component = [
            {key.removeprefix(f"{name}."): value for key, value in values.items() if key.startswith(f"{name}.")}
            for values in (state_dict, metadata)
        ]
        if of_component[0]:
            parts[name] = tuple(of_component)
    return parts


def check_lora_fits(state_dict: dict[str, torch.Tensor], model: nn.Module, name: str) -> None:
    """Raises `ValueError` if not every tensor of an adapter fits a layer of the model; names the first keys."""
    layers = dict(model.named_modules())
    misfits = {}
    for key, tensor in state_dict.items():
        layer, part = layers.get(module_name(key)), key[len(module_name(key)) + 1 :]
        sizes = (getattr(layer, "in_features", None), getattr(layer, "out_features", None))
        if layer is None:
            misfits[key] = f"there is no {module_name(key)}"
        elif None in sizes or part.split(".")[0] not in ("lora_A", "lora_B", "lora_magnitude_vector"):
            misfits[key] = f"{type(layer).__name__} takes no such tensor"
        elif part == "lora_A.weight" and (tensor.ndim != 2 or tensor.shape[1] != sizes[0]):
            misfits[key] = f"of shape {tuple(tensor.shape)} for {sizes[0]} inputs"
        elif part == "lora_B.weight" and (tensor.ndim != 2 or tensor.shape[0] != sizes[1]):
            misfits[key] = f"of shape {tuple(tensor.shape)} for {sizes[1]} outputs"
    if misfits:
        _raise_for_foreign_keys(list(misfits), state_dict, f"the {name}", misfits)

    for layer in dict.fromkeys(module_name(key) for key in state_dict):
        first, second = (state_dict.get(f"{layer}.lora_{side}.weight") for side in "AB")
        if first is None or second is None:
            missing = "lora_A" if first is None else "lora_B"
            raise ValueError(f"The LoRA of {name}.{layer} is incomplete: {missing}.weight is missing.")
        if first.shape[0] != second.shape[1] or first.shape[0] == 0:
            raise ValueError(
                f"The LoRA of {name}.{layer} has rank {first.shape[0]} in lora_A and {second.shape[1]} in lora_B; both "
                "must be the same positive number."
            )


def lora_config_kwargs(state_dict: dict[str, torch.Tensor], metadata: dict[str, Any]) -> dict[str, Any]:
    """
    Arguments of the `LoraConfig` of tensors: ranks and layers are theirs, the factors those of the metadata or, where
    it has none, 1.

    Raises:
        ValueError: If the metadata are not those of a LoRA.
    """
    ranks = {f"^{key}": tensor.shape[1] for key, tensor in state_dict.items() if key.endswith("lora_B.weight")}
    kwargs = get_peft_kwargs(ranks, None, state_dict, is_unet=False)
    if "lora_alpha" in metadata:
        kwargs["alpha_pattern"] = {}
    kwargs |= {name: metadata[name] for name in SETTINGS if metadata.get(name) is not None}
    pattern = kwargs["alpha_pattern"]
    alphas = [kwargs["lora_alpha"], *(pattern.values() if isinstance(pattern, dict) else [pattern])]
    if metadata.get("peft_type", "LORA") not in ("LORA", None) or not all(isinstance(a, Real) for a in alphas):
        raise ValueError(
            f"The metadata are not those of a LoRA: `peft_type` is {metadata.get('peft_type')!r}, `lora_alpha` and "
            f"`alpha_pattern` hold {alphas}."
        )
    return LoraConfig(**kwargs).to_dict()


def _raise_for_foreign_keys(
    keys: Sequence[str], state_dict: dict[str, torch.Tensor], place: str, reasons: Mapping[str, str] | None = None
) -> None:
    named = [f"{key} ({reasons[key]})" if reasons else key for key in keys[:NUM_NAMED_KEYS]]
    named = ", ".join(named) + (", ..." if len(keys) > NUM_NAMED_KEYS else "")
    raise ValueError(
        f"This is a LoRA for another model: {len(keys)} of its {len(state_dict)} tensors do not fit {place}: {named}."
        if state_dict
        else "This LoRA holds no tensors."
    )
