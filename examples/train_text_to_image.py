# SPDX-License-Identifier: Apache-2.0
"""Train the transformer and the residual MLP of a HART text-to-image pipeline."""

import argparse
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModel, AutoTokenizer

from diffusers_hart import HARTPipeline, HARTResidualScheduler, HARTTransformer2DModel, HybridTokenizer
from diffusers_hart.training.arguments import add_data_arguments, add_hart_arguments, add_training_arguments, share
from diffusers_hart.training.caption_encoder import CaptionEncoder
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
        "--text_encoder_path", help="folder or id on the Hub with the text_encoder and tokenizer of a new pipeline"
    )
    parser.add_argument("--caption_dropout", type=share, default=0.1, help="share of captions that are left out")
    parser.add_argument("--validation_prompt", nargs="+", default=[], help="one or several; none, no validation")
    add_data_arguments(parser)
    add_training_arguments(parser)
    args = parser.parse_args(argv)
    new_parts = [args.vae_path, args.text_encoder_path]
    if new_parts.count(None) != (0 if args.pretrained_model_name_or_path is None else 2):
        parser.error(
            "either --pretrained_model_name_or_path or, for a new pipeline, --vae_path and --text_encoder_path are needed"
        )
    if args.scheduler_config is not None and args.vae_path is None:
        parser.error("--scheduler_config is of a new pipeline, which --vae_path and --text_encoder_path make")
    args.from_scratch = args.from_scratch or args.vae_path is not None
    return args


def load_pipeline(args: argparse.Namespace, dtype: dict[str, torch.dtype | str], **parts: Any) -> HARTPipeline:
    """The pipeline to start from; a new one has its frozen parts and its schedules of scales, but no transformer."""
    if args.vae_path is None:
        return HARTPipeline.from_pretrained(
            args.pretrained_model_name_or_path, revision=args.revision, variant=args.variant, dtype=dtype, **parts
        )
    vae = HybridTokenizer.from_pretrained(args.vae_path, subfolder=args.vae_subfolder, dtype=dtype["default"])
    new = {
        "tokenizer": AutoTokenizer.from_pretrained(args.text_encoder_path, subfolder="tokenizer"),
        "text_encoder": AutoModel.from_pretrained(
            args.text_encoder_path, subfolder="text_encoder", dtype=dtype.get("text_encoder", dtype["default"])
        ),
        "transformer": None,
        "vae": vae,
        "scheduler": new_scheduler(vae, args.scheduler_config),
    }
    return HARTPipeline(**{**new, **parts})


def new_transformer_config(args: argparse.Namespace, pipe: HARTPipeline) -> dict[str, Any]:
    """Arguments of a transformer from scratch: those of the pipeline's own, or the published sizes on what is frozen."""
    if pipe.transformer is not None:
        config = config_of(pipe.transformer)
    else:
        config = {
            "in_channels": pipe.vae.config.latent_channels,
            "codebook_size": pipe.vae.config.codebook_size,
            "caption_channels": pipe.text_encoder.config.hidden_size,
        }
    return config | read_config(args.transformer_config, HARTTransformer2DModel)


def main(argv: list[str] | None = None) -> Path:
    args = parse_args(argv)
    accelerator = create_accelerator(args)
    repo_id = hub_repository(args) if accelerator.is_main_process else None

    # 1. The models: those that are trained in float32, the frozen ones in the precision of the run
    dtypes = {"transformer": torch.float32, "residual_mlp": torch.float32, "default": frozen_dtype(accelerator)}
    pipe = load_pipeline(args, dtypes)
    vae = pipe.vae.requires_grad_(False).to(accelerator.device)
    if args.compile:
        vae.encoder.compile()
    text_encoder = pipe.text_encoder.requires_grad_(False).to(accelerator.device)
    schedulers = {
        "scheduler": pipe.scheduler,
        "residual_scheduler": pipe.residual_scheduler or HARTResidualScheduler(),
    }
    sample_size = vae.config.scales[-1] if pipe.transformer is None else pipe.transformer.config.sample_size
    scales = training_scales(pipe.scheduler, vae, args.resolution, sample_size)
    new_config = new_transformer_config(args, pipe)
    models = trainable_models(args, pipe.transformer, pipe.residual_mlp, vae, scales, new_config, text_encoder)
    pipe.register_modules(**models)
    module = training_module(args, models, vae, pipe.scheduler, scales, args.caption_dropout)

    # 2. The data: pictures or their targets, captions or their embeddings
    config = module.transformer.config
    with accelerator.main_process_first():
        columns = (args.caption_column, ("prompt_embeds", "caption"))
        source = open_training_data(args, vae, scales, *columns, config.caption_channels)
    captions = CaptionEncoder(pipe, config.caption_length)
    prepare = captions.tokenized(training_preparer(args, source, vae, scales, args.caption_column))

    def encode_text(batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        text = batch if "prompt_embeds" in batch else captions.encode(batch["input_ids"])
        names = ("prompt_embeds", "prompt_attention_mask")
        return {name: text[name].to(accelerator.device, non_blocking=True) for name in names}

    # 3. One step
    weights = WeightUpdates(args, accelerator, module)

    def training_step(micro_batches: list[dict[str, Any]], step: int) -> dict[str, torch.Tensor]:
        def losses(batch: dict[str, Any]) -> dict[str, torch.Tensor]:
            targets = batch_targets(batch, vae, scales)
            return weights.module(targets, step, batch["position"], **encode_text(batch))

        for batch in micro_batches:
            captions.warn_of_cut(batch.get("caption_tokens", ()))
            batch["position"] = torch.tensor(batch["position"])
        return mean_figures([weights.step(losses, batch, module.num_kept_tokens(step)) for batch in micro_batches])

    # 4. Validation, with the averaged weights if there are any
    prompts = [captions([prompt]) for prompt in args.validation_prompt]
    conditions = [prompt | {"num_images_per_prompt": args.num_validation_images} for prompt in prompts]
    if args.precomputed_data_dir is not None and "prompt_embeds" in source.column_names:
        text_encoder.to("cpu")

    def validate(step: int) -> None:
        with weights.for_inference() as current:
            if current:
                drawing = HARTPipeline(tokenizer=None, text_encoder=None, vae=vae, **schedulers, **current)
                log_validation(args, accelerator, drawing, conditions, step)

    # 5. The run, and the pipeline with the frozen weights as they were stored
    train(args, accelerator, source, prepare, training_step, validate if conditions else None)
    with weights.for_inference() as current:
        if current:
            publish_pipeline(
                args,
                load_pipeline(args, {"text_encoder": "auto", "default": torch.float32}, **current, **schedulers),
                "A text-to-image pipeline of HART, trained with diffusers-hart.",
                training_settings(args, accelerator, scales),
                pipeline_tag="text-to-image",
                repo_id=repo_id,
                base_model=args.pretrained_model_name_or_path,
            )
    accelerator.end_training()
    return Path(args.output_dir)


if __name__ == "__main__":
    main()
