#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Train a HART tokenizer, from scratch or from a saved one; see README.md beside this file."""

import argparse
import itertools
from pathlib import Path
from typing import Any

import torch
from accelerate import DistributedType
from accelerate.utils import DistributedDataParallelKwargs
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import logging

from diffusers_hart import HybridTokenizer
from diffusers_hart.training.adversarial_loss import AdversarialLoss
from diffusers_hart.training.arguments import add_data_arguments, add_training_arguments
from diffusers_hart.training.codebook_usage import CodebookUsage
from diffusers_hart.training.data import ExampleStream, collate, finish_batch
from diffusers_hart.training.data_sources import image_preparer, load_image_source
from diffusers_hart.training.new_models import read_config, weights_from
from diffusers_hart.training.patch_discriminator import PatchDiscriminator
from diffusers_hart.training.perceptual_loss import load_perceptual_loss
from diffusers_hart.training.publishing import hub_repository, publish_pipeline
from diffusers_hart.training.random_draws import seeded_generator
from diffusers_hart.training.tokenizer_training import (
    TokenizerTrainingModule,
    parse_phases,
    phase_of_step,
    quantize_for_training,
)
from diffusers_hart.training.train_loop import create_accelerator, mean_figures, train
from diffusers_hart.training.validation import log_image_grid
from diffusers_hart.training.weight_updates import WeightUpdates


logger = logging.get_logger("train_hybrid_tokenizer")

SIZES = ("latent_channels", "block_out_channels", "layers_per_block", "norm_num_groups", "codebook_size", "num_phi")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    def integers(text: str) -> tuple[int, ...]:
        return tuple(int(part) for part in text.split(","))

    parser = argparse.ArgumentParser(description=__doc__)
    add_data_arguments(parser, caption_column=None)
    add_training_arguments(parser)
    # VQGAN's usual choice, and as many steps as the phases have.
    parser.set_defaults(adam_beta1=0.5, adam_beta2=0.9, adam_weight_decay=0.0, max_train_steps=None)

    group = parser.add_argument_group("tokenizer, from scratch unless a saved one is named")
    group.add_argument("--pretrained_model_name_or_path", help="a saved tokenizer, or a pipeline that holds one")
    group.add_argument(
        "--subfolder", help="its place in there; by default 'vae' unless a tokenizer's own folder is named"
    )
    group.add_argument("--revision")
    group.add_argument("--variant")
    group.add_argument("--tokenizer_config", help="JSON file of HybridTokenizer's arguments")
    group.add_argument("--latent_channels", type=int)
    group.add_argument("--block_out_channels", type=integers, metavar="N,N,...")
    group.add_argument("--layers_per_block", type=int)
    group.add_argument("--norm_num_groups", type=int)
    group.add_argument("--codebook_size", type=int)
    group.add_argument("--num_phi", type=int)
    group.add_argument("--scales", type=integers, metavar="N,N,...", help="sides of the scales, coarsest first")

    group = parser.add_argument_group("losses")
    group.add_argument("--phases", required=True, help="such as continuous:1000,discrete:5000,alternating:2000")
    group.add_argument("--discrete_probability", type=float, default=0.5, help="in the steps of the alternating phase")
    group.add_argument("--mse_weight", type=float, default=1.0)
    group.add_argument("--l1_weight", type=float, default=0.0)
    group.add_argument("--vq_weight", type=float, default=1.0)
    group.add_argument("--commitment_weight", type=float, default=0.25)
    group.add_argument("--perceptual_weight", type=float, default=0.0, help="1 is usual; needs the package lpips")
    group.add_argument("--perceptual_net", choices=("vgg", "alex", "squeeze"), default="vgg")
    group.add_argument("--adversarial_weight", type=float, default=0.5, help="0 for no discriminator")
    group.add_argument("--fixed_adversarial_weight", action="store_true", help="not adapted to the gradients' norms")
    group.add_argument("--discriminator_start", type=int, default=10000, help="steps without the discriminator")
    group.add_argument("--discriminator_channels", type=int, default=64)
    group.add_argument("--discriminator_layers", type=int, default=3)
    group.add_argument("--discriminator_learning_rate", type=float, help="by default the tokenizer's")
    group.add_argument("--restart_codes_after", type=int, help="restart codes that were unused for so many steps")

    group = parser.add_argument_group("validation")
    group.add_argument("--validation_images", nargs="+", help="files; by default the first pictures of the data set")
    group.add_argument("--num_validation_images", type=int, default=4)

    args = parser.parse_args(argv)
    args.phases = parse_phases(args.phases)
    args.phase_steps = sum(phase.steps for phase in args.phases)
    if args.max_train_steps is None:
        args.max_train_steps = args.phase_steps
    elif args.max_train_steps > args.phase_steps:
        raise ValueError(
            f"--max_train_steps {args.max_train_steps} is more than the {args.phase_steps} steps of --phases."
        )
    if args.mixed_precision == "fp16" and args.adversarial_weight and not args.fixed_adversarial_weight:
        raise ValueError(
            "The adaptive weight of the discriminator's loss is lost in the range of fp16: use --mixed_precision bf16, "
            "--fixed_adversarial_weight or --adversarial_weight 0."
        )
    if args.adversarial_weight and args.discriminator_start >= args.phase_steps:
        logger.warning(f"Training without a discriminator: --discriminator_start {args.discriminator_start} is later.")
        args.adversarial_weight = 0.0
    return args


