# SPDX-License-Identifier: Apache-2.0
import os
from collections.abc import Callable
from pickle import UnpicklingError
from threading import Lock
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.schedulers import SchedulerMixin
from diffusers.utils import logging, replace_example_docstring
from safetensors import SafetensorError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...loaders import HARTLoraLoaderMixin
from ...loaders.lora_scale import scaled_lora
from ...models import HARTTransformer2DModel, HybridTokenizer, ResidualDiffusionMLP
from ...schedulers import HARTScheduler
from ..hub import HARTHubMixin
from .call_state import with_own_state
from .disk_offload import DiskOffloadMixin
from .generation import HARTGenerationMixin, is_integer
from .pipeline_output import HARTPipelineOutput
from .text_encoder_files import check_text_encoder, check_text_encoder_config


logger = logging.get_logger(__name__)

# A call of a fast tokenizer sets how it pads and cuts, then uses that: two threads would get each other's.
TOKENIZER_LOCK = Lock()

EXAMPLE_DOC_STRING = """
    Examples:
        ```py
        >>> import torch
        >>> from diffusers_hart import HARTPipeline

        >>> pipe = HARTPipeline.from_pretrained("path/to/converted/hart", dtype=torch.bfloat16).to("cuda")
        >>> image = pipe("a lighthouse at dusk", generator=torch.Generator("cuda").manual_seed(0)).images[0]
        >>> image.save("lighthouse.png")
        ```
"""


