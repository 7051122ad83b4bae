# SPDX-License-Identifier: Apache-2.0
from dataclasses import dataclass

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput

from .own_config import OwnConfigMixin


@dataclass
class HARTSchedulerOutput(BaseOutput):
    """
    Output of [`HARTScheduler.step`].

    Args:
        codes (`torch.LongTensor` of shape `(batch_size, tokens)`): The codes that were drawn.
        weights (`torch.Tensor` of shape `(batch_size, tokens, codebook_size)`, *optional*):
            With smoothing, the soft weights over the codebook that stand for the codes in the picture.
    """

    codes: torch.LongTensor
    weights: torch.Tensor | None = None


def _exponential(
    shape: tuple[int, ...], device: torch.device, generator: torch.Generator | list[torch.Generator] | None
) -> torch.Tensor:
    """
    Exponential noise, drawn on `device` even if the generator lives elsewhere: the generator then seeds one on the
    device. A list of generators draws sample by sample.
    """
    if isinstance(generator, list):
        return torch.cat([_exponential((1, *shape[1:]), device, sample_generator) for sample_generator in generator])
    if generator is not None and generator.device.type != device.type:
        seed = torch.randint(2**63 - 1, (), generator=generator, device=generator.device).item()
        generator = torch.Generator(device).manual_seed(seed)
    return torch.empty(shape, device=device).exponential_(generator=generator)


def _uniform(
    shape: tuple[int, ...], device: torch.device, generator: torch.Generator | list[torch.Generator] | None
) -> torch.Tensor:
    """Uniform noise in (0, 1], drawn where the generator lives."""
    if isinstance(generator, list):
        return torch.cat([_uniform((1, *shape[1:]), device, sample_generator) for sample_generator in generator])
    draw_device = device if generator is None else generator.device
    return 1 - torch.rand(shape, generator=generator, device=draw_device).to(device)


