# SPDX-License-Identifier: Apache-2.0
import argparse
from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import ModelMixin
from transformers import PreTrainedModel

from ..models import HARTTransformer2DModel, HybridTokenizer, ResidualDiffusionMLP
from ..schedulers import HARTResidualScheduler, HARTScheduler
from .new_models import check_models_fit, config_of, new_residual_mlp, new_transformer, read_config
from .training_module import HARTTrainingModule


def frozen_dtype(accelerator: Accelerator) -> torch.dtype:
    """What the models that are not trained compute in: the precision of the run."""
    return {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32)


def trainable_models(
    args: argparse.Namespace,
    transformer: HARTTransformer2DModel | None,
    residual_mlp: ResidualDiffusionMLP | None,
    vae: HybridTokenizer,
    scales: Sequence[int],
    new_config: dict[str, Any],
    text_encoder: PreTrainedModel | None = None,
) -> dict[str, ModelMixin]:
    r"""
    The models a run trains: given ones, or with `--from_scratch` new ones.

    Args:
        args (`argparse.Namespace`): The arguments of [`add_hart_arguments`] and [`add_training_arguments`].
        transformer ([`HARTTransformer2DModel`], *optional*): The one to start from; unused from scratch.
        residual_mlp ([`ResidualDiffusionMLP`], *optional*): The one to start from; without one a new one is made.
        vae ([`HybridTokenizer`]): The tokenizer they have to fit.
        scales (`Sequence[int]`): Sides of the scales of the training resolution.
        new_config (`dict[str, Any]`): Arguments of a new transformer; unused otherwise.
        text_encoder (`PreTrainedModel`, *optional*): The text encoder they have to fit.

    Returns:
        `dict[str, ModelMixin]`: `transformer` and `residual_mlp`, in float32.

    Raises:
        ValueError: If the models do not fit each other, the tokenizer, the text encoder or the number of scales, or if
            the arguments contradict each other.
    """
    first_scales_alone = getattr(args, "num_scales", None)
    if first_scales_alone is not None and not 2 <= first_scales_alone < len(scales):
        raise ValueError(f"--num_scales must be from 2 to {len(scales) - 1}, not {first_scales_alone}.")
    if first_scales_alone is not None and args.self_correction:
        raise ValueError("--num_scales, the first scales alone, goes without --self_correction.")
    if not args.from_scratch and (args.transformer_config or (args.residual_mlp_config and residual_mlp is not None)):
        raise ValueError("--transformer_config and --residual_mlp_config describe new models: add --from_scratch.")
    if args.from_scratch:
        transformer = new_transformer({**new_config, "sample_size": scales[-1]}, args.seed)
    transformer.register_to_config(sample_size=scales[-1])
    if args.from_scratch or residual_mlp is None:
        config = {} if residual_mlp is None else config_of(residual_mlp)
        config |= {"in_channels": vae.config.latent_channels, "condition_dim": transformer.inner_dim}
        config |= read_config(args.residual_mlp_config, ResidualDiffusionMLP)
        residual_mlp = new_residual_mlp(config, args.seed)
    check_models_fit(transformer, residual_mlp, vae, scales, text_encoder)
    models = {"transformer": transformer, "residual_mlp": residual_mlp}
    for model in models.values():
        model.requires_grad_(True).train()
        if args.gradient_checkpointing:
            model.enable_gradient_checkpointing()
        if args.compile:
            model.compile_repeated_blocks(dynamic=True)
    if first_scales_alone is not None:  # without a residual, what serves it alone gets no gradient
        residual_mlp.requires_grad_(False)
        transformer.residual_norm.requires_grad_(False)
    return models


def training_module(
    args: argparse.Namespace,
    models: dict[str, ModelMixin],
    vae: HybridTokenizer,
    scheduler: HARTScheduler,
    scales: Sequence[int],
    condition_dropout: float,
) -> HARTTrainingModule:
    """What the accelerator is to prepare, from the arguments of a run and the models of [`trainable_models`]."""
    return HARTTrainingModule(
        **models,
        vae=vae,
        scheduler=scheduler,
        residual_scheduler=HARTResidualScheduler(),
        scales=scales,
        seed=args.seed,
        token_drop=not args.no_token_drop,
        condition_dropout=condition_dropout,
        residual_loss_weight=args.residual_loss_weight,
        residual_batch_multiplier=args.residual_batch_multiplier,
        self_correction=args.self_correction,
        num_scales=args.num_scales,
    )


def training_settings(args: argparse.Namespace, accelerator: Accelerator, scales: Sequence[int]) -> dict[str, object]:
    """What a model card says of how a model was trained."""
    batch_size = args.train_batch_size * args.gradient_accumulation_steps * accelerator.num_processes
    settings = {
        "Scales": " ".join(str(side) for side in scales[: getattr(args, "num_scales", None)]),
        "Steps": args.max_train_steps,
        "Pictures a step": batch_size,
        "Learning rate": f"{args.learning_rate:g}, {args.lr_scheduler}",
        "Precision": accelerator.mixed_precision,
        "Weights": f"average, decay {args.ema_decay:g}" if args.use_ema else "of the last step",
        "Token drop": "no" if args.no_token_drop else "yes",
        "Seed": args.seed,
    }
    if getattr(args, "self_correction", 0):
        settings["Tokens drawn for self-correction"] = f"up to {args.self_correction:g} of a picture's"
    return settings