class HARTPipeline(HARTHubMixin, DiskOffloadMixin, DiffusionPipeline, HARTLoraLoaderMixin, HARTGenerationMixin):
    r"""
    Text-to-image generation with HART, the Hybrid Autoregressive Transformer
    ([paper](https://huggingface.co/papers/2410.10812)).

    Args:
        tokenizer (`PreTrainedTokenizerBase`): Tokenizer of the text.
        text_encoder (`PreTrainedModel`): A decoder language model (Qwen2) whose last hidden states describe the text.
        transformer ([`HARTTransformer2DModel`]): Predicts the codes of a picture, scale by scale.
        vae ([`HybridTokenizer`]): Turns codes and residuals into latents and latents into pictures.
        scheduler ([`HARTScheduler`]): Draws the codes; knows the schedules of scales.
        residual_mlp ([`ResidualDiffusionMLP`], *optional*):
            Denoises the continuous residual; without it pictures are drawn from their codes alone.
        residual_scheduler ([`HARTResidualScheduler`], *optional*):
            The process of that diffusion; other diffusers schedulers can take its place.
        safety_checker (`PreTrainedModel`, *optional*): Blackens pictures, as in Stable Diffusion.
        feature_extractor (`CLIPImageProcessor`, *optional*): Prepares pictures for the safety checker.
        system_prompt (`str`, *optional*): Text that goes before each prompt, unless a call says otherwise.
    """

    model_cpu_offload_seq = "text_encoder->transformer->residual_mlp->vae"
    _optional_components = ["residual_mlp", "residual_scheduler", "safety_checker", "feature_extractor"]
    _exclude_from_cpu_offload = ["safety_checker"]

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        text_encoder: PreTrainedModel,
        transformer: HARTTransformer2DModel,
        vae: HybridTokenizer,
        scheduler: HARTScheduler,
        residual_mlp: ResidualDiffusionMLP | None = None,
        residual_scheduler: SchedulerMixin | None = None,
        safety_checker: PreTrainedModel | None = None,
        feature_extractor: Any | None = None,
        system_prompt: str | None = None,
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
            tokenizer=tokenizer,
            text_encoder=text_encoder,
            transformer=transformer,
            vae=vae,
            scheduler=scheduler,
            residual_mlp=residual_mlp,
            residual_scheduler=residual_scheduler,
            safety_checker=safety_checker,
            feature_extractor=feature_extractor,
        )
        self.register_to_config(system_prompt=system_prompt)
        self.default_max_sequence_length = transformer.config.caption_length if transformer is not None else 300

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs) -> "HARTPipeline":
        r"""
        Load a pipeline from a folder or the Hub, as `DiffusionPipeline.from_pretrained` does. Without a `dtype` all of
        it is loaded in float32, the text encoder too, which transformers would leave in the type it is stored in.

        Raises:
            ValueError: If weights are missing, not a model's, of another shape or not finite, or components do not fit.
            OSError: If files are missing or damaged.
        """
        if not {"dtype", "torch_dtype", "quantization_config"} & set(kwargs):
            kwargs["dtype"] = torch.float32
        if "text_encoder" in kwargs:
            return super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        check_text_encoder_config(pretrained_model_name_or_path)
        try:
            pipe = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        except (SafetensorError, UnpicklingError) as error:
            raise OSError(f"A file of weights in {pretrained_model_name_or_path} is damaged: {error}") from error
        check_text_encoder(pipe.text_encoder)
        return pipe

    def encode_prompt(
        self,
        prompt: str | list[str] | None,
        num_images_per_prompt: int = 1,
        device: torch.device | None = None,
        negative_prompt: str | list[str] | None = None,
        do_classifier_free_guidance: bool = True,
        prompt_embeds: torch.Tensor | None = None,
        prompt_attention_mask: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        negative_prompt_attention_mask: torch.Tensor | None = None,
        max_sequence_length: int | None = None,
        system_prompt: str | None = None,
        lora_scale: float | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        r"""
        Encode prompts into what the call accepts as embeddings.

        Args:
            prompt (`str` or `list[str]`, *optional*): The prompts, unless `prompt_embeds` are given.
            num_images_per_prompt (`int`, defaults to `1`): How often each row of the results is repeated.
            device (`torch.device`, *optional*): Where to encode; the pipeline's device by default.
            negative_prompt (`str` or `list[str]`, *optional*):
                What guidance leads away from. Without it the unconditional branch is what the model was trained with:
                embeddings of zeros at text position 0.
            do_classifier_free_guidance (`bool`, defaults to `True`): Whether to make an unconditional branch.
            prompt_embeds, prompt_attention_mask (`torch.Tensor`, *optional*):
                Results of an earlier call, used instead of encoding.
            negative_prompt_embeds, negative_prompt_attention_mask (`torch.Tensor`, *optional*): The same.
            max_sequence_length (`int`, *optional*):
                Number of tokens prompts are padded and cut to; by default the number the transformer was trained with.
            system_prompt (`str`, *optional*):
                Text that goes before each prompt; `""` for none, by default the pipeline's own.
            lora_scale (`float`, *optional*): Factor of the text encoder's LoRA layers.

        Returns:
            `tuple`: `prompt_embeds` of shape `(batch_size, tokens, caption_channels)`, float32, and
            `prompt_attention_mask` of shape `(batch_size, tokens)`, int64, then the same for the unconditional branch
            or `None`.
        """
        device = device or self._execution_device
        max_sequence_length = max_sequence_length or self.default_max_sequence_length
        system_prompt = self.config.system_prompt if system_prompt is None else system_prompt

        if prompt_embeds is None:
            with scaled_lora([self.text_encoder], lora_scale):
                prompt_embeds, prompt_attention_mask = self._encode_text(
                    [prompt] if isinstance(prompt, str) else prompt, max_sequence_length, system_prompt, device
                )
        if do_classifier_free_guidance and negative_prompt_embeds is None:
            if negative_prompt is None:
                negative_prompt_embeds = torch.zeros_like(prompt_embeds)
                negative_prompt_attention_mask = torch.zeros_like(prompt_attention_mask)
                negative_prompt_attention_mask[:, 0] = 1
            else:
                negative_prompts = [negative_prompt] if isinstance(negative_prompt, str) else negative_prompt
                if len(negative_prompts) == 1:
                    negative_prompts = negative_prompts * len(prompt_embeds)
                with scaled_lora([self.text_encoder], lora_scale):
                    negative_prompt_embeds, negative_prompt_attention_mask = self._encode_text(
                        negative_prompts, prompt_embeds.shape[1], system_prompt, device
                    )

        prompt_embeds = prompt_embeds.to(device).repeat_interleave(num_images_per_prompt, dim=0)
        prompt_attention_mask = prompt_attention_mask.to(device).repeat_interleave(num_images_per_prompt, dim=0)
        if do_classifier_free_guidance:
            negative_prompt_embeds = negative_prompt_embeds.to(device).repeat_interleave(num_images_per_prompt, dim=0)
            negative_prompt_attention_mask = negative_prompt_attention_mask.to(device)
            negative_prompt_attention_mask = negative_prompt_attention_mask.repeat_interleave(
                num_images_per_prompt, dim=0
            )
        return prompt_embeds, prompt_attention_mask, negative_prompt_embeds, negative_prompt_attention_mask

    def _encode_text(
        self, prompts: list[str], max_sequence_length: int, system_prompt: str | None, device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeddings `(batch_size, tokens, caption_channels)`, float32, and mask `(batch_size, tokens)` of prompts."""
        with TOKENIZER_LOCK:
            tokens = self.tokenizer(
                prompts, padding="max_length", max_length=max_sequence_length, truncation=True, return_tensors="pt"
            )
            uncut_ids = self.tokenizer([*prompts, system_prompt or ""]).input_ids
        for whole_ids in dict.fromkeys(map(tuple, uncut_ids)):  # equal texts are told of once
            if len(whole_ids) > max_sequence_length:
                cut = len(whole_ids) - max_sequence_length
                lost = whole_ids[:cut] if self.tokenizer.truncation_side == "left" else whole_ids[-cut:]
                logger.warning(
                    f"A prompt of {len(whole_ids)} tokens was cut to {max_sequence_length}; what was lost: "
                    f"{self.tokenizer.decode(list(lost))!r}"
                )
        return self._encode_tokens(tokens.input_ids, system_prompt, device)

    def _encode_tokens(
        self, input_ids: torch.LongTensor, system_prompt: str | None, device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What `_encode_text` gives, from the padded tokens `(batch_size, tokens)` of its prompts."""
        input_ids = input_ids.to(device, non_blocking=True)
        attention_mask = (input_ids != self.tokenizer.pad_token_id).long()

        text_ids, key_mask, system_length = input_ids, attention_mask, 0
        if system_prompt:
            with TOKENIZER_LOCK:
                system_ids = self.tokenizer(system_prompt, max_length=input_ids.shape[1], truncation=True).input_ids
            system_length = len(system_ids)
            system_ids = torch.tensor([system_ids]).to(device, non_blocking=True).expand(len(input_ids), -1)
            text_ids = torch.cat([system_ids, input_ids], dim=1)
            key_mask = torch.cat([torch.ones_like(system_ids), attention_mask], dim=1)

        # Causal and without padding, by finite numbers: a position that sees nothing (an empty prompt) then averages
        # everything, as it did when the model was trained.
        length, dtype = text_ids.shape[1], self.text_encoder.dtype
        visible = torch.ones(length, length, dtype=torch.bool, device=device).tril() & key_mask[:, None, None].bool()
        mask = torch.zeros(visible.shape, dtype=dtype, device=device).masked_fill_(~visible, torch.finfo(dtype).min)
        hidden_states = self.text_encoder(
            input_ids=text_ids,
            attention_mask=mask,
            position_ids=torch.arange(length, device=device)[None],
            use_cache=False,
        ).last_hidden_state
        return hidden_states[:, system_length:].float(), attention_mask

    def run_safety_checker(self, images: torch.Tensor, device: torch.device) -> tuple[torch.Tensor, list[bool] | None]:
        r"""
        Blacken what the safety checker finds, if there is one.

        Args:
            images (`torch.Tensor` of shape `(batch_size, 3, height, width)`): Decoded images in [-1, 1].
            device (`torch.device`): Where to run the checker.

        Returns:
            `tuple`: the images and, for each, whether it was blackened; `None` without a checker.
        """
        if self.safety_checker is None:
            return images, None
        clip_input = self.feature_extractor(
            self.image_processor.postprocess(images, output_type="pil"), return_tensors="pt"
        ).pixel_values.to(device, self.safety_checker.dtype)
        _, flagged = self.safety_checker(
            clip_input=clip_input, images=self.image_processor.postprocess(images, output_type="np")
        )
        keep = torch.tensor(flagged, device=images.device).logical_not()[:, None, None, None]
        return torch.where(keep, images, -1), flagged

    def check_inputs(
        self,
        prompt: str | list[str] | None,
        negative_prompt: str | list[str] | None,
        num_images_per_prompt: int,
        max_sequence_length: int | None,
        prompt_embeds: torch.Tensor | None,
        prompt_attention_mask: torch.Tensor | None,
        negative_prompt_embeds: torch.Tensor | None,
        negative_prompt_attention_mask: torch.Tensor | None,
        system_prompt: str | None = None,
    ) -> None:
        """Check the arguments about text. Raises `ValueError` with what was given and what fits."""
        tensors = {
            "prompt_embeds": prompt_embeds,
            "prompt_attention_mask": prompt_attention_mask,
            "negative_prompt_embeds": negative_prompt_embeds,
            "negative_prompt_attention_mask": negative_prompt_attention_mask,
        }
        for name, tensor in tensors.items():
            if tensor is not None and (not isinstance(tensor, torch.Tensor) or tensor.ndim == 0):
                raise ValueError(f"`{name}` must be a torch.Tensor with dimensions, not {tensor!r}.")
            if tensor is not None and tensors[name.replace("attention_mask", "embeds")] is None:
                raise ValueError(f"`{name}` belongs to embeddings, and none are given.")
        if (prompt is None) == (prompt_embeds is None):
            given = "neither" if prompt is None else "both"
            raise ValueError(f"Pass either `prompt` or `prompt_embeds`, not {given}.")
        for name, text in (("prompt", prompt), ("negative_prompt", negative_prompt)):
            texts = text if isinstance(text, list) else [text]
            if not texts or not all(isinstance(item, str) for item in texts if text is not None):
                raise ValueError(f"`{name}` must be a string or a list of strings, not {text!r}.")
        if prompt is not None and (self.text_encoder is None or self.tokenizer is None):
            raise ValueError("This pipeline has no text encoder or no tokenizer: pass `prompt_embeds`.")
        if not is_integer(num_images_per_prompt, 1):
            raise ValueError(f"`num_images_per_prompt` must be a positive integer, not {num_images_per_prompt}.")
        if max_sequence_length is not None and not is_integer(max_sequence_length, 1):
            raise ValueError(f"`max_sequence_length` must be a positive integer, not {max_sequence_length}.")
        if negative_prompt is not None and negative_prompt_embeds is not None:
            raise ValueError("Pass either `negative_prompt` or `negative_prompt_embeds`, not both.")
        if system_prompt is not None and not isinstance(system_prompt, str):
            raise ValueError(f"`system_prompt` must be a string, not {system_prompt!r}.")
        batch_size = len(prompt_embeds) if prompt is None else 1 if isinstance(prompt, str) else len(prompt)
        if isinstance(negative_prompt, list) and len(negative_prompt) not in (1, batch_size):
            raise ValueError(
                f"`negative_prompt` is a list of {len(negative_prompt)} for {batch_size} prompts: pass one, or one each."
            )

        width = self.transformer.config.caption_channels
        embeddings = (
            ("prompt", prompt_embeds, prompt_attention_mask),
            ("negative_prompt", negative_prompt_embeds, negative_prompt_attention_mask),
        )
        for name, embeds, mask in embeddings:
            if embeds is None:
                continue
            if embeds.ndim != 3 or embeds.shape[-1] != width or not embeds.numel():
                raise ValueError(
                    f"`{name}_embeds` must be of shape (batch_size, tokens, {width}), not {tuple(embeds.shape)}."
                )
            if not embeds.isfinite().all():
                raise ValueError(f"`{name}_embeds` must be finite numbers.")
            if mask is None:
                raise ValueError(
                    f"`{name}_embeds` need `{name}_attention_mask`: positions follow from it. `encode_prompt` gives both."
                )
            if mask.shape != embeds.shape[:2]:
                raise ValueError(
                    f"`{name}_attention_mask` must be of shape {tuple(embeds.shape[:2])}, not {tuple(mask.shape)}."
                )
        if negative_prompt_embeds is not None:
            length = max_sequence_length or self.default_max_sequence_length
            expected = (batch_size, length if prompt_embeds is None else prompt_embeds.shape[1])
            if tuple(negative_prompt_embeds.shape[:2]) != expected:
                raise ValueError(
                    f"`negative_prompt_embeds` must be of shape {(*expected, width)} like the prompts' embeddings, not "
                    f"{tuple(negative_prompt_embeds.shape)}."
                )

    @torch.no_grad()
    @with_own_state
    @replace_example_docstring(EXAMPLE_DOC_STRING)
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        guidance_scale: float | None = None,
        num_images_per_prompt: int = 1,
        num_inference_steps: int | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        smooth: bool = True,
        residual_temperature: float = 1.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        prompt_attention_mask: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        negative_prompt_attention_mask: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        attention_kwargs: dict[str, Any] | None = None,
        callback_on_step_end: Callable[[Any, int, int, dict], dict] | PipelineCallback | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],
        max_sequence_length: int | None = None,
        system_prompt: str | None = None,
    ) -> HARTPipelineOutput | tuple:
        r"""
        Draw pictures of prompts.

        Args:
            prompt (`str` or `list[str]`, *optional*): What to draw.
            negative_prompt (`str` or `list[str]`, *optional*):
                What guidance leads away from, one for all prompts or one each; by default the model's own
                unconditional branch, which is not an empty prompt.
            height, width (`int`, *optional*):
                Size in pixels: a square that one of the scheduler's schedules fits, by default the size the
                transformer was trained on last.
            guidance_scale (`float`, *optional*):
                Strength of classifier-free guidance at the end of its ramp over the scales. 0 is off; 1 is what other
                pipelines of diffusers call 2. By default the scheduler's own (4.5 in the published model).
            num_images_per_prompt (`int`, defaults to `1`): Pictures of each prompt.
            num_inference_steps (`int`, *optional*):
                Steps of the residual diffusion, 0 for none; the number of scales is given by the size. By default the
                scheduler's own (8 in the published model).
            top_k (`int`, *optional*):
                Number of codes a draw chooses from; by default the scheduler's rule (600, at late scales 300).
            top_p (`float`, *optional*): Probability mass a draw chooses from, in (0, 1]; by default all of it.
            smooth (`bool`, defaults to `True`):
                Whether the picture is made of soft mixtures of codes (Gumbel smoothing) rather than of single ones.
            residual_temperature (`float`, defaults to `1.0`): Factor of the noise that the residual diffusion adds.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
                Source of everything random; a list makes each picture independent of its batch.
            latents (`torch.Tensor` of shape `(batch_size, latent_channels, P, P)`, *optional*):
                First noise of the residual diffusion. With `top_k=1`, `smooth=False` and `residual_temperature=0` it
                alone decides the picture.
            prompt_embeds (`torch.Tensor` of shape `(batch_size, tokens, caption_channels)`, *optional*):
                Embeddings from [`~HARTPipeline.encode_prompt`], instead of `prompt`.
            prompt_attention_mask (`torch.Tensor` of shape `(batch_size, tokens)`, *optional*): Their mask.
            negative_prompt_embeds (`torch.Tensor`, *optional*): The same, instead of `negative_prompt`.
            negative_prompt_attention_mask (`torch.Tensor`, *optional*): Their mask.
            output_type (`str`, defaults to `"pil"`):
                `"pil"`, `"np"` or `"pt"` (both in [0, 1]), or `"latent"`, the latent before decoding.
            return_dict (`bool`, defaults to `True`): Whether to return a [`HARTPipelineOutput`] or a tuple.
            attention_kwargs (`dict`, *optional*): `{"scale": ...}` scales LoRA layers of all models.
            callback_on_step_end (`Callable`, *optional*):
                Called after each scale as `callback(pipe, scale_index, side, tensors)`; the `latents` it returns are
                what the next scale and the decoder see. It may return nothing.
            callback_on_step_end_tensor_inputs (`list[str]`, defaults to `["latents"]`):
                Tensors the callback gets. `latents` is the picture's latent after the scale, of shape
                `(batch_size, latent_channels, P, P)`, the residual included at the last.
            max_sequence_length (`int`, *optional*):
                Number of tokens prompts are padded and cut to (300 in the published model).
            system_prompt (`str`, *optional*):
                Text that goes before each prompt; `""` for none, by default the pipeline's own.

        Examples:

        Returns:
            [`HARTPipelineOutput`] or `tuple`: the images and, with a safety checker, which were blackened.

        Raises:
            ValueError: If arguments contradict each other or are out of range; nothing has been computed then.
        """
        if isinstance(callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs

        # 1. Defaults of the checkpoint, and checks
        height, width, guidance_scale, num_inference_steps = self.generation_defaults(
            height, width, guidance_scale, num_inference_steps
        )
        self.check_inputs(
            prompt,
            negative_prompt,
            num_images_per_prompt,
            max_sequence_length,
            prompt_embeds,
            prompt_attention_mask,
            negative_prompt_embeds,
            negative_prompt_attention_mask,
            system_prompt,
        )
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
        if prompt_embeds is not None:
            batch_size = len(prompt_embeds)
        else:
            batch_size = 1 if isinstance(prompt, str) else len(prompt)

        # 2. First noise of the residual
        residual_noise = self.prepare_latents(
            batch_size * num_images_per_prompt, scales[-1], device, generator, latents
        )

        # 3. The text
        (
            prompt_embeds,
            prompt_attention_mask,
            negative_prompt_embeds,
            negative_prompt_attention_mask,
        ) = self.encode_prompt(
            prompt,
            num_images_per_prompt=num_images_per_prompt,
            device=device,
            negative_prompt=negative_prompt,
            do_classifier_free_guidance=self.do_classifier_free_guidance,
            prompt_embeds=prompt_embeds,
            prompt_attention_mask=prompt_attention_mask,
            negative_prompt_embeds=negative_prompt_embeds,
            negative_prompt_attention_mask=negative_prompt_attention_mask,
            max_sequence_length=max_sequence_length,
            system_prompt=system_prompt,
            lora_scale=self.lora_scale,
        )
        if self.do_classifier_free_guidance:
            prompt_embeds = torch.cat([prompt_embeds, negative_prompt_embeds])
            prompt_attention_mask = torch.cat([prompt_attention_mask, negative_prompt_attention_mask])
        condition = {
            "encoder_hidden_states": prompt_embeds.to(self.transformer.dtype),
            "encoder_attention_mask": prompt_attention_mask,
        }

        # 4. The scales, and the picture
        with scaled_lora(self._lora_models().values(), self.lora_scale):
            latents = self._generate_latents(
                condition,
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
        nsfw_content_detected = None
        if output_type == "latent":
            images = latents
        else:
            images = self._decode_latents(latents)
            images, nsfw_content_detected = self.run_safety_checker(images, device)
            images = self.image_processor.postprocess(images, output_type=output_type)

        self.maybe_free_model_hooks()

        if not return_dict:
            return (images, nsfw_content_detected)
        return HARTPipelineOutput(images=images, nsfw_content_detected=nsfw_content_detected)
