# SPDX-License-Identifier: Apache-2.0
import inspect
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import ModelMixin
from diffusers.configuration_utils import ConfigMixin
from transformers import PreTrainedModel, Qwen2Config, Qwen2Model

from ..models import HARTTransformer2DModel, HybridTokenizer, ResidualDiffusionMLP
from ..schedulers import HARTScheduler
from .initialization import initialize_residual_mlp, initialize_transformer
from .random_draws import seeded_generator


def config_of(model: ModelMixin) -> dict[str, Any]:
    """The arguments a model was made with."""
    return {name: model.config[name] for name in _arguments(type(model))}


def read_config(path: str | None, model_class: type[ConfigMixin]) -> dict[str, Any]:
    """
    Arguments of a model or scheduler from a JSON file, such as the `config.json` of a saved one; none without a file.

    Raises:
        ValueError: If the file has names that the model does not know.
    """
    if path is None:
        return {}
    with open(path) as file:
        config = {name: value for name, value in json.load(file).items() if not name.startswith("_")}
    if unknown := sorted(set(config) - set(_arguments(model_class))):
        raise ValueError(f"{path}: {model_class.__name__} has no {unknown}; it has {_arguments(model_class)}.")
    return config


def read_text_encoder_config(path: str | None) -> dict[str, Any]:
    """
    Arguments of a `Qwen2Config` from a JSON file; none without a file.

    Raises:
        ValueError: If the file has names that the configuration does not know.
    """
    if path is None:
        return {}
    with open(path) as file:
        config = json.load(file)
    known = Qwen2Config().to_dict()
    if unknown := sorted(set(config) - set(known)):
        raise ValueError(f"{path}: Qwen2Config has no {unknown}; it has {sorted(known)}.")
    return config


@contextmanager
def weights_from(seed: int) -> Iterator[None]:
    """Models built in here get weights that are a function of the seed; global random numbers stay as they were."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # of the CPU alone, unlike torch.manual_seed
        yield


def new_text_encoder(config: Qwen2Config, seed: int) -> Qwen2Model:
    """A text encoder to train from the beginning, in float32; its weights are a function of `seed`."""
    with weights_from(seed):
        return Qwen2Model(config)


def new_transformer(config: dict[str, Any], seed: int) -> HARTTransformer2DModel:
    """A transformer to train from the beginning; its weights are a function of `seed`."""
    transformer = HARTTransformer2DModel(**config)
    initialize_transformer(transformer, seeded_generator("cpu", seed, "transformer"))
    return transformer


def new_residual_mlp(config: dict[str, Any], seed: int) -> ResidualDiffusionMLP:
    """A residual MLP to train from the beginning; its weights are a function of `seed`."""
    residual_mlp = ResidualDiffusionMLP(**config)
    initialize_residual_mlp(residual_mlp, seeded_generator("cpu", seed, "residual MLP"))
    return residual_mlp


def new_scheduler(vae: HybridTokenizer, config_path: str | None = None) -> HARTScheduler:
    """
    A scheduler with the arguments of a JSON file and, unless that says otherwise, the schedule of scales that the
    tokenizer was trained with and the published ones of other sizes.
    """
    config = read_config(config_path, HARTScheduler)
    if "schedules" not in config:
        own = tuple(vae.config.scales)
        published = HARTScheduler().config.schedules
        others = [tuple(schedule) for schedule in published if schedule[-1] != own[-1]]
        config["schedules"] = tuple(sorted([*others, own], key=lambda schedule: schedule[-1]))
    return HARTScheduler(**config)


def check_models_fit(
    transformer: HARTTransformer2DModel,
    residual_mlp: ResidualDiffusionMLP,
    vae: HybridTokenizer,
    scales: tuple[int, ...],
    text_encoder: PreTrainedModel | None = None,
) -> None:
    """Raises `ValueError` with the two numbers that should agree and do not."""
    pairs = [
        ("transformer's `in_channels`", transformer.config.in_channels, "latent_channels of the tokenizer"),
        ("transformer's `codebook_size`", transformer.config.codebook_size, "codebook_size of the tokenizer"),
        ("residual MLP's `in_channels`", residual_mlp.config.in_channels, "latent_channels of the tokenizer"),
        ("residual MLP's `condition_dim`", residual_mlp.config.condition_dim, "width of the transformer"),
    ]
    expected = {
        "latent_channels of the tokenizer": vae.config.latent_channels,
        "codebook_size of the tokenizer": vae.config.codebook_size,
        "width of the transformer": transformer.inner_dim,
    }
    if text_encoder is not None:
        pairs.append(("transformer's `caption_channels`", transformer.config.caption_channels, "text encoder's width"))
        expected["text encoder's width"] = text_encoder.config.hidden_size
    for name, value, other in pairs:
        if value != expected[other]:
            raise ValueError(f"The {name} is {value}, but the {other} is {expected[other]}.")
    num_levels = transformer.config.num_levels
    if num_levels is not None and num_levels < len(scales):
        raise ValueError(
            f"The transformer has embeddings of {num_levels} levels, too few for the {len(scales)} scales of this "
            "resolution; train one without `num_levels`."
        )


def _arguments(model_class: type[ConfigMixin]) -> list[str]:
    return [name for name in inspect.signature(model_class.__init__).parameters if name != "self"]
