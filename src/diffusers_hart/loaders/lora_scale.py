# SPDX-License-Identifier: Apache-2.0
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from numbers import Real
from threading import RLock
from weakref import WeakKeyDictionary

import torch
import torch.nn as nn
from diffusers.utils import logging, scale_lora_layers
from peft.tuners.lora import LoraLayer


logger = logging.get_logger(__name__)

_LOCKS: WeakKeyDictionary[nn.Module, RLock] = WeakKeyDictionary()


@contextmanager
def scaled_lora(models: Iterable[nn.Module | None], scale: float | None) -> Iterator[None]:
    """
    Within this context the active LoRA adapters of the models have `scale` times their weight; after it, also after an
    exception, exactly the weight they had before. `None` and 1 change nothing. The scale is part of the models: a thread
    that wants another one of models with adapters waits until this context is left.

    Raises:
        ValueError: If `scale` is not a number.
    """
    if scale is None:
        yield
        return
    if not isinstance(scale, Real) or isinstance(scale, bool):
        raise ValueError(f'The `"scale"` of LoRA layers must be a number, not {scale!r}.')
    models = [model for model in models if model is not None]
    layers = [layer for model in models for layer in model.modules() if isinstance(layer, LoraLayer)]
    if scale != 1 and any(layer.merged for layer in layers):
        logger.warning(
            f"A LoRA scale of {scale} has no effect on adapters that are fused: `unfuse_lora()` them first."
        )
    with ExitStack() as locks:
        # In one order, or two threads could wait for each other.
        for model in sorted({id(model): model for model in models}.values(), key=id):
            if layers:
                locks.enter_context(_LOCKS.setdefault(model, RLock()))
        yield from _scaled(models, layers, scale)


def _scaled(models: list[nn.Module], layers: list[LoraLayer], scale: float) -> Iterator[None]:
    before = [{name: _copy(value) for name, value in layer.scaling.items()} for layer in layers]
    try:
        for model in models:
            scale_lora_layers(model, scale)
        yield
    finally:
        for layer, scaling in zip(layers, before):
            for name, value in scaling.items():
                if isinstance(value, torch.Tensor):
                    layer.scaling[name].copy_(value)
                else:
                    layer.scaling[name] = value


def _copy(value: float | torch.Tensor) -> float | torch.Tensor:
    return value.clone() if isinstance(value, torch.Tensor) else value  # a tensor once adapters can be hot-swapped
