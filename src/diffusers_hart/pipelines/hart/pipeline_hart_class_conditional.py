# SPDX-License-Identifier: Apache-2.0
from collections.abc import Callable
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.schedulers import SchedulerMixin

from ...loaders import HARTLoraLoaderMixin
from ...loaders.lora_scale import scaled_lora
from ...models import HARTTransformer2DModel, HybridTokenizer, ResidualDiffusionMLP
from ...schedulers import HARTScheduler
from ..hub import HARTHubMixin
from .call_state import with_own_state
from .disk_offload import DiskOffloadMixin
from .generation import HARTGenerationMixin, is_integer
from .pipeline_output import HARTPipelineOutput


class HARTClassConditionalPipeline(
    HARTHubMixin, DiskOffloadMixin, DiffusionPipeline, HARTLoraLoaderMixin, HARTGenerationMixin
):
    r"""
    Class-conditional generation with HART ([paper](https://huggingface.co/papers/2410.10812), section 4.2).

    Args:
        transformer ([`HARTTransformer2DModel`]): Predicts the codes of a picture; a model with `num_classes`.
        vae ([`HybridTokenizer`]): Turns codes and residuals into latents and latents into pictures.
        scheduler ([`HARTScheduler`]): Draws the codes; knows the schedules of scales.
        residual_mlp ([`ResidualDiffusionMLP`], *optional*): Denoises the continuous residual.
        residual_scheduler ([`HARTResidualScheduler`], *optional*): The process of that diffusion.
        id2label (`dict[int, str]`, *optional*): Names of the classes; a comma separates synonyms.
    """

    model_cpu_offload_seq = "transformer->residual_mlp->vae"
    _optional_components = ["residual_mlp", "residual_scheduler"]
    _is_class_conditional = True
    _lora_loadable_modules = ["transformer", "residual_mlp"]

    def __init__(
        self,
        transformer: HARTTransformer2DModel,
        vae: HybridTokenizer,
        scheduler: HARTScheduler,
        residual_mlp: ResidualDiffusionMLP | None = None,
        residual_scheduler: SchedulerMixin | None = None,
        id2label: dict[int, str] | None = None,
    ):
        super().__init__()
        self._check_components(
            transformer=transformer,
            vae=vae,
            scheduler=scheduler,
            residual_mlp=residual_mlp,
            residual_scheduler=residual_scheduler,
        )
        self.register_modules(
            transformer=transformer,
            vae=vae,
            scheduler=scheduler,
            residual_mlp=residual_mlp,
            residual_scheduler=residual_scheduler,
        )
        self.register_to_config(id2label=id2label)
        names = [(name.strip(), int(i)) for i, label in (id2label or {}).items() for name in label.split(",")]
        self.labels = dict(sorted(names))

    def get_label_ids(self, label: str | list[str]) -> list[int]:
        r"""
        Class ids of class names.

        Args:
            label (`str` or `list[str]`): Names from `labels`.

        Returns:
            `list[int]`: Their ids.

        Raises:
            ValueError: If a name is unknown.
        """
        labels = [label] if isinstance(label, str) else label
        if unknown := [name for name in labels if name not in self.labels]:
            raise ValueError(f"Unknown class names {unknown}; known are {list(self.labels)}.")
        return [self.labels[name] for name in labels]

    @torch.no_grad()
    @with_own_state
    def __call__(
        self,
        class_labels: int | list[int] | torch.Tensor,
        guidance_scale: float | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        num_inference_steps: int | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        height: int | None = None,
        width: int | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        smooth: bool = True,
        residual_temperature: float = 1.0,
        latents: torch.Tensor | None = None,
        attention_kwargs: dict[str, Any] | None = None,
        callback_on_step_end: Callable[[Any, int, int, dict], dict] | PipelineCallback | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],
    ) -> HARTPipelineOutput | tuple:
        r"""
        Draw pictures of classes. What is not described here is as in [`HARTPipeline.__call__`].

        Args:
            class_labels (`int`, `list[int]` or `torch.Tensor` of shape `(batch_size,)`): The classes, one a picture.
            guidance_scale (`float`, *optional*): Strength of classifier-free guidance; 0 is off.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*): Source of everything random.
            num_inference_steps (`int`, *optional*): Steps of the residual diffusion, 0 for none.
            output_type (`str`, defaults to `"pil"`): `"pil"`, `"np"`, `"pt"` or `"latent"`.
            return_dict (`bool`, defaults to `True`): Whether to return a [`HARTPipelineOutput`] or a tuple.
            height, width (`int`, *optional*): Size in pixels, a square that one of the schedules fits.
            top_k (`int`, *optional*): Number of codes a draw chooses from.
            top_p (`float`, *optional*): Probability mass a draw chooses from, in (0, 1].
            smooth (`bool`, defaults to `True`): Whether the picture is made of soft mixtures of codes.
            residual_temperature (`float`, defaults to `1.0`): Factor of the noise that the residual diffusion adds.
            latents (`torch.Tensor` of shape `(batch_size, latent_channels, P, P)`, *optional*):
                First noise of the residual diffusion.
            attention_kwargs (`dict`, *optional*): `{"scale": ...}` scales LoRA layers of all models.
            callback_on_step_end (`Callable`, *optional*): Called after each scale.
            callback_on_step_end_tensor_inputs (`list[str]`, defaults to `["latents"]`): Tensors the callback gets.

        Returns:
            [`HARTPipelineOutput`] or `tuple`: the images.

        Raises:
            ValueError: If arguments contradict each other or are out of range; nothing has been computed then.
        """
        if isinstance(callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs

        # 1. Defaults of the checkpoint, and checks
        height, width, guidance_scale, num_inference_steps = self.generation_defaults(
            height, width, guidance_scale, num_inference_steps
        )
        labels = class_labels.tolist() if hasattr(class_labels, "tolist") else class_labels
        labels = labels if isinstance(labels, list) else [labels]
        num_classes = self.transformer.config.num_classes
        if not labels or not all(is_integer(label, 0) and label < num_classes for label in labels):
            raise ValueError(f"`class_labels` must be integers in [0, {num_classes}), not {class_labels}.")
        self.check_generation_inputs(
            height,
            width,
            guidance_scale,
            num_inference_steps,
            top_k,
            top_p,
            residual_temperature,
            output_type,
            callback_on_step_end_tensor_inputs,
            callback_on_step_end,
            attention_kwargs,
        )
        self._guidance_scale = guidance_scale
        self._attention_kwargs = attention_kwargs
        self._interrupt = False
        device = self._execution_device
        scales = self.scheduler.scales(height // self.vae_scale_factor)

        # 2. First noise of the residual
        residual_noise = self.prepare_latents(len(labels), scales[-1], device, generator, latents)

        # 3. The classes; the last row of the table is "no class"
        class_labels = torch.tensor(labels, device=device)
        if self.do_classifier_free_guidance:
            class_labels = torch.cat([class_labels, torch.full_like(class_labels, num_classes)])

        # 4. The scales, and the picture
        with scaled_lora(self._lora_models().values(), self.lora_scale):
            latents = self._generate_latents(
                {"class_labels": class_labels},
                scales,
                top_k,
                top_p,
                smooth,
                generator,
                residual_noise,
                num_inference_steps,
                residual_temperature,
                callback_on_step_end,
                callback_on_step_end_tensor_inputs,
            )
        if output_type == "latent":
            images = latents
        else:
            images = self._decode_latents(latents)
            images = self.image_processor.postprocess(images, output_type=output_type)

        self.maybe_free_model_hooks()

        if not return_dict:
            return (images,)
        return HARTPipelineOutput(images=images)
