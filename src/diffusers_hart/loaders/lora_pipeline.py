# SPDX-License-Identifier: Apache-2.0
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from diffusers import ModelMixin
from diffusers.hooks.group_offloading import _maybe_remove_and_reapply_group_offloading
from diffusers.loaders.lora_base import LoraBaseMixin, _fetch_state_dict
from diffusers.utils import _get_model_file, logging
from huggingface_hub.utils import HFValidationError, validate_hf_hub_args
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError
from transformers import PreTrainedModel

from .lora_state_dict import PEFT_PREFIX, check_lora_fits, lora_config_kwargs, split_components


logger = logging.get_logger(__name__)

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
PEFT_CONFIG_NAME = "adapter_config.json"


class HARTLoraLoaderMixin(LoraBaseMixin):
    r"""
    LoRA adapters of the HART pipelines, in diffusers' terms: of the transformer and, where there are such, of the
    residual MLP and the text encoder. What is not here is inherited from diffusers' `LoraBaseMixin`.
    """

    _lora_loadable_modules = ["transformer", "residual_mlp", "text_encoder"]
    transformer_name = "transformer"
    residual_mlp_name = "residual_mlp"
    text_encoder_name = "text_encoder"

    @property
    def lora_scale(self) -> float:
        """The factor of LoRA layers in the last call, its `attention_kwargs={"scale": ...}`."""
        return (getattr(self, "_attention_kwargs", None) or {}).get("scale", 1.0)

    @classmethod
    @validate_hf_hub_args
    def lora_state_dict(
        cls, pretrained_model_name_or_path_or_dict: str | os.PathLike | dict[str, torch.Tensor], **kwargs: Any
    ) -> dict[str, torch.Tensor] | tuple[dict[str, torch.Tensor], dict[str, Any] | None]:
        r"""
        Read an adapter: what [`~HARTLoraLoaderMixin.save_lora_weights`], the training scripts or peft's own
        `save_pretrained` wrote.

        Args:
            pretrained_model_name_or_path_or_dict (`str`, `os.PathLike` or `dict`):
                An id on the Hub, a folder, a file, or the tensors themselves.
            weight_name (`str`, *optional*): The file in the folder or repository; needed where it has several.
            use_safetensors (`bool`, *optional*):
                `False` reads a pickle (`.bin`), of which nothing but tensors is loaded. Otherwise pickles are refused.
            return_lora_metadata (`bool`, defaults to `False`): Whether to return the adapter's settings too.
            subfolder, revision, token, cache_dir, force_download, local_files_only, proxies (*optional*):
                As in `from_pretrained`.

        Returns:
            `dict[str, torch.Tensor]`, or a `tuple` of it and the metadata, a `dict` or `None`.

        Raises:
            ValueError: If the file is a pickle and none was asked for, or its metadata cannot be read.
            OSError: If there is no such file or it is damaged.
        """
        source = pretrained_model_name_or_path_or_dict
        return_lora_metadata = kwargs.pop("return_lora_metadata", False)
        use_safetensors = kwargs.pop("use_safetensors", None)
        weight_name = kwargs.pop("weight_name", None)
        if isinstance(source, dict):
            state_dict, metadata = dict(source), None
        else:
            name = weight_name or _only_pickle(source) or str(source)
            if use_safetensors is not False and name.endswith(PICKLE_SUFFIXES):
                raise ValueError(
                    f"{name} is a pickle. Ask for a safetensors file, or pass `use_safetensors=False` to read it all "
                    "the same; nothing but tensors is loaded from it then."
                )
            options = {
                option: kwargs.pop(option, None)
                for option in ("cache_dir", "proxies", "local_files_only", "token", "revision", "subfolder")
            }
            options["force_download"] = kwargs.pop("force_download", False)
            options["user_agent"] = {"file_type": "attn_procs_weights", "framework": "pytorch"}
            try:
                state_dict, metadata = _fetch_state_dict(
                    str(source), weight_name, use_safetensors is not False, allow_pickle=False, **options
                )
            except HFValidationError as error:
                raise OSError(f"{source} is neither a file or folder here nor an id on the Hub: {error}") from error
            except (SafetensorError, json.JSONDecodeError) as error:
                raise OSError(f"{_place(source, weight_name)} is no readable safetensors file: {error}") from error
            if metadata is None and any(key.startswith(PEFT_PREFIX) for key in state_dict):
                metadata = _peft_config(source, options)
        if kwargs:
            raise TypeError(f"Unknown arguments for loading a LoRA: {sorted(kwargs)}.")
        state_dict = {key.removeprefix(PEFT_PREFIX): value for key, value in state_dict.items()}
        return (state_dict, metadata) if return_lora_metadata else state_dict

    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: str | os.PathLike | dict[str, torch.Tensor],
        adapter_name: str | None = None,
        hotswap: bool = False,
        **kwargs: Any,
    ) -> None:
        r"""
        Load an adapter and make it the active one. If it does not fit, nothing has changed.

        Args:
            pretrained_model_name_or_path_or_dict (`str`, `os.PathLike` or `dict`):
                An id on the Hub, a folder, a file, or the tensors themselves.
            adapter_name (`str`, *optional*): What to call it; by default `default_0`, `default_1` and so on.
            hotswap (`bool`, defaults to `False`):
                Put the weights in the place of the loaded adapter of this name, without a compiled model being compiled
                anew; not for the text encoder. Where ranks or factors differ, `enable_lora_hotswap(target_rank=...)`
                must have been called before the first adapter was loaded.
            low_cpu_mem_usage (`bool`, defaults to `True`): Whether to make no weights but those that are loaded.
            kwargs: As in [`~HARTLoraLoaderMixin.lora_state_dict`].

        Raises:
            ValueError: If the adapter is one for another model (the first keys that do not fit are named), the name is
                taken, or with `hotswap` unknown, projections are fused, or a model is wrapped by `torch.compile`.
            OSError: If there is no such file or it is damaged.
        """
        low_cpu_mem_usage = kwargs.pop("low_cpu_mem_usage", True)
        state_dict, metadata = self.lora_state_dict(
            pretrained_model_name_or_path_or_dict, return_lora_metadata=True, **kwargs
        )
        # Copies are aligned in memory, which views of a file are not; rounding would depend on the file's header.
        state_dict = {key: tensor.clone() for key, tensor in state_dict.items()}
        models = self._lora_models()
        _check_not_wrapped(models)
        parts = split_components(state_dict, metadata, models)
        configs = {}
        for name, (tensors, settings) in list(parts.items()):
            if models[name] is None:
                logger.warning(f"This pipeline has no {name}: that part of the LoRA is left out.")
                del parts[name]
                continue
            check_lora_fits(tensors, models[name], name)
            configs[name] = lora_config_kwargs(tensors, settings)
        adapter_name = self._check_adapter_name(adapter_name, hotswap, set(parts))
        if "transformer" in parts:
            models["transformer"].check_projections_apart()

        for name, (tensors, _) in parts.items():
            if isinstance(models[name], ModelMixin):
                models[name].load_lora_adapter(
                    tensors,
                    prefix=None,
                    adapter_name=adapter_name,
                    metadata=configs[name],
                    hotswap=hotswap,
                    low_cpu_mem_usage=low_cpu_mem_usage,
                    _pipeline=self,
                )
            else:
                self._load_into_text_encoder(models[name], tensors, configs[name], adapter_name, low_cpu_mem_usage)

    @classmethod
    def save_lora_weights(
        cls,
        save_directory: str | os.PathLike,
        transformer_lora_layers: dict[str, nn.Module | torch.Tensor] | None = None,
        residual_mlp_lora_layers: dict[str, nn.Module | torch.Tensor] | None = None,
        text_encoder_lora_layers: dict[str, nn.Module | torch.Tensor] | None = None,
        is_main_process: bool = True,
        weight_name: str | None = None,
        save_function: Callable | None = None,
        safe_serialization: bool = True,
        transformer_lora_adapter_metadata: dict[str, Any] | None = None,
        residual_mlp_lora_adapter_metadata: dict[str, Any] | None = None,
        text_encoder_lora_adapter_metadata: dict[str, Any] | None = None,
    ) -> None:
        r"""
        Save an adapter into one file that [`~HARTLoraLoaderMixin.load_lora_weights`] reads.

        Args:
            save_directory (`str` or `os.PathLike`): Folder of the file; made if there is none.
            transformer_lora_layers, residual_mlp_lora_layers, text_encoder_lora_layers (`dict`, *optional*):
                The tensors of each model, as peft's `get_peft_model_state_dict` gives them.
            is_main_process (`bool`, defaults to `True`): Whether this process is the one that writes.
            weight_name (`str`, *optional*): The file's name, by default `pytorch_lora_weights.safetensors`.
            save_function (`Callable`, *optional*): What writes, instead of safetensors or `torch.save`.
            safe_serialization (`bool`, defaults to `True`): `False` writes a pickle.
            transformer_lora_adapter_metadata (`dict`, *optional*):
                The settings of the transformer's, `model.peft_config[adapter_name].to_dict()`; without them each
                layer's factor is 1 when they are loaded.
            residual_mlp_lora_adapter_metadata, text_encoder_lora_adapter_metadata (`dict`, *optional*):
                The same of the others.

        Raises:
            ValueError: If there is nothing to save.
        """
        layers = {
            cls.transformer_name: (transformer_lora_layers, transformer_lora_adapter_metadata),
            cls.residual_mlp_name: (residual_mlp_lora_layers, residual_mlp_lora_adapter_metadata),
            cls.text_encoder_name: (text_encoder_lora_layers, text_encoder_lora_adapter_metadata),
        }
        given = {name: (tensors, metadata) for name, (tensors, metadata) in layers.items() if tensors}
        if not given:
            raise ValueError(
                "There is nothing to save: pass `transformer_lora_layers`, `residual_mlp_lora_layers` or "
                "`text_encoder_lora_layers`."
            )
        if not is_main_process:
            return
        cls._save_lora_weights(
            save_directory=save_directory,
            lora_layers={name: tensors for name, (tensors, _) in given.items()},
            lora_metadata={name: metadata for name, (_, metadata) in given.items()},
            is_main_process=is_main_process,
            weight_name=weight_name,
            save_function=save_function,
            safe_serialization=safe_serialization,
        )

    def fuse_lora(
        self,
        components: list[str] | None = None,
        lora_scale: float = 1.0,
        safe_fusing: bool = False,
        adapter_names: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        r"""
        Add adapters to the weights they belong to: as fast as the base model, until `unfuse_lora`.

        Args:
            components (`list[str]`, *optional*): Of which models; by default of all that can have adapters.
            lora_scale (`float`, defaults to `1.0`): Factor of the adapters' weights.
            safe_fusing (`bool`, defaults to `False`): Whether to refuse weights that become no numbers.
            adapter_names (`list[str]`, *optional*): Which adapters; by default the active ones.

        Raises:
            ValueError: If an adapter or a component is unknown.
        """
        self._check_known(adapter_names)
        components = self._lora_loadable_modules if components is None else components
        super().fuse_lora(components, lora_scale, safe_fusing, adapter_names, **kwargs)

    def unfuse_lora(self, components: list[str] | None = None, **kwargs: Any) -> None:
        """Take fused adapters out of the weights again, of `components` or of all models."""
        super().unfuse_lora(self._lora_loadable_modules if components is None else components, **kwargs)

    def delete_adapters(self, adapter_names: list[str] | str) -> None:
        """Remove adapters, by name. Raises `ValueError` if one is unknown; then none has been removed."""
        self._check_known(adapter_names)
        super().delete_adapters(adapter_names)

    def set_lora_device(self, adapter_names: list[str], device: torch.device | str | int) -> None:
        """Move adapters to a device. Raises `ValueError` if one is unknown."""
        self._check_known(adapter_names)
        super().set_lora_device(adapter_names, device)

    def get_active_adapters(self) -> list[str]:
        """The names of the active adapters of all models, each once."""
        active = {}
        for name, model in self._lora_models().items():
            loaded = self.get_list_adapters().get(name, [])
            for layer in [] if model is None else model.modules():
                if isinstance(layer, BaseTunerLayer):
                    active |= dict.fromkeys(adapter for adapter in layer.active_adapters if adapter in loaded)
                    break
        return list(active)

    def _load_into_text_encoder(
        self,
        text_encoder: PreTrainedModel,
        state_dict: dict[str, torch.Tensor],
        config: dict[str, Any],
        adapter_name: str,
        low_cpu_mem_usage: bool,
    ) -> None:
        # Not by diffusers' own function: it casts the whole model, its rotary frequencies in float32 included.
        offloaded_by_model, offloaded_by_layer, offloaded_by_group = self._optionally_disable_offloading(self)
        text_encoder.load_adapter(
            adapter_name=adapter_name,
            adapter_state_dict=state_dict,
            peft_config=LoraConfig(**config),
            low_cpu_mem_usage=low_cpu_mem_usage,
        )
        for layer in text_encoder.modules():
            if isinstance(layer, LoraLayer) and adapter_name in layer.lora_A:
                weight = layer.get_base_layer().weight
                dtype = weight.dtype if weight.is_floating_point() else text_encoder.dtype
                layer.lora_A[adapter_name].to(weight.device, dtype)
                layer.lora_B[adapter_name].to(weight.device, dtype)
        if offloaded_by_model:
            self.enable_model_cpu_offload()
        elif offloaded_by_layer:
            self.enable_sequential_cpu_offload()
        elif offloaded_by_group:
            for component in self.components.values():
                if isinstance(component, nn.Module):
                    _maybe_remove_and_reapply_group_offloading(component)

    def _lora_models(self) -> dict[str, nn.Module | None]:
        return {name: getattr(self, name, None) for name in self._lora_loadable_modules}

    def _check_known(self, adapter_names: list[str] | str | None) -> None:
        loaded = [adapter for adapters in self.get_list_adapters().values() for adapter in adapters]
        adapter_names = [adapter_names] if isinstance(adapter_names, str) else adapter_names or []
        if unknown := [name for name in adapter_names if name not in loaded]:
            raise ValueError(f"There are no adapters {unknown}; loaded are {list(dict.fromkeys(loaded))}.")

    def _check_adapter_name(self, adapter_name: str | None, hotswap: bool, components: set[str]) -> str:
        """The name of an adapter that is to be loaded into `components`; raises `ValueError` if it cannot be."""
        loaded = self.get_list_adapters()
        if adapter_name is None:
            taken = {name for names in loaded.values() for name in names}
            if not hotswap:
                return next(name for i in range(len(taken) + 1) if (name := f"default_{i}") not in taken)
            raise ValueError(f"`hotswap` needs the `adapter_name` to replace; loaded are {sorted(taken)}.")
        if not adapter_name or "." in adapter_name:
            raise ValueError(f"The name of an adapter must not be empty or have a dot, unlike {adapter_name!r}.")
        having = {component for component, names in loaded.items() if adapter_name in names}
        if hotswap:
            if "text_encoder" in components | having:
                raise ValueError("Adapters of a text encoder cannot be hot-swapped: pass `hotswap=False`.")
            if not having:
                self._check_known(adapter_name)
            if components != having:
                raise ValueError(
                    f"Adapter {adapter_name!r} has layers in {sorted(having)}, the LoRA to take its place in "
                    f"{sorted(components)}: load it with `hotswap=False`."
                )
        elif having:
            raise ValueError(f"There is an adapter {adapter_name!r} already: choose another name or delete it first.")
        return adapter_name


def _check_not_wrapped(models: dict[str, nn.Module | None]) -> None:
    for name, model in models.items():
        if hasattr(model, "_orig_mod"):
            raise ValueError(
                f"The {name} is wrapped by `torch.compile`, where diffusers does not look for adapters: compile it in "
                f"place, with `{name}.compile()` or, of diffusers' models, `{name}.compile_repeated_blocks()`."
            )


def _only_pickle(source: str | os.PathLike) -> str | None:
    """The pickle in a local folder that has no safetensors file."""
    files = sorted(Path(source).iterdir()) if Path(source).is_dir() else []
    if any(file.suffix == ".safetensors" for file in files):
        return None
    return next((str(file) for file in files if file.suffix in PICKLE_SUFFIXES), None)


def _place(source: str | os.PathLike, weight_name: str | None) -> str:
    return f"{source}/{weight_name}" if weight_name else str(source)


def _peft_config(source: str | os.PathLike, options: dict[str, Any]) -> dict[str, Any] | None:
    """What peft wrote beside an adapter of its own, if it is there."""
    folder = Path(source).parent if Path(source).is_file() else source
    try:
        path = _get_model_file(str(folder), weights_name=PEFT_CONFIG_NAME, **options)
    except OSError:
        logger.warning(f"There is no {PEFT_CONFIG_NAME} beside {source}: the factor of its layers is taken to be 1.")
        return None
    try:
        return json.loads(Path(path).read_text())
    except ValueError as error:
        raise OSError(f"{path} is no readable JSON: {error}") from error