def load_tokenizer(args: argparse.Namespace) -> HybridTokenizer:
    sizes = {name: getattr(args, name) for name in SIZES if getattr(args, name) is not None}
    if args.pretrained_model_name_or_path is not None:
        if sizes or args.tokenizer_config:
            given = ", ".join(f"--{name}" for name in (*sizes, *["tokenizer_config"] * bool(args.tokenizer_config)))
            raise ValueError(
                f"A saved tokenizer has its sizes: leave out {given}, or --pretrained_model_name_or_path."
            )
        own_folder = (Path(args.pretrained_model_name_or_path) / "config.json").exists()
        subfolder = args.subfolder if args.subfolder is not None else "" if own_folder else "vae"
        vae = HybridTokenizer.from_pretrained(
            args.pretrained_model_name_or_path,
            subfolder=subfolder or None,
            revision=args.revision,
            variant=args.variant,
            cache_dir=args.cache_dir,
            dtype=torch.float32,
        )
        if args.scales is not None:
            vae.register_to_config(scales=args.scales)
    else:
        config = read_config(args.tokenizer_config, HybridTokenizer) | sizes
        if args.scales is not None:
            config["scales"] = args.scales
        with weights_from(args.seed):
            vae = HybridTokenizer(**config)
    side = vae.config.scales[-1] * vae.spatial_factor
    if args.resolution not in (None, side):
        raise ValueError(
            f"--resolution {args.resolution} does not fit the scales {tuple(vae.config.scales)}, which are for {side} "
            f"pixels: leave it out or pass --scales that end in {args.resolution / vae.spatial_factor:g}."
        )
    args.resolution = side
    return vae


def build_adversarial_loss(args: argparse.Namespace, channels: int) -> AdversarialLoss:
    with weights_from(args.seed):
        discriminator = PatchDiscriminator(channels, args.discriminator_channels, args.discriminator_layers)
    if args.resolution < discriminator.smallest_side:
        raise ValueError(
            f"The discriminator needs pictures of {discriminator.smallest_side} pixels a side at least, not "
            f"{args.resolution}: choose fewer --discriminator_layers or --adversarial_weight 0."
        )
    return AdversarialLoss(discriminator)


def validation_batch(args: argparse.Namespace, source: Any, device: torch.device) -> torch.Tensor | None:
    """Pictures to reconstruct, `(N, 3, resolution, resolution)`; none of training data that can be read only once."""
    if args.validation_images:
        source = args.validation_images
    elif iter(source) is source:
        return None
    count = len(args.validation_images or ()) or args.num_validation_images
    if hasattr(source, "__len__"):
        count = min(count, len(source))
    if count == 0:
        return None
    prepare = image_preparer(args.resolution, args.image_column, None, source=source)
    stream = ExampleStream(source, prepare, batch_size=1, shuffle=False, on_bad_image=args.on_bad_image)
    batch = collate(itertools.islice(stream, count))
    return finish_batch(source, batch, device, args.resolution)["pixel_values"]


