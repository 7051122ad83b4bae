# SPDX-License-Identifier: Apache-2.0
import math

import numpy as np
import torch
from diffusers import DDPMScheduler
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_ddpm import DDPMSchedulerOutput
from diffusers.utils.torch_utils import randn_tensor

from .own_config import OwnConfigMixin


def cosine_betas(num_train_timesteps: int, max_beta: float = 0.999) -> np.ndarray:
    """Betas of the cosine schedule (Improved DDPM, [2102.09672](https://huggingface.co/papers/2102.09672), eq. 17)."""

    def signal(time: float) -> float:
        return math.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2

    steps = [(t / num_train_timesteps, (t + 1) / num_train_timesteps) for t in range(num_train_timesteps)]
    return np.array([min(1 - signal(end) / signal(start), max_beta) for start, end in steps])


def diffusion_tables(alphas_cumprod: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """
    Betas of a chain, from its cumulative alphas in ascending order of time, and the coefficients that step through it
    ([2006.11239](https://huggingface.co/papers/2006.11239), eq. 7 and 15), all in float64.
    """
    previous = np.append(1.0, alphas_cumprod[:-1])
    betas = 1.0 - alphas_cumprod / previous
    posterior_variance = betas * (1.0 - previous) / (1.0 - alphas_cumprod)
    if len(betas) > 1:
        posterior_variance[0] = posterior_variance[1]  # the first is 0 and has no logarithm
    else:
        posterior_variance = betas
    return betas, {
        "sample_from_noisy": 1.0 / np.sqrt(alphas_cumprod),
        "sample_from_noise": np.sqrt(1.0 / alphas_cumprod - 1.0),
        "mean_of_sample": betas * np.sqrt(previous) / (1.0 - alphas_cumprod),
        "mean_of_noisy": (1.0 - previous) * np.sqrt(1.0 - betas) / (1.0 - alphas_cumprod),
        "log_beta": np.log(betas),
        "log_posterior_variance": np.log(posterior_variance),
    }


class HARTResidualScheduler(OwnConfigMixin, DDPMScheduler):
    r"""
    The sampler of HART's residual diffusion: ancestral sampling with a learned variance, on a chain of few timesteps
    with betas of its own (Improved DDPM, [2102.09672](https://huggingface.co/papers/2102.09672)). It differs from
    `DDPMScheduler` in tables that are computed in float64, in `temperature` and in noise that can be given.

    Swap it for any other scheduler with `DDIMScheduler.from_config(pipe.residual_scheduler.config)`: its config holds
    what the others need to follow the same process, and no variance type, which is its own.

    Args:
        num_train_timesteps (`int`, defaults to `1000`): Length of the chain the network was trained on.
        beta_schedule (`str`, defaults to `"squaredcos_cap_v2"`): The cosine schedule, the only one.
        prediction_type (`str`, defaults to `"epsilon"`): The network predicts noise, the only choice.
        timestep_spacing (`str`, defaults to `"linspace"`): Evenly from last to first timestep, the only choice.
        clip_sample (`bool`, defaults to `True`): Whether predicted residuals are clipped.
        clip_sample_range (`float`, defaults to `1.0`): To which absolute value.
        lambda_min_clipped (`float`, defaults to `-5.1`):
            Not used here, but by a DPM-Solver that is made of this config: the schedule ends in next to no signal, where
            its logarithms run away and spoil the picture.
    """

    _identifying_value = "num_train_timesteps"

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_schedule: str = "squaredcos_cap_v2",
        prediction_type: str = "epsilon",
        timestep_spacing: str = "linspace",
        clip_sample: bool = True,
        clip_sample_range: float = 1.0,
        lambda_min_clipped: float = -5.1,
    ):
        fixed = {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "epsilon", "timestep_spacing": "linspace"}
        for name, expected in fixed.items():
            if self.config[name] != expected:
                raise ValueError(
                    f"`{name}` must be {expected!r} for HARTResidualScheduler, not {self.config[name]!r}; "
                    "a scheduler of diffusers can be used in its place."
                )
        # Values left at their defaults would otherwise not be handed to other schedulers by `from_config`.
        self.register_to_config(_use_default_values=[])
        # Not through DDPMScheduler.__init__, which would write its variance type into the config for others to read.
        self.variance_type = "learned_range"
        self.init_noise_sigma = 1.0
        self.custom_timesteps = False
        self.one = torch.tensor(1.0)
        betas = cosine_betas(num_train_timesteps)
        self._alphas_cumprod = np.cumprod(1.0 - betas)
        self.betas = torch.from_numpy(betas).float()
        self.alphas = torch.from_numpy(1.0 - betas).float()
        self.alphas_cumprod = torch.from_numpy(self._alphas_cumprod).float()
        _, tables = diffusion_tables(self._alphas_cumprod)
        self.training_tables = {name: torch.from_numpy(table).float() for name, table in tables.items()}
        self.set_timesteps(num_train_timesteps)
        self.num_inference_steps = None

    def training_tables_on(self, device: torch.device) -> dict[str, torch.Tensor]:
        """The coefficients of the whole chain, float32 `(num_train_timesteps,)`; they stay on the device asked for."""
        self.training_tables = {name: table.to(device) for name, table in self.training_tables.items()}
        return self.training_tables

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: list[int] | None = None,
    ):
        r"""
        Choose the timesteps of the chain and compute its tables.

        Args:
            num_inference_steps (`int`, *optional*):
                Number of steps, evenly spaced from the last training timestep to 0.
            device (`str` or `torch.device`, *optional*): Where to keep `timesteps`.
            timesteps (`list[int]`, *optional*): The timesteps themselves, descending, instead of a number of steps.

        Raises:
            ValueError: If both or neither are given, if the number is out of range or the timesteps do not descend.
        """
        num_train = self.config.num_train_timesteps
        if (num_inference_steps is None) == (timesteps is None):
            raise ValueError("Pass either `num_inference_steps` or `timesteps`.")
        if timesteps is None:
            if not 1 <= num_inference_steps <= num_train:
                raise ValueError(
                    f"`num_inference_steps` must be between 1 and {num_train}, not {num_inference_steps}."
                )
            # The stride is added up and then rounded, as in the sampler the network was released with: a rounded
            # linspace differs for some odd numbers of steps.
            stride = (num_train - 1) / (num_inference_steps - 1) if num_inference_steps > 1 else 1.0
            ascending, position = [], 0.0
            for _ in range(num_inference_steps):
                ascending.append(round(position))
                position += stride
        else:
            ascending = sorted(set(timesteps))
            if list(timesteps) != ascending[::-1] or ascending[0] < 0 or ascending[-1] >= num_train:
                raise ValueError(f"`timesteps` must descend within [0, {num_train}), not {timesteps}.")
        self.custom_timesteps = timesteps is not None
        self.num_inference_steps = len(ascending)
        self.timesteps = torch.tensor(ascending[::-1], device=device)

        betas, tables = diffusion_tables(self._alphas_cumprod[ascending])
        self.step_betas = torch.from_numpy(betas[::-1].copy())
        self._steps = {timestep: i for i, timestep in enumerate(ascending)}
        # Rounded to float32 once, here, and used as numbers: the arithmetic of `step` is then float32 everywhere.
        self._tables = {name: table.astype(np.float32).astype(float).tolist() for name, table in tables.items()}

    def step(
        self,
        model_output: torch.Tensor,
        timestep: int | torch.Tensor,
        sample: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        temperature: float = 1.0,
        variance_noise: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> DDPMSchedulerOutput | tuple:
        r"""
        One step of ancestral sampling, in float32.

        Args:
            model_output (`torch.Tensor` of shape `(batch_size, 2 * channels, ...)`):
                Predicted noise and, in the second half of the channels, the place of the variance.
            timestep (`int` or `torch.Tensor`): One of `timesteps`.
            sample (`torch.Tensor` of shape `(batch_size, channels, ...)`): The noisy sample.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
                Source of the noise, or one for each sample.
            temperature (`float`, defaults to `1.0`): Factor of the noise that is added; 0 follows the mean.
            variance_noise (`torch.Tensor` of the shape of `sample`, *optional*): The noise itself.
            return_dict (`bool`, defaults to `True`): Whether to return a `DDPMSchedulerOutput` or a tuple.

        Returns:
            `DDPMSchedulerOutput` or `tuple`: the less noisy sample and the predicted clean one, in float32.

        Raises:
            ValueError: If the model's output has not twice the sample's channels, or the timestep is not of the chain.
        """
        if model_output.shape[1] != 2 * sample.shape[1]:
            raise ValueError(
                f"`model_output` must have noise and variance, {2 * sample.shape[1]} channels in dimension 1 for a "
                f"sample of {sample.shape[1]}, not {model_output.shape[1]}."
            )
        timestep = int(timestep)
        if timestep not in self._steps:
            raise ValueError(f"Timestep {timestep} is not one of {self.timesteps.tolist()}: call `set_timesteps`.")
        table = {name: values[self._steps[timestep]] for name, values in self._tables.items()}
        sample = sample.float()
        noise, variance_fraction = model_output.float().chunk(2, dim=1)

        original = table["sample_from_noisy"] * sample - table["sample_from_noise"] * noise
        if self.config.clip_sample:
            original = original.clamp(-self.config.clip_sample_range, self.config.clip_sample_range)
        previous = table["mean_of_sample"] * original + table["mean_of_noisy"] * sample

        if timestep > 0 and temperature > 0:
            if variance_noise is None:
                variance_noise = randn_tensor(sample.shape, generator, sample.device, sample.dtype)
            fraction = (variance_fraction + 1) / 2
            log_variance = fraction * table["log_beta"] + (1 - fraction) * table["log_posterior_variance"]
            previous = previous + (0.5 * log_variance).exp() * variance_noise * temperature
        if not return_dict:
            return previous, original
        return DDPMSchedulerOutput(prev_sample=previous, pred_original_sample=original)
