# SPDX-License-Identifier: Apache-2.0
import copy
import inspect
import math
import numbers
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import DDPMScheduler
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import logging
from diffusers.utils.torch_utils import randn_tensor

from .call_state import CallAttribute
from .fast_path import FastPath, FastRun, PlainRun, is_offloaded


logger = logging.get_logger(__name__)

OUTPUT_TYPES = ("pil", "np", "pt", "latent")


def pivotal_tokens(scale_input: torch.Tensor, count: int) -> torch.LongTensor:
    """The `count` tokens `(batch_size, count)` of a scale that are farthest from its mean: where the detail is."""
    distances = (scale_input - scale_input.mean(dim=1, keepdim=True)).square().sum(-1)
    return distances.topk(count, dim=1).indices


def is_integer(value: Any, minimum: int) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool) and value >= minimum


def is_real(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


class HARTGenerationMixin:
    """
    What the HART pipelines share, whatever their condition: the loop over scales, the residual diffusion behind its
    last scale, decoding, and the arguments of these.
    """

    _callback_tensor_inputs = ["latents"]
    _is_class_conditional = False
    _guidance_scale, _attention_kwargs = CallAttribute(), CallAttribute()
    _interrupt, _num_timesteps = CallAttribute(), CallAttribute()
    _fast_path: FastPath | None = None

    def _check_components(self, residual_scheduler: Any, **components: Any) -> None:
        """Raises `ValueError` for a component in another's place; diffusers tells those of one base class not apart."""
        expected = {
            "transformer": "HARTTransformer2DModel",
            "vae": "HybridTokenizer",
            "scheduler": "HARTScheduler",
            "residual_mlp": "ResidualDiffusionMLP",
        }
        for name, component in components.items():
            component = getattr(component, "_orig_mod", component)  # what torch.compile wraps
            # By name: a pipeline that is loaded as remote code has classes of its own.
            if component is not None and expected[name] not in (base.__name__ for base in type(component).__mro__):
                raise ValueError(f"`{name}` must be a {expected[name]}, not a {type(component).__name__}.")
        transformer = components["transformer"]
        if transformer is not None and (transformer.config.num_classes is not None) != self._is_class_conditional:
            raise ValueError(
                f"`transformer` is a model of {'texts' if self._is_class_conditional else 'classes'}, which "
                f"{type(self).__name__} does not draw."
            )
        if residual_scheduler is not None and not hasattr(residual_scheduler, "set_timesteps"):
            raise ValueError(
                f"`residual_scheduler` must be a scheduler of diffusion, not a {type(residual_scheduler).__name__}."
            )

    @property
    def guidance_scale(self) -> float:
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        return self._guidance_scale > 0

    @property
    def num_timesteps(self) -> int:
        return self._num_timesteps

    @property
    def attention_kwargs(self) -> dict[str, Any] | None:
        return self._attention_kwargs

    @property
    def interrupt(self) -> bool:
        return self._interrupt

    @property
    def vae_scale_factor(self) -> int:
        """Pixels a latent position stands for, along a side."""
        return self.vae.spatial_factor if getattr(self, "vae", None) is not None else 16

    @property
    def image_processor(self) -> VaeImageProcessor:
        return VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)

    @property
    def default_num_inference_steps(self) -> int:
        """Steps of the residual diffusion of calls that name none; 0 without one."""
        has_residual = self.residual_mlp is not None and self.residual_scheduler is not None
        return self.scheduler.config.num_inference_steps if has_residual else 0

    def generation_defaults(
        self, height: int | None, width: int | None, guidance_scale: float | None, num_inference_steps: int | None
    ) -> tuple[int, int, float, int]:
        """The given values, and the checkpoint's own where there are none."""
        if height is None:
            height = width if width is not None else self.transformer.config.sample_size * self.vae_scale_factor
        width = height if width is None else width
        guidance_scale = self.scheduler.config.guidance_scale if guidance_scale is None else guidance_scale
        if num_inference_steps is None:
            num_inference_steps = self.default_num_inference_steps
        return height, width, guidance_scale, num_inference_steps

    def check_generation_inputs(
        self,
        height: int,
        width: int,
        guidance_scale: float,
        num_inference_steps: int,
        top_k: int | None,
        top_p: float | None,
        residual_temperature: float,
        output_type: str,
        callback_on_step_end_tensor_inputs: list[str],
        callback_on_step_end: Callable | None = None,
        attention_kwargs: dict[str, Any] | None = None,
    ) -> None:
        """Check the arguments that both pipelines have. Raises `ValueError` with what was given and what fits."""
        sizes = [schedule[-1] * self.vae_scale_factor for schedule in self.scheduler.config.schedules]
        if not is_integer(height, 1) or not is_integer(width, 1) or height != width or height not in sizes:
            raise ValueError(
                f"No schedule of scales fits `height`={height} and `width`={width}; this model draws squares of "
                f"{' or '.join(str(size) for size in sizes)} pixels a side."
            )
        if not is_real(guidance_scale) or not 0 <= guidance_scale < math.inf:
            raise ValueError(f"`guidance_scale` must be 0 (off) or a positive number, not {guidance_scale}.")
        has_residual = self.residual_mlp is not None and self.residual_scheduler is not None
        max_steps = self.residual_scheduler.config.num_train_timesteps if has_residual else 0
        if not is_integer(num_inference_steps, 0) or num_inference_steps > max_steps:
            raise ValueError(
                f"`num_inference_steps` must be an integer from 0 (no residual) to {max_steps}, not "
                f"{num_inference_steps}." + ("" if has_residual else " This pipeline has no residual diffusion.")
            )
        if top_k is not None and not is_integer(top_k, 1):
            raise ValueError(f"`top_k` must be a positive integer, not {top_k}.")
        if top_p is not None and not (is_real(top_p) and 0 < top_p <= 1):
            raise ValueError(f"`top_p` must be above 0 and at most 1, not {top_p}.")
        if not is_real(residual_temperature) or not 0 <= residual_temperature < math.inf:
            raise ValueError(f"`residual_temperature` must be 0 or a positive number, not {residual_temperature}.")
        if num_inference_steps and residual_temperature != 1 and "temperature" not in self._residual_step_parameters():
            raise ValueError(
                f"`residual_temperature`={residual_temperature} needs HARTResidualScheduler; "
                f"{type(self.residual_scheduler).__name__} knows no temperature."
            )
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"`output_type` must be one of {', '.join(OUTPUT_TYPES)}, not {output_type!r}.")
        if callback_on_step_end is not None and not callable(callback_on_step_end):
            raise ValueError(f"`callback_on_step_end` must be something to call, not {callback_on_step_end!r}.")
        names = callback_on_step_end_tensor_inputs
        unknown = (
            [name for name in names if name not in self._callback_tensor_inputs]
            if isinstance(names, (list, tuple))
            else [names]
        )
        if unknown:
            raise ValueError(
                f"`callback_on_step_end_tensor_inputs` must be among {self._callback_tensor_inputs}, not {unknown!r}."
            )
        if attention_kwargs is not None and not isinstance(attention_kwargs, dict):
            raise ValueError(f"`attention_kwargs` must be a dictionary, not {attention_kwargs!r}.")
        scale = (attention_kwargs or {}).get("scale", 1.0)
        if not is_real(scale) or not math.isfinite(scale):
            raise ValueError(f'The `"scale"` of `attention_kwargs` must be a number, not {scale!r}.')

    def enable_fast_path(
        self,
        heights: int | Sequence[int] | None = None,
        batch_sizes: int | Sequence[int] = 1,
        guided: bool = True,
        max_sequence_length: int | None = None,
        cuda_graphs: bool = True,
        compile_models: bool = True,
        compile_options: dict[str, Any] | None = None,
    ) -> None:
        r"""
        Compile the models and record CUDA graphs for pictures of given sizes and numbers, and use these for all calls
        that fit, with results as before. Takes a while, shown by the progress bar. Other calls go the plain way, as
        they do while another thread uses what is recorded. Where adapters are loaded, weighed or taken off, or
        projections are joined, the next call records anew.

        Each size and number keeps memory of its own for keys and values. Without CUDA blocks are only compiled. Where
        nothing can be compiled or recorded, or the models are offloaded, there is one warning and no change.

        Args:
            heights (`int` or `Sequence[int]`, *optional*): Sizes in pixels; the default size if none are given.
            batch_sizes (`int` or `Sequence[int]`, defaults to `1`):
                Numbers of pictures drawn at once: prompts times `num_images_per_prompt`.
            guided (`bool`, defaults to `True`): Whether pictures are drawn with guidance.
            max_sequence_length (`int`, *optional*): Length prompts are padded to, as in calls.
            cuda_graphs (`bool`, defaults to `True`): Whether to record CUDA graphs.
            compile_models (`bool`, defaults to `True`): Whether to compile blocks, residual MLP and decoder.
            compile_options (`dict`, *optional*):
                Of `torch.compile`, such as `{"mode": "max-autotune-no-cudagraphs"}`.

        Raises:
            ValueError: If no schedule fits a size, or a number is not a positive integer.
        """
        heights = (heights,) if heights is None or isinstance(heights, numbers.Integral) else heights
        batch_sizes = (batch_sizes,) if isinstance(batch_sizes, numbers.Integral) else batch_sizes
        sizes = [self.generation_defaults(height, None, None, None) for height in heights]
        for height, width, guidance_scale, num_inference_steps in sizes:
            self.check_generation_inputs(
                height, width, guidance_scale, num_inference_steps, None, None, 1.0, "latent", []
            )
        if not all(is_integer(batch_size, 1) for batch_size in batch_sizes):
            raise ValueError(f"`batch_sizes` must be positive integers, not {batch_sizes}.")

        self.disable_fast_path()
        device = self._execution_device
        if is_offloaded(self.transformer, self.residual_mlp, self.vae):
            logger.warning("The fast path needs models that stay on their device; offloaded ones run the plain way.")
            return
        graphs = cuda_graphs and device.type == "cuda"
        if cuda_graphs and not graphs:
            logger.warning(f"No CUDA graphs on {device.type}: the fast path only compiles there.")
        self._fast_path = FastPath(device, graphs, compile_models, compile_options)
        # The largest first: kernels for all sizes are chosen for it.
        kinds = [(size, batch_size) for size in sorted(sizes, reverse=True) for batch_size in batch_sizes]
        try:
            with self.progress_bar(total=len(kinds)) as progress_bar:
                for (height, _, guidance_scale, num_inference_steps), batch_size in kinds:
                    start = time.perf_counter()
                    self._warm_up(
                        height, batch_size, guidance_scale if guided else 0.0, num_inference_steps, max_sequence_length
                    )
                    seconds = time.perf_counter() - start
                    logger.info(f"Prepared {batch_size} picture(s) of {height} px in {seconds:.1f} s.")
                    progress_bar.update()
        except Exception as error:
            self.disable_fast_path()
            logger.warning(f"The fast path is not available here, and calls go the plain way: {error!r}")
        except BaseException:
            self.disable_fast_path()
            raise
        else:
            self._fast_path.accepts_new = False

    def disable_fast_path(self) -> None:
        """Go back to the models as they are, and free what [`enable_fast_path`] keeps."""
        self._fast_path = None

    @torch.no_grad()
    def _warm_up(
        self,
        height: int,
        batch_size: int,
        guidance_scale: float,
        num_inference_steps: int,
        max_sequence_length: int | None,
    ) -> None:
        """Draw a batch of nothing in particular, twice: to record it and to see that the record runs."""
        device, config = self._execution_device, self.transformer.config
        scales = self.scheduler.scales(height // self.vae_scale_factor)
        self._guidance_scale, self._attention_kwargs, self._interrupt = guidance_scale, None, False
        rows = 2 * batch_size if guidance_scale > 0 else batch_size
        if self._is_class_conditional:
            condition = {"class_labels": torch.zeros(rows, dtype=torch.long, device=device)}
        else:
            shape = (rows, max_sequence_length or config.caption_length)
            condition = {
                "encoder_hidden_states": torch.zeros(
                    *shape, config.caption_channels, dtype=self.transformer.dtype, device=device
                ),
                "encoder_attention_mask": torch.ones(shape, dtype=torch.long, device=device),
            }
        noise = torch.zeros(batch_size, self.vae.config.latent_channels, scales[-1], scales[-1], device=device)
        progress_bar_config = getattr(self, "_progress_bar_config", {})
        self.set_progress_bar_config(**{**progress_bar_config, "disable": True})
        generator = torch.Generator(device).manual_seed(0)
        try:
            for _ in range(2):
                latents = self._generate_latents(
                    condition, scales, None, None, True, generator, noise, num_inference_steps, 1.0, None, []
                )
                self._decode_latents(latents)
        finally:
            self.set_progress_bar_config(**progress_bar_config)

    @contextmanager
    def _borrow_run(
        self, condition: dict[str, torch.Tensor], batch_size: int, scales: tuple[int, ...]
    ) -> Iterator[FastRun | PlainRun]:
        """The models for one pass through the scales: the fast path's if they are prepared for it."""
        fast_path = self._fast_path
        run = None if fast_path is None else fast_path.borrow(self, condition, batch_size, scales)
        try:
            yield run or PlainRun(self.transformer, self.residual_mlp)
        finally:
            if run is not None:
                fast_path.give_back()

    def _decode_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """Images in [-1, 1] of the final latents."""
        latents = latents.to(self.vae.dtype)
        images = None if self._fast_path is None else self._fast_path.decode(self.vae, latents)
        return self.vae.decode(latents, return_dict=False)[0] if images is None else images

    def prepare_latents(
        self,
        batch_size: int,
        latent_size: int,
        device: torch.device,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        The first noise of the residual diffusion, of shape `(batch_size, latent_channels, latent_size, latent_size)`
        and float32: `latents` if given, otherwise drawn. Raises `ValueError` for a list of generators or latents that
        do not fit.
        """
        shape = (batch_size, self.vae.config.latent_channels, latent_size, latent_size)
        generators = generator if isinstance(generator, list) else [] if generator is None else [generator]
        if not all(isinstance(item, torch.Generator) for item in generators):
            raise ValueError(f"`generator` must be a torch.Generator or a list of them, not {generator!r}.")
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(
                f"`generator` is a list of {len(generator)}, but {batch_size} images are to be drawn: pass one each."
            )
        if latents is None:
            return randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        if not isinstance(latents, torch.Tensor):
            raise ValueError(f"`latents` must be a torch.Tensor of shape {shape}, not {latents!r}.")
        if tuple(latents.shape) != shape:
            raise ValueError(f"`latents` must be of shape {shape}, not {tuple(latents.shape)}.")
        if not latents.isfinite().all():
            raise ValueError("`latents` must be finite numbers.")
        return latents.to(device, torch.float32)

    def _generate_latents(
        self,
        # the condition: the conditional half of the batch, then the unconditional one if there is guidance
        condition: dict[str, torch.Tensor],
        scales: tuple[int, ...],
        # drawing
        top_k: int | None,
        top_p: float | None,
        smooth: bool,
        generator: torch.Generator | list[torch.Generator] | None,
        # the residual
        residual_noise: torch.Tensor,
        num_inference_steps: int,
        residual_temperature: float,
        callback_on_step_end: Callable | None,
        callback_on_step_end_tensor_inputs: list[str],
    ) -> torch.Tensor:
        """The scale loop: from a condition to the final latent `(batch_size, latent_channels, P, P)`, float32."""
        batch_size = len(residual_noise)
        branches = len(next(iter(condition.values()))) // batch_size
        latents = torch.zeros_like(residual_noise)
        scale_input = kept_tokens = None
        self._num_timesteps = len(scales)
        # The scale of LoRA layers is that of all models and set around this loop.
        attention_kwargs = {name: value for name, value in (self.attention_kwargs or {}).items() if name != "scale"}

        # Counted in tokens, which is what the time goes by: the last scale is about half of it.
        with (
            self._borrow_run(condition, batch_size, scales) as run,
            self.progress_bar(total=sum(side * side for side in scales)) as progress_bar,
        ):
            for k, side in enumerate(scales):
                if self.interrupt:
                    continue

                # 1. The transformer predicts all codes of the scale
                guidance = self.scheduler.guidance(self.guidance_scale, k, len(scales))
                output = run.transformer(
                    scale_input,
                    scales,
                    **condition,
                    scale_index=k,
                    kv_cache=run.kv_cache,
                    kept_tokens=kept_tokens,
                    guidance=guidance if branches == 2 else None,
                    attention_kwargs=attention_kwargs,
                )

                # 2. The scheduler draws them, and the tokenizer adds them to the picture
                codes, latents = run.draw(
                    self._draw_scale, output.logits, latents, k, scales, top_k, top_p, smooth, generator
                )

                # 3. Behind the last scale the residual is added
                if k == len(scales) - 1 and num_inference_steps > 0:
                    # The pretrained residual knows the code that was drawn, also where the picture is smoothed.
                    code_embeds = self.vae.embed(codes).repeat(branches, 1, 1)
                    residual_condition = self.transformer.residual_condition(output.hidden_states, code_embeds)
                    latents = latents + self.sample_residual(
                        residual_condition,
                        residual_noise,
                        guidance,
                        num_inference_steps,
                        residual_temperature,
                        generator,
                        run.residual_mlp,
                    )

                if callback_on_step_end is not None:
                    callback_kwargs = {}
                    for name in callback_on_step_end_tensor_inputs:
                        callback_kwargs[name] = locals()[name]
                    callback_outputs = callback_on_step_end(self, k, side, callback_kwargs) or {}
                    latents = callback_outputs.pop("latents", latents)

                # 4. The picture so far, pooled, is what the next scale reads
                if k < len(scales) - 1:
                    if branches == 2 and not self.scheduler.is_guided_from(k + 1, len(scales)):
                        branches = 1
                        run.kv_cache.keep_samples(batch_size)
                    scale_input = self.vae.next_scale_input(latents, k + 1, scales)
                    if num_kept := self.scheduler.num_kept_tokens(k + 1, scales):
                        kept_tokens = pivotal_tokens(scale_input, num_kept).repeat(branches, 1)
                    scale_input = scale_input.to(self.transformer.dtype).repeat(branches, 1, 1)
                progress_bar.update(side * side)
        return latents

    def _draw_scale(
        self,
        logits: torch.Tensor,
        latents: torch.Tensor,
        scale_index: int,
        scales: tuple[int, ...],
        top_k: int | None,
        top_p: float | None,
        smooth: bool,
        generator: torch.Generator | list[torch.Generator] | None = None,
        **options: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes of a scale and the latents with them; `options` are the scheduler's."""
        drawn = self.scheduler.step(logits, scale_index, len(scales), top_k, top_p, smooth, generator, **options)
        code_embeds = self.vae.embed(drawn.weights if smooth else drawn.codes)
        return drawn.codes, self.vae.accumulate(latents, code_embeds, scale_index, scales)

    def sample_residual(
        self,
        condition: torch.Tensor,
        noise: torch.Tensor,
        guidance: float,
        num_inference_steps: int,
        temperature: float,
        generator: torch.Generator | list[torch.Generator] | None,
        residual_mlp: Callable | None = None,
    ) -> torch.Tensor:
        """
        The residual diffusion.

        Args:
            condition (`torch.Tensor` of shape `(branches * batch_size, P * P, inner_dim)`):
                What [`HARTTransformer2DModel.residual_condition`] gives; with guidance, the conditional half first.
            noise (`torch.Tensor` of shape `(batch_size, latent_channels, P, P)`): The first noise.
            guidance (`float`): Guidance `t` of the last scale.
            num_inference_steps (`int`): Number of steps.
            temperature (`float`): Factor of the noise that steps add.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*): Source of that noise.
            residual_mlp (`Callable`, *optional*): What to call in place of the pipeline's `residual_mlp`.

        Returns:
            `torch.Tensor` of shape `(batch_size, latent_channels, P, P)`, float32: what to add to the latent.
        """
        # A copy, since schedulers keep the state of a run and a call leaves the pipeline's components as they are.
        scheduler = copy.deepcopy(self.residual_scheduler)
        scheduler.set_timesteps(num_inference_steps)
        takes_variance = isinstance(scheduler, DDPMScheduler) and scheduler.variance_type in (
            "learned",
            "learned_range",
        )
        options = {"generator": generator, "temperature": temperature}
        options = {name: value for name, value in options.items() if name in self._residual_step_parameters()}
        branches = condition.shape[0] // noise.shape[0]

        residual_mlp = residual_mlp or self.residual_mlp
        condition_embeds = self.residual_mlp.embed_condition(condition)
        sample = noise * scheduler.init_noise_sigma
        for timestep in scheduler.timesteps:
            tokens = scheduler.scale_model_input(sample, timestep).flatten(2).transpose(1, 2)
            tokens = tokens.to(condition.dtype).repeat(branches, 1, 1)
            output = residual_mlp(tokens, timestep, condition_embeds=condition_embeds).sample.float()
            output = output.transpose(1, 2).unflatten(2, noise.shape[2:])
            predicted_noise, variance = output.chunk(2, dim=1)
            model_output = self._guide(predicted_noise, guidance, branches)
            if takes_variance:
                model_output = torch.cat([model_output, variance[: noise.shape[0]]], dim=1)
            sample = scheduler.step(model_output, timestep, sample, **options).prev_sample
        return self.residual_mlp.config.residual_scale * sample

    def _guide(self, prediction: torch.Tensor, guidance: float, branches: int) -> torch.Tensor:
        """Classifier-free guidance `(1 + t) * conditional - t * unconditional`."""
        if branches == 1:
            return prediction
        conditional, unconditional = prediction.chunk(2)
        return torch.lerp(unconditional, conditional, 1 + guidance)

    def _residual_step_parameters(self) -> set[str]:
        if self.residual_scheduler is None:
            return set()
        return set(inspect.signature(self.residual_scheduler.step).parameters)