@torch.no_grad()
def reconstruct(vae: HybridTokenizer, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What the decoder makes of the discrete sum, as it is trained with it, and of the continuous latents."""
    discrete, hybrid = [], []
    for image in images.split(1):
        latents = vae.encode(image).latents
        discrete.append(vae.decode(quantize_for_training(vae, latents).decoder_latents).sample)
        hybrid.append(vae.decode(latents).sample)
    return torch.cat(discrete), torch.cat(hybrid)


def peak_signal_to_noise_ratio(reconstructions: torch.Tensor, images: torch.Tensor) -> float:
    """Mean over pictures in [-1, 1], in decibels."""
    error = (reconstructions - images).square().mean((1, 2, 3)) / 4
    return (-10 * error.clamp(min=1e-12).log10()).mean().item()


def main(argv: list[str] | None = None) -> Path:
    args = parse_args(argv)
    vae = load_tokenizer(args)
    perceptual_loss = load_perceptual_loss(args.perceptual_net) if args.perceptual_weight else None
    adversarial_loss = build_adversarial_loss(args, vae.config.out_channels) if args.adversarial_weight else None
    # Phases leave weights without gradients, which DDP must be told.
    accelerator = create_accelerator(args, [DistributedDataParallelKwargs(find_unused_parameters=True)])
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise ValueError("A tokenizer is trained whole on each device: choose plain multi-GPU in accelerate's config.")
    repo_id = hub_repository(args) if accelerator.is_main_process else None

    # 1. The data
    with accelerator.main_process_first():
        source = load_image_source(
            args.dataset_name,
            args.dataset_config_name,
            args.train_data_dir,
            args.train_shards,
            args.train_iterable,
            args.image_column,
            caption_column=None,
            cache_dir=args.cache_dir,
        )
    prepare = image_preparer(
        args.resolution, args.image_column, None, args.random_crop, args.random_flip, source=source
    )
    validation_images = validation_batch(args, source, accelerator.device) if accelerator.is_main_process else None

    # 2. What is trained: the tokenizer and, against it, the discriminator
    if args.gradient_checkpointing:
        vae.enable_gradient_checkpointing()
    training = TokenizerTrainingModule(
        vae.train(),
        seed=args.seed,
        discrete_probability=args.discrete_probability,
        mse_weight=args.mse_weight,
        l1_weight=args.l1_weight,
        vq_weight=args.vq_weight,
        commitment_weight=args.commitment_weight,
        perceptual_weight=args.perceptual_weight,
        adversarial_weight=args.adversarial_weight,
        adaptive_adversarial_weight=not args.fixed_adversarial_weight,
    )
    # Learning rates do not depend on where a run is cut.
    options = {**vars(args), "max_train_steps": args.phase_steps}
    weights = WeightUpdates(argparse.Namespace(**options), accelerator, training)
    if perceptual_loss is not None:
        perceptual_loss.to(accelerator.device)
    if adversarial_loss is not None:
        if accelerator.distributed_type == DistributedType.MULTI_GPU:
            adversarial_loss = torch.nn.SyncBatchNorm.convert_sync_batchnorm(adversarial_loss)
        options["learning_rate"] = args.discriminator_learning_rate or args.learning_rate
        options["max_train_steps"] = args.phase_steps - args.discriminator_start
        options["use_ema"] = False
        discriminator_weights = WeightUpdates(argparse.Namespace(**options), accelerator, adversarial_loss)
    usage = CodebookUsage(vae.config.codebook_size, vae.config.scales)
    accelerator.register_for_checkpointing(usage)

    # 3. One step: the tokenizer's turn, the discriminator's, and what became of the codebook
    def training_step(micro_batches: list[dict[str, Any]], step: int) -> dict[str, torch.Tensor]:
        training.set_phase(phase_of_step(args.phases, step))
        adversary = adversarial_loss if step >= args.discriminator_start else None
        pictures = [batch["pixel_values"].to(accelerator.device, non_blocking=True) for batch in micro_batches]
        figures, details = [], []
        for images in pictures:
            with accelerator.accumulate(weights.module):
                losses, detail = weights.module(images, step, perceptual_loss, adversary)
                figures.append(losses | weights.update(losses["loss"]))
            details.append(detail)
        if adversary is None:
            return mean_figures(figures) | codebook_figures(details, step)

        for images, detail in zip(pictures, details):
            with accelerator.accumulate(discriminator_weights.module):
                losses = discriminator_weights.module(images, detail["reconstructions"])
                update = discriminator_weights.update(losses["discriminator_loss"])
            figures.append(losses)
        logs = mean_figures(figures)
        if "grad_norm" in update:  # of all gradients of the step
            logs["grad_norm"] = torch.hypot(logs["grad_norm"], update["grad_norm"].float())
        return logs | codebook_figures(details, step)

    def codebook_figures(details: list[dict[str, torch.Tensor]], step: int) -> dict[str, torch.Tensor]:
        if training.phase == "continuous":
            return {}
        logs = {}
        usage.update(accelerator.gather(torch.cat([detail["codes"] for detail in details])))
        if training.phase == "discrete" and args.restart_codes_after:
            residuals = accelerator.gather(torch.cat([detail["scale_residuals"] for detail in details]))
            draws = seeded_generator("cpu", args.seed, "codebook restart", step)
            logs["restarted_codes"] = usage.restart(vae.codebook, residuals, args.restart_codes_after, draws)
        if (step + 1) % args.logging_steps == 0:
            logs |= usage.report()
        return {name: torch.full((), float(value), device=accelerator.device) for name, value in logs.items()}

    # 4. Input, discrete and hybrid reconstruction of some pictures, side by side
    psnr = {}

    def validate(step: int) -> None:
        with weights.for_inference() as models:
            if not models or validation_images is None:
                return
            images = validation_images.to(accelerator.device)
            columns = {"input": images, **dict(zip(("discrete", "hybrid"), reconstruct(models["vae"], images)))}
        psnr.update({name: peak_signal_to_noise_ratio(columns[name], images) for name in ("discrete", "hybrid")})
        accelerator.log({f"psnr_{name}": value for name, value in psnr.items()}, step=step)
        side_by_side = torch.stack(list(columns.values()), dim=1).flatten(0, 1).cpu()
        pictures = VaeImageProcessor().postprocess(side_by_side, output_type="pil")
        log_image_grid(accelerator, pictures, len(columns), args.output_dir, step)

    steps = train(args, accelerator, source, prepare, training_step, validate)

    # 5. The result
    with weights.for_inference() as models:
        for model in models.values():
            publish_pipeline(
                args,
                model,
                f"A tokenizer of HART ([paper](https://huggingface.co/papers/2410.10812)) for pictures of "
                f"{args.resolution} x {args.resolution} pixels, with the scales {', '.join(map(str, model.config.scales))}.",
                {
                    "Steps": f"{steps} of {', '.join(f'{phase.name} {phase.steps}' for phase in args.phases)}",
                    "Weights of the losses": ", ".join(
                        f"{name} {getattr(args, f'{name}_weight'):g}"
                        for name in ("mse", "l1", "vq", "perceptual", "adversarial")
                    ),
                    "Learning rate": args.learning_rate,
                    "Moving average of the weights": args.ema_decay if args.use_ema else "no",
                    **{f"PSNR of the validation pictures, {name}": f"{value:.2f} dB" for name, value in psnr.items()},
                },
                pipeline_tag=None,
                repo_id=repo_id,
                base_model=args.pretrained_model_name_or_path,
            )
    accelerator.end_training()
    return Path(args.output_dir)


if __name__ == "__main__":
    main()