class HARTScheduler(OwnConfigMixin, SchedulerMixin, ConfigMixin):
    r"""
    The schedule of scales of HART and how a scale's codes are drawn from the transformer's logits (section 3 of the
    [paper](https://huggingface.co/papers/2410.10812)). It holds no state: `step` gets the index of the scale.

    Args:
        schedules (`tuple[tuple[int, ...], ...]`, defaults to those of 256, 512 and 1024 px):
            The known schedules, each the sides of its scales in tokens; the last side is that of the latent.
        guidance_scale (`float`, defaults to `4.5`): Guidance of pipelines that are called without one.
        num_inference_steps (`int`, defaults to `8`):
            Steps of the residual diffusion of pipelines that are called without a number.
        top_k (`int`, defaults to `600`): Number of codes a draw chooses from, at the early scales.
        late_top_k (`int`, defaults to `300`): Number of codes a draw chooses from, at the late scales.
        first_late_scale (`int`, defaults to `7`): Index of the first late scale.
        top_p (`float`, *optional*): Probability mass a draw chooses from, applied after top-k.
        smoothing_temperature (`float`, defaults to `0.27`): Temperature of the Gumbel smoothing at the first scale.
        smoothing_decay (`float`, defaults to `0.95`): How much of that temperature is gone at the end.
        min_smoothing_temperature (`float`, defaults to `0.005`): Lower bound of that temperature.
        guidance_interval (`tuple[float, float]`, defaults to `(0.0, 1.0)`):
            Within which progress `k / (K - 1)` of the scales there is guidance. Scales after it are run without an
            unconditional branch.
        kept_fractions (`tuple[float, ...]`, defaults to none):
            Token pruning (in the manner of [FastVAR](https://huggingface.co/papers/2503.23367)): for the last scales,
            the last one last, which share of their tokens goes through the transformer; `(0.5, 0.25)` is half of the
            last but one's and a quarter of the last one's.

    Raises:
        ValueError: If a schedule does not grow from a side of 1, or another value is out of range.
    """

    order = 1
    _identifying_value = "schedules"

    @register_to_config
    def __init__(
        self,
        schedules: tuple[tuple[int, ...], ...] = (
            (1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
            (1, 2, 3, 4, 6, 9, 13, 18, 24, 32),
            (1, 2, 3, 4, 5, 7, 9, 12, 16, 21, 27, 36, 48, 64),
        ),
        guidance_scale: float = 4.5,
        num_inference_steps: int = 8,
        top_k: int = 600,
        late_top_k: int = 300,
        first_late_scale: int = 7,
        top_p: float | None = None,
        smoothing_temperature: float = 0.27,
        smoothing_decay: float = 0.95,
        min_smoothing_temperature: float = 0.005,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        kept_fractions: tuple[float, ...] = (),
    ):
        for schedule in schedules:
            whole = all(isinstance(side, int) for side in schedule)
            if not schedule or not whole or schedule[0] != 1 or any(b <= a for a, b in zip(schedule, schedule[1:])):
                raise ValueError(f"A schedule must grow from a scale of side 1, not {tuple(schedule)}.")
        if min(top_k, late_top_k) < 1:
            raise ValueError(f"`top_k` and `late_top_k` must be at least 1, not {top_k} and {late_top_k}.")
        if top_p is not None and not 0 < top_p <= 1:
            raise ValueError(f"`top_p` must be above 0 and at most 1, not {top_p}.")
        if smoothing_temperature <= 0 or min_smoothing_temperature <= 0:
            raise ValueError(
                "`smoothing_temperature` and `min_smoothing_temperature` must be above 0, not "
                f"{smoothing_temperature} and {min_smoothing_temperature}."
            )
        if len(guidance_interval) != 2 or not 0 <= guidance_interval[0] <= guidance_interval[1] <= 1:
            raise ValueError(
                f"`guidance_interval` must be (start, end) within [0, 1], not {tuple(guidance_interval)}."
            )
        if not all(0 < fraction <= 1 for fraction in kept_fractions):
            raise ValueError(f"`kept_fractions` must be above 0 and at most 1, not {tuple(kept_fractions)}.")

    def scales(self, latent_size: int) -> tuple[int, ...]:
        """
        The schedule of a latent of side `latent_size`.

        Returns:
            `tuple[int, ...]`: Sides of the scales in tokens, the last one `latent_size`.

        Raises:
            ValueError: If no schedule ends with that side.
        """
        for schedule in self.config.schedules:
            if schedule[-1] == latent_size:
                return tuple(schedule)
        known = ", ".join(str(schedule[-1]) for schedule in self.config.schedules)
        raise ValueError(f"No schedule of scales ends with a latent of side {latent_size}; known sides: {known}.")

    def ratio(self, scale_index: int, num_scales: int) -> float:
        """Progress `k / (K - 1)`, from 0 at the first scale towards 1."""
        # The last scale repeats the ratio of the one before: the original never updates it there.
        return min(scale_index, max(num_scales - 2, 0)) / max(num_scales - 1, 1)

    def guidance(self, guidance_scale: float, scale_index: int, num_scales: int) -> float:
        """
        The guidance `t` of a scale: a ramp from 0, and 0 outside of `guidance_interval`. Guided logits, and guided
        noise of the residual diffusion, are `(1 + t) * conditional - t * unconditional`.
        """
        start, end = self.config.guidance_interval
        if not start <= scale_index / max(num_scales - 1, 1) <= end:
            return 0.0
        return guidance_scale * self.ratio(scale_index, num_scales)

    def is_guided_from(self, scale_index: int, num_scales: int) -> bool:
        """Whether there is guidance at a scale or at one that follows, if there is any at all."""
        return any(self.guidance(1.0, k, num_scales) > 0 for k in range(scale_index, num_scales))

    def num_kept_tokens(self, scale_index: int, scales: tuple[int, ...]) -> int | None:
        """How many tokens of a scale go through the transformer; `None` for all."""
        position = scale_index - len(scales) + len(self.config.kept_fractions)
        if position < 0 or scale_index == 0 or self.config.kept_fractions[position] == 1:
            return None
        return max(1, round(self.config.kept_fractions[position] * scales[scale_index] ** 2))

    def step(
        self,
        logits: torch.Tensor,
        scale_index: int,
        num_scales: int,
        top_k: int | None = None,
        top_p: float | None = None,
        smooth: bool = True,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
        noise: dict[str, torch.Tensor] | None = None,
    ) -> HARTSchedulerOutput | tuple:
        r"""
        Draw the codes of one scale.

        Args:
            logits (`torch.Tensor` of shape `(batch_size, tokens, codebook_size)`): The guided logits.
            scale_index (`int`): The scale, counted from 0.
            num_scales (`int`): Number of scales.
            top_k (`int`, *optional*): Number of codes to choose from, instead of the configured numbers.
            top_p (`float`, *optional*): Probability mass to choose from, instead of the configured one.
            smooth (`bool`, defaults to `True`): Whether to return soft weights too.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
                Source of randomness, or one for each sample.
            return_dict (`bool`, defaults to `True`): Whether to return a [`HARTSchedulerOutput`] or a tuple.
            noise (`dict[str, torch.Tensor]`, *optional*): What [`draw_noise`] gave, in place of `generator`.

        Returns:
            [`HARTSchedulerOutput`] or `tuple`: codes and, with `smooth`, weights.
        """
        if noise is None:
            noise = self.draw_noise(logits.shape, logits.device, scale_index, top_k, smooth, generator)
        # What is left of the codebook by top-k is a tenth of it or less: all that follows is done with that alone.
        logits, codebook_size = logits.float(), logits.shape[-1]
        num_kept = min(self.num_kept_codes(scale_index, top_k), codebook_size)
        kept = None
        if num_kept < codebook_size:
            logits, kept = logits.topk(num_kept, dim=-1)
        logits = self.mask_logits(logits, scale_index, num_kept, top_p)

        if top_k == 1:
            codes = logits.argmax(-1)
        else:
            codes = self.draw_codes(logits, noise["uniform"])
        weights = None
        if smooth:
            gumbel_noise = -noise["exponential"].clamp_min(1e-20).log()
            weights = self.smooth_weights(logits, gumbel_noise, scale_index, num_scales)
        if kept is not None:
            codes = kept.gather(-1, codes[..., None]).squeeze(-1)
            if smooth:
                weights = weights.new_zeros(*weights.shape[:-1], codebook_size).scatter_(-1, kept, weights)
        if not return_dict:
            return codes, weights
        return HARTSchedulerOutput(codes=codes, weights=weights)

    def draw_noise(
        self,
        logits_shape: tuple[int, ...],
        device: torch.device,
        scale_index: int,
        top_k: int | None = None,
        smooth: bool = True,
        generator: torch.Generator | list[torch.Generator] | None = None,
    ) -> dict[str, torch.Tensor]:
        r"""
        The random numbers of a [`step`] with logits of that shape, float32 on `device`: `"uniform"` in (0, 1], one for
        each token, unless `top_k` is 1, and with `smooth` `"exponential"`, one for each code that is chosen from.
        """
        num_kept = min(self.num_kept_codes(scale_index, top_k), logits_shape[-1])
        noise = {}
        if top_k != 1:
            noise["uniform"] = _uniform(tuple(logits_shape[:-1]), device, generator)
        if smooth:
            noise["exponential"] = _exponential((*logits_shape[:-1], num_kept), device, generator)
        return noise

    def num_kept_codes(self, scale_index: int, top_k: int | None = None) -> int:
        """Number of codes a draw chooses from: `top_k` or, without, what is configured for the scale."""
        if top_k is not None:
            return top_k
        return self.config.top_k if scale_index < self.config.first_late_scale else self.config.late_top_k

    def mask_logits(
        self, logits: torch.Tensor, scale_index: int, top_k: int | None = None, top_p: float | None = None
    ) -> torch.Tensor:
        """
        `logits` of shape `(..., codebook_size)` with minus infinity where a code is out of the draw: not among the
        `top_k` best, nor in the smallest set of best codes that reaches the probability `top_p`.
        """
        top_k = self.num_kept_codes(scale_index, top_k)
        if top_p is None:
            top_p = self.config.top_p
        if top_k < logits.shape[-1]:
            smallest_kept = logits.topk(top_k, dim=-1).values[..., -1:]
            logits = logits.masked_fill(logits < smallest_kept, -torch.inf)
        if top_p is not None and top_p < 1:
            sorted_logits, order = logits.sort(dim=-1)
            # From the least likely up; the best code always stays.
            dropped = sorted_logits.softmax(-1).cumsum(-1) <= 1 - top_p
            dropped[..., -1] = False
            logits = logits.masked_fill(torch.zeros_like(dropped).scatter(-1, order, dropped), -torch.inf)
        return logits

    def draw_codes(self, logits: torch.Tensor, uniform: torch.Tensor) -> torch.LongTensor:
        """
        Codes of shape `(...)` from the softmax of masked `logits` `(..., codebook_size)`, where uniform noise in
        (0, 1] of shape `(...)` falls in their cumulative distribution: one random number a position.
        """
        cumulative = logits.softmax(-1).cumsum(-1)
        # The threshold is in (0, total]: the first code that reaches it never is one of probability zero.
        codes = torch.searchsorted(cumulative, uniform[..., None] * cumulative[..., -1:]).squeeze(-1)
        # Logits that are no numbers end past the last code: they are to show in the result, not in a failed look-up.
        return codes.clamp_(max=logits.shape[-1] - 1)

    def smooth_weights(
        self, logits: torch.Tensor, gumbel_noise: torch.Tensor, scale_index: int, num_scales: int
    ) -> torch.Tensor:
        r"""
        Soft weights over the codebook, `softmax((logits * (1 + ratio) + gumbel_noise) / temperature)`, with a
        temperature that falls with the scales. `logits` are the masked guided ones; all of shape
        `(batch_size, tokens, codebook_size)`.
        """
        ratio = self.ratio(scale_index, num_scales)
        temperature = self.config.smoothing_temperature * (1 - self.config.smoothing_decay * ratio)
        temperature = max(temperature, self.config.min_smoothing_temperature)
        return ((logits * (1 + ratio) + gumbel_noise) / temperature).softmax(-1)
