# SPDX-License-Identifier: Apache-2.0
import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedType

from ..pipelines import HARTPipeline
from ..schedulers import HARTResidualScheduler
from .arguments import add_loss_arguments, positive_int, share
from .caption_encoder import CaptionEncoder
from .dreambooth import PRIOR_PREFIX, split_prior
from .example_cache import LARGEST_CACHED_BY_DEFAULT, cache_examples, can_cache
from .finetuning import frozen_dtype, training_settings
from .lora import (
    RESIDUAL_MLP_LAYERS,
    TEXT_ENCODER_LAYERS,
    TRANSFORMER_LAYERS,
    add_lora_adapter,
    checkpoint_adapters,
)
from .lora_module import LoraTrainingModule
from .lora_publishing import publish_lora
from .new_models import check_models_fit
from .random_draws import seeded_generator
from .teacher_forcing import TeacherForcingTargets
from .train_loop import mean_figures, train
from .training_data import batch_targets, training_scales
from .validation import log_validation
from .weight_updates import WeightUpdates


TARGET_NAMES = ("scale_inputs", "codes", "last_scale")
TEXT_NAMES = ("prompt_embeds", "prompt_attention_mask")


def add_lora_arguments(parser: argparse.ArgumentParser, caption_dropout: float) -> None:
    """What the training of adapters has besides data and run: the model, the adapters, the losses, the validation."""
    group = parser.add_argument_group("model")
    group.add_argument("--pretrained_model_name_or_path", required=True, help="a folder or an id on the Hub")
    group.add_argument("--revision", help="branch, tag or commit of it on the Hub")
    group.add_argument("--variant", help="variant of its files, such as fp16")
    group.add_argument("--compile", action="store_true", help="compile the repeated blocks, with dynamic shapes")

    group = parser.add_argument_group("adapters")
    group.add_argument("--rank", type=positive_int, default=4)
    group.add_argument("--lora_alpha", type=float, help="the adapters count alpha / rank times; by default once")
    group.add_argument("--lora_dropout", type=share, default=0.0)
    group.add_argument(
        "--lora_layers",
        type=lambda text: [name.strip() for name in text.split(",")],
        default=list(TRANSFORMER_LAYERS),
        help=f"ends of names of the transformer's layers, with commas; by default {','.join(TRANSFORMER_LAYERS)}",
    )
    group.add_argument("--train_residual_mlp", action="store_true", help="adapters on the residual MLP as well")
    group.add_argument("--train_text_encoder", action="store_true", help="adapters on the text encoder as well")
    group.add_argument(
        "--cache_latents",
        action=argparse.BooleanOptionalAction,
        help="encode pictures and captions once and keep them in memory; by default up to "
        f"{LARGEST_CACHED_BY_DEFAULT} pictures that are neither cropped nor flipped at random",
    )
    group.add_argument(
        "--caption_dropout", type=share, default=caption_dropout, help="share of captions that are left out"
    )
    add_loss_arguments(parser)
    parser.add_argument("--validation_prompt", nargs="+", default=[], help="one or several; none, no validation")


