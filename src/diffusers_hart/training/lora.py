# SPDX-License-Identifier: Apache-2.0
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn as nn
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer

from ..loaders.lora_state_dict import split_components
from ..pipelines import HARTPipeline
from .random_draws import seeded_generator


ADAPTER_NAME = "default"
TRANSFORMER_LAYERS = ("to_q", "to_k", "to_v", "to_out.0", "gate_proj", "up_proj", "down_proj")
RESIDUAL_MLP_LAYERS = ("linear_1", "linear_2")
TEXT_ENCODER_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj")


def add_lora_adapter(
    model: nn.Module, layers: Sequence[str], rank: int, alpha: float | None = None, dropout: float = 0.0, seed: int = 0
) -> None:
    r"""
    Freeze a model and put a new adapter on some of its linear layers: in float32 whatever the model is kept in, without
    effect at first, and a function of the seed.

    Args:
        model (`nn.Module`): A model of diffusers or transformers.
        layers (`Sequence[str]`): Names of layers, or ends of their names, such as `to_q` or `attn.to_out.0`.
        rank (`int`): Rank of the adapter.
        alpha (`float`, *optional*): The adapter counts `alpha / rank` times; by default once.
        dropout (`float`, defaults to `0.0`): Share of the layers' inputs that the adapter does not see in training.
        seed (`int`, defaults to `0`): Seed of the run.

    Raises:
        ValueError: If the rank is not positive or a name matches no linear layer.
    """
    if rank < 1:
        raise ValueError(f"The rank of a LoRA must be a positive integer, not {rank}.")
    linear = [name for name, layer in model.named_modules() if isinstance(layer, nn.Linear)]
    unmatched = [end for end in layers if not any(f".{name}".endswith(f".{end}") for name in linear)]
    if unmatched or not layers:
        known = sorted({".".join(part for part in name.split(".") if not part.isdigit()) for name in linear})
        raise ValueError(
            f"{type(model).__name__} has no linear layers {unmatched}; it has some that end in {', '.join(known)}."
        )
    model.requires_grad_(False)
    config = LoraConfig(
        r=rank, lora_alpha=rank if alpha is None else alpha, lora_dropout=dropout, target_modules=list(layers)
    )
    model.add_adapter(config, ADAPTER_NAME)
    for name, layer in model.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        weights = (layer.lora_A[ADAPTER_NAME], layer.lora_B[ADAPTER_NAME])
        for weight in weights:
            weight.to(torch.float32)
        nn.init.kaiming_uniform_(
            weights[0].weight,
            a=math.sqrt(5),
            generator=seeded_generator(weights[0].weight.device, seed, "lora", type(model).__name__, name),
        )
        # Autocast casts to the precision of the run; peft would first copy the inputs to that of the adapter.
        layer.cast_input_dtype_enabled = layer.get_base_layer().weight.dtype == torch.float32


def lora_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """The tensors of a model's adapter, on the CPU."""
    return {
        name: tensor.detach().cpu().contiguous()
        for name, tensor in get_peft_model_state_dict(model, adapter_name=ADAPTER_NAME).items()
    }


def save_lora_adapters(folder: str | Path, models: Mapping[str, nn.Module]) -> None:
    """Save the adapters of models, by component of the pipeline, into `pytorch_lora_weights.safetensors`."""
    HARTPipeline.save_lora_weights(
        folder,
        **{f"{name}_lora_layers": lora_tensors(model) for name, model in models.items()},
        **{
            f"{name}_lora_adapter_metadata": model.peft_config[ADAPTER_NAME].to_dict()
            for name, model in models.items()
        },
    )


def load_lora_adapters(folder: str | Path, models: Mapping[str, nn.Module]) -> None:
    """
    Load what [`save_lora_adapters`] saved into the adapters of the same models.

    Raises:
        ValueError: If they have other layers or another rank.
    """
    state_dict = HARTPipeline.lora_state_dict(folder)
    shapes = {key: tuple(tensor.shape) for key, tensor in state_dict.items()}
    expected = {
        f"{name}.{key}": tuple(tensor.shape)
        for name, model in models.items()
        for key, tensor in lora_tensors(model).items()
    }
    if differing := [key for key in {**expected, **shapes} if expected.get(key) != shapes.get(key)]:
        raise ValueError(
            f"The adapter in {folder} has other layers or another rank than this run: {differing[0]} is "
            f"{shapes.get(differing[0])} there and {expected.get(differing[0])} here. Resume with the same settings."
        )
    for name, (tensors, _) in split_components(state_dict, None, models).items():
        set_peft_model_state_dict(models[name], tensors, adapter_name=ADAPTER_NAME)


def checkpoint_adapters(accelerator: Accelerator, models: Mapping[str, nn.Module]) -> None:
    """Have the accelerator's checkpoints hold the adapters of the models, not the frozen weights under them."""

    def save(modules: list[nn.Module], weights: list[dict], folder: str) -> None:
        weights.clear()
        if accelerator.is_main_process:
            save_lora_adapters(folder, models)

    def load(modules: list[nn.Module], folder: str) -> None:
        modules.clear()
        load_lora_adapters(folder, models)

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)
