# SPDX-License-Identifier: Apache-2.0
"""Train the transformer and the residual MLP of a class-conditional HART pipeline."""

import argparse
from pathlib import Path
from typing import Any

import torch

from diffusers_hart import (
    HARTClassConditionalPipeline,
    HARTResidualScheduler,
    HARTTransformer2DModel,
    HybridTokenizer,
)
from diffusers_hart.training.arguments import (
    add_data_arguments,
    add_hart_arguments,
    add_training_arguments,
    positive_int,
    share,
)
from diffusers_hart.training.finetuning import frozen_dtype, trainable_models, training_module, training_settings
from diffusers_hart.training.new_models import config_of, new_scheduler, read_config
from diffusers_hart.training.publishing import hub_repository, publish_pipeline
from diffusers_hart.training.train_loop import create_accelerator, mean_figures, train
from diffusers_hart.training.training_data import (
    batch_targets,
    open_training_data,
    training_preparer,
    training_scales,
)
from diffusers_hart.training.validation import log_validation
from diffusers_hart.training.weight_updates import WeightUpdates


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add_hart_arguments(parser)
    parser.add_argument(
        "--depth", type=positive_int, default=20, help="of the transformer of a new pipeline; 64 times as wide"
    )
    parser.add_argument("--label_dropout", type=share, default=0.1, help="share of labels that are left out")
    parser.add_argument(
        "--validation_label", nargs="+", type=int, default=[], help="one or several; none, no validation"
    )
    add_data_arguments(parser, caption_column=None)
    parser.add_argument("--label_column", default="label", help="class of a picture, an integer from 0")
    add_training_arguments(parser)
    args = parser.parse_args(argv)
    if (args.pretrained_model_name_or_path is None) == (args.vae_path is None):
        parser.error("either --pretrained_model_name_or_path or, for a new pipeline, --vae_path is needed")
    if args.scheduler_config is not None and args.vae_path is None:
        parser.error("--scheduler_config is of a new pipeline, which --vae_path makes")
    args.from_scratch = args.from_scratch or args.vae_path is not None
    return args


def load_pipeline(args: argparse.Namespace, dtype: dict[str, torch.dtype] | None = None, **parts: Any):
    """The pipeline to start from; a new one has a tokenizer and its schedules of scales, but no transformer."""
    if args.vae_path is None:
        return HARTClassConditionalPipeline.from_pretrained(
            args.pretrained_model_name_or_path, revision=args.revision, variant=args.variant, dtype=dtype, **parts
        )
    vae_dtype = None if dtype is None else dtype["default"]
    vae = HybridTokenizer.from_pretrained(args.vae_path, subfolder=args.vae_subfolder, dtype=vae_dtype)
    scheduler = new_scheduler(vae, args.scheduler_config)
    return HARTClassConditionalPipeline(**{"transformer": None, "vae": vae, "scheduler": scheduler, **parts})


def new_transformer_config(
    args: argparse.Namespace, pipe: HARTClassConditionalPipeline, num_classes: int | None
) -> dict[str, Any]:
    """Arguments of a transformer from scratch: those of the pipeline's own, or the width and heads of its depth."""
    if pipe.transformer is not None:
        config = config_of(pipe.transformer)
    else:
        config = {
            "in_channels": pipe.vae.config.latent_channels,
            "codebook_size": pipe.vae.config.codebook_size,
            "num_layers": args.depth,
            "num_attention_heads": args.depth,
            "caption_channels": None,
        }
    known = {} if num_classes is None else {"num_classes": num_classes}
    return config | known | read_config(args.transformer_config, HARTTransformer2DModel)


def class_names(source: Any, label_column: str) -> list[str] | None:
    """The names of the classes, where a data set has them."""
    feature = (getattr(source, "features", None) or {}).get(label_column)
    return getattr(feature, "names", None)


def main(argv: list[str] | None = None) -> Path:
    args = parse_args(argv)
    accelerator = create_accelerator(args)
    repo_id = hub_repository(args) if accelerator.is_main_process else None

    # 1. What is frozen, in the precision of the run, and the data, which may say what classes there are
    dtypes = {"transformer": torch.float32, "residual_mlp": torch.float32, "default": frozen_dtype(accelerator)}
    pipe = load_pipeline(args, dtypes)
    vae = pipe.vae.requires_grad_(False).to(accelerator.device)
    if args.compile:
        vae.encoder.compile()
    schedulers = {
        "scheduler": pipe.scheduler,
        "residual_scheduler": pipe.residual_scheduler or HARTResidualScheduler(),
    }
    sample_size = vae.config.scales[-1] if pipe.transformer is None else pipe.transformer.config.sample_size
    scales = training_scales(pipe.scheduler, vae, args.resolution, sample_size)
    with accelerator.main_process_first():
        source = open_training_data(args, vae, scales, args.label_column, ("label",))
    names = class_names(source, args.label_column if args.precomputed_data_dir is None else "label")
    id2label = dict(enumerate(names)) if names else pipe.config.id2label

    # 2. The models that are trained, in float32
    new_config = new_transformer_config(args, pipe, len(names) if names else None)
    if new_config.get("num_classes") is None:
        raise ValueError("The data do not say how many classes there are: give `num_classes` in --transformer_config.")
    models = trainable_models(args, pipe.transformer, pipe.residual_mlp, vae, scales, new_config)
    num_classes = models["transformer"].config.num_classes
    if names and len(names) != num_classes:
        raise ValueError(f"The data set has {len(names)} classes, the transformer {num_classes}.")
    if bad := [label for label in args.validation_label if not 0 <= label < num_classes]:
        raise ValueError(f"--validation_label must be in [0, {num_classes}), not {bad}.")
    module = training_module(args, models, vae, pipe.scheduler, scales, args.label_dropout)
    prepare = training_preparer(args, source, vae, scales, args.label_column, num_classes)

    # 3. One step
    weights = WeightUpdates(args, accelerator, module)

    def training_step(micro_batches: list[dict[str, Any]], step: int) -> dict[str, torch.Tensor]:
        def losses(batch: dict[str, Any]) -> dict[str, torch.Tensor]:
            class_labels = batch["label"].to(accelerator.device, non_blocking=True)
            return weights.module(
                batch_targets(batch, vae, scales), step, batch["position"], class_labels=class_labels
            )

        for batch in micro_batches:
            batch |= {name: torch.tensor(batch[name]) for name in ("label", "position")}
        return mean_figures([weights.step(losses, batch, module.num_kept_tokens(step)) for batch in micro_batches])

    # 4. Validation, with the averaged weights if there are any
    conditions = [{"class_labels": [label] * args.num_validation_images} for label in args.validation_label]

    def validate(step: int) -> None:
        with weights.for_inference() as current:
            if current:
                log_validation(
                    args, accelerator, HARTClassConditionalPipeline(vae=vae, **schedulers, **current), conditions, step
                )

    # 5. The run, and the pipeline with the tokenizer's weights as they were stored
    train(args, accelerator, source, prepare, training_step, validate if conditions else None)
    with weights.for_inference() as current:
        if current:
            publish_pipeline(
                args,
                load_pipeline(args, **current, **schedulers, id2label=id2label),
                "A class-conditional pipeline of HART, trained with diffusers-hart.",
                training_settings(args, accelerator, scales),
                pipeline_tag=None,
                repo_id=repo_id,
                base_model=args.pretrained_model_name_or_path,
            )
    accelerator.end_training()
    return Path(args.output_dir)


if __name__ == "__main__":
    main()