class LoraTraining:
    r"""
    The training of adapters of a text-to-image pipeline: what the scripts have in common once they have their data. The
    models are frozen in the precision of the run, the adapters in float32.

    Args:
        args (`argparse.Namespace`): The arguments of [`add_lora_arguments`] and [`add_training_arguments`].
        accelerator (`Accelerator`): Of the run.

    Raises:
        ValueError: If layers are named that the transformer does not have, models do not fit each other, the pipeline
            has no residual MLP, or parameters are sharded.
    """

    def __init__(self, args: argparse.Namespace, accelerator: Accelerator):
        if accelerator.distributed_type == DistributedType.FSDP:
            raise ValueError("Adapters are trained whole: launch with --multi_gpu instead of FSDP.")
        self.args = args
        self.accelerator = accelerator
        self.pipe = HARTPipeline.from_pretrained(
            args.pretrained_model_name_or_path,
            revision=args.revision,
            variant=args.variant,
            dtype=frozen_dtype(accelerator),
        )
        if self.pipe.residual_mlp is None:
            raise ValueError(
                f"{args.pretrained_model_name_or_path} has no residual MLP: train one with train_text_to_image.py first."
            )
        self.vae = self.pipe.vae.requires_grad_(False)
        self.text_encoder = self.pipe.text_encoder.requires_grad_(False)
        transformer, residual_mlp = self.pipe.transformer, self.pipe.residual_mlp.requires_grad_(False)
        self.scales = training_scales(self.pipe.scheduler, self.vae, args.resolution, transformer.config.sample_size)
        check_models_fit(transformer, residual_mlp, self.vae, self.scales, self.text_encoder)

        self.adapted = {"transformer": (transformer, args.lora_layers)}
        if args.train_residual_mlp:
            blocks = [name for name, _ in residual_mlp.named_modules() if name.startswith("blocks.")]
            self.adapted["residual_mlp"] = (
                residual_mlp,
                [name for name in blocks if name.endswith(RESIDUAL_MLP_LAYERS)],
            )
        if args.train_text_encoder:
            self.adapted["text_encoder"] = (self.text_encoder, TEXT_ENCODER_LAYERS)
        for model, layers in self.adapted.values():
            add_lora_adapter(model, layers, args.rank, args.lora_alpha, args.lora_dropout, args.seed)
        self.adapted = {name: model for name, (model, _) in self.adapted.items()}

        for model in (transformer, residual_mlp):
            if args.gradient_checkpointing:
                model.enable_gradient_checkpointing()
            if args.compile:
                model.compile_repeated_blocks(dynamic=True)
        if args.gradient_checkpointing and args.train_text_encoder:
            self.text_encoder.gradient_checkpointing_enable({"use_reentrant": False})
        self.pipe.to(accelerator.device)
        self.encode_captions = CaptionEncoder(self.pipe, transformer.config.caption_length, args.train_text_encoder)
        self.reads_captions = (
            args.train_text_encoder
        )  # and, once `cached` has met data that are too many, otherwise too

    def prompt_embeds(self, captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeddings `(batch_size, tokens, caption_channels)` of captions, and their mask."""
        text = self.encode_captions(captions)
        return text["prompt_embeds"], text["prompt_attention_mask"]

    @torch.no_grad()
    def encode(self, batch: dict[str, Any]) -> dict[str, Any]:
        """
        What the frozen models make of a batch of pictures, or of targets computed before, and of its captions: the
        targets and, unless the text encoder is trained, embeddings; of pairs also those of the class's picture.
        """
        encoded = {}
        for prefix, part in zip(("", PRIOR_PREFIX), split_prior(batch)):
            if part and TARGET_NAMES[0] not in part:
                targets = vars(batch_targets(part, self.vae, self.scales))
                part = {
                    name: value for name, value in part.items() if name == "caption" or name in TEXT_NAMES
                } | targets
            if self.args.train_text_encoder:
                part = {name: value for name, value in part.items() if name not in TEXT_NAMES}
            elif TEXT_NAMES[0] not in part and part:
                embeds, mask = self.prompt_embeds(part.pop("caption"))
                part |= {"prompt_embeds": embeds, "prompt_attention_mask": mask}
            encoded |= {f"{prefix}{name}": value for name, value in part.items()}
        return encoded

    def cached(
        self, source: Any, prepare: Callable[[Any, torch.Generator], dict[str, Any]]
    ) -> tuple[Any, Callable[[Any, torch.Generator], dict[str, Any]]]:
        """The examples of a source, encoded and in memory if they are to be, and what to make of them."""
        args = self.args
        possible = can_cache(source, args.random_crop, args.random_flip)
        if args.cache_latents and not possible:
            raise ValueError(
                "--cache_latents needs pictures that can be counted and are the same each time: leave it out, or "
                "--random_crop and --random_flip."
            )
        wanted = len(source) <= LARGEST_CACHED_BY_DEFAULT if possible else False
        if not (wanted if args.cache_latents is None else args.cache_latents):
            self.reads_captions = True
            return source, prepare
        progress = self.accelerator.is_local_main_process
        examples = cache_examples(source, prepare, self.encode, args.seed, args.on_bad_image, progress)
        return examples, lambda example, generator: example

    def run(
        self,
        source: Any,
        prepare: Callable[[Any, torch.Generator], dict[str, Any]],
        prior_loss_weight: float = 1.0,
    ) -> None:
        r"""
        Train the adapters.

        Args:
            source, prepare: The examples and what to make of them, as in [`ExampleStream`].
            prior_loss_weight (`float`, defaults to `1.0`): Weight of the loss of pictures of the class.
        """
        args, accelerator = self.args, self.accelerator
        module = LoraTrainingModule(
            self.pipe.transformer,
            self.pipe.residual_mlp,
            self.vae,
            self.pipe.scheduler,
            HARTResidualScheduler(),
            self.scales,
            seed=args.seed,
            token_drop=not args.no_token_drop,
            condition_dropout=args.caption_dropout,
            residual_loss_weight=args.residual_loss_weight,
            residual_batch_multiplier=args.residual_batch_multiplier,
            text_encoder=self.text_encoder if args.train_text_encoder else None,
            encode_captions=self.prompt_embeds,
            prior_loss_weight=prior_loss_weight,
        )
        module.train()
        self.weights = WeightUpdates(args, accelerator, module)
        checkpoint_adapters(accelerator, self.adapted)

        conditions = self._validation_conditions()
        if not self.reads_captions:
            self.text_encoder.to("cpu")

        def training_step(micro_batches: list[dict[str, Any]], step: int) -> dict[str, torch.Tensor]:
            with self._dropout_of_step(step):
                return update_weights(micro_batches, step)

        def update_weights(micro_batches: list[dict[str, Any]], step: int) -> dict[str, torch.Tensor]:
            figures = []
            for batch in micro_batches:
                own, prior = split_prior(self.encode(batch))
                with accelerator.accumulate(self.weights.module):
                    losses = self.weights.module(
                        step=step,
                        positions=batch["position"],
                        prior=_module_inputs(prior, accelerator.device) if prior else None,
                        **_module_inputs(own, accelerator.device),
                    )
                    figures.append(losses | self.weights.update(losses["loss"]))
            return mean_figures(figures)

        def validate(step: int) -> None:
            with self.weights.for_inference() as current:
                if current:
                    module.eval()
                    log_validation(args, accelerator, self._drawing_pipeline(), conditions, step)
                    module.train()

        train(args, accelerator, source, prepare, training_step, validate if conditions else None)

    def publish(
        self, description: str, repo_id: str | None, instance_prompt: str | None = None, **settings: object
    ) -> Path:
        """
        Save the adapters with their model card and push them, on the main process.

        Args:
            description (`str`): What they are, for the card.
            repo_id (`str`, *optional*): Repository to push to, of [`hub_repository`].
            instance_prompt (`str`, *optional*): What the subject is called, for DreamBooth.
            settings: More of how they were trained, for the card.

        Returns:
            `Path`: The folder.
        """
        args = self.args
        adapters = {
            "Rank": args.rank,
            "Alpha": f"{args.rank if args.lora_alpha is None else args.lora_alpha:g}",
            "Adapters on": ", ".join(self.adapted),
            "Layers of the transformer": ", ".join(args.lora_layers),
            **settings,
            **training_settings(args, self.accelerator, self.scales),
        }
        with self.weights.for_inference() as current:
            if current:
                publish_lora(args, self.adapted, description, adapters, repo_id, instance_prompt)
        self.accelerator.wait_for_everyone()
        return Path(args.output_dir)

    @contextmanager
    def _dropout_of_step(self, step: int) -> Iterator[None]:
        """Within this context dropout, which knows no generators, follows from the seed, the step and the process."""
        if self.args.lora_dropout == 0:
            yield
            return
        device = self.accelerator.device
        key = (self.args.seed, "dropout", step, self.accelerator.process_index)
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            # Of the CPU and of this device alone, unlike torch.manual_seed.
            torch.default_generator.manual_seed(seeded_generator("cpu", *key).initial_seed())
            if device.type == "cuda":
                torch.cuda.manual_seed(seeded_generator("cpu", *key).initial_seed())
            yield

    def _validation_conditions(self) -> list[dict[str, Any]]:
        args = self.args
        common = {
            "num_images_per_prompt": args.num_validation_images,
            "height": self.scales[-1] * self.vae.spatial_factor,
        }
        if args.train_text_encoder:
            return [{"prompt": prompt, **common} for prompt in args.validation_prompt]
        with torch.no_grad():
            encoded = [self.prompt_embeds([prompt]) for prompt in args.validation_prompt]
        return [{"prompt_embeds": embeds, "prompt_attention_mask": mask, **common} for embeds, mask in encoded]

    def _drawing_pipeline(self) -> HARTPipeline:
        components = {name: part for name, part in self.pipe.components.items() if "safety" not in name}
        components["feature_extractor"] = None
        if not self.args.train_text_encoder:
            components |= {"tokenizer": None, "text_encoder": None}
        return HARTPipeline(**components, system_prompt=self.pipe.config.system_prompt)


def _module_inputs(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Arguments of [`LoraTrainingModule.forward`] from an encoded batch."""
    targets = [batch[name].to(device, non_blocking=True) for name in TARGET_NAMES]
    if TEXT_NAMES[0] in batch:
        text = {name: batch[name].to(device, non_blocking=True) for name in TEXT_NAMES}
    else:
        text = {"captions": batch["caption"]}
    return {"targets": TeacherForcingTargets(*targets), **text}
