# SPDX-License-Identifier: Apache-2.0
import math

import torch
import torch.nn.functional as F

from ..models.residual_diffusion_mlp import ResidualDiffusionMLP
from ..schedulers.scheduling_hart_residual import HARTResidualScheduler


def _standard_normal_cdf(x: torch.Tensor) -> torch.Tensor:
    """The tanh approximation that guided diffusion uses."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def _discretized_gaussian_nll(sample: torch.Tensor, mean: torch.Tensor, log_variance: torch.Tensor) -> torch.Tensor:
    """Negative log likelihood, in nats, of values in [-1, 1] that stand for bins of width 2 / 255."""
    centered = sample - mean
    inverse_deviation = torch.exp(-0.5 * log_variance)
    cdf_upper = _standard_normal_cdf(inverse_deviation * (centered + 1 / 255))
    cdf_lower = _standard_normal_cdf(inverse_deviation * (centered - 1 / 255))
    probability = torch.where(
        sample < -0.999, cdf_upper, torch.where(sample > 0.999, 1 - cdf_lower, cdf_upper - cdf_lower)
    )
    return -probability.clamp(min=1e-12).log()


def _gaussian_kl(
    mean: torch.Tensor, log_variance: torch.Tensor, other_mean: torch.Tensor, other_log_variance: torch.Tensor
) -> torch.Tensor:
    """Divergence, in nats, of the first Gaussian from the second."""
    distance = (mean - other_mean) ** 2 * torch.exp(-other_log_variance)
    return 0.5 * (other_log_variance - log_variance + torch.exp(log_variance - other_log_variance) + distance - 1)


def residual_diffusion_loss(
    residual_mlp: ResidualDiffusionMLP,
    scheduler: HARTResidualScheduler,
    residual: torch.Tensor,
    condition: torch.Tensor,
    timestep: torch.LongTensor,
    noise: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""
    The loss of the residual diffusion, in two terms that are summed: the error of the predicted noise, which trains the
    mean, and the variational bound, which trains the variance and sees the mean detached
    (Improved DDPM, [2102.09672](https://huggingface.co/papers/2102.09672), section 3.1).

    Args:
        residual_mlp ([`ResidualDiffusionMLP`]): The network.
        scheduler ([`HARTResidualScheduler`]): Its process; all of its training timesteps are used.
        residual (`torch.Tensor` of shape `(tokens, channels)`): Clean residuals, in units of `residual_scale`.
        condition (`torch.Tensor` of shape `(tokens, condition_dim)`): The transformer's condition.
        timestep (`torch.LongTensor` of shape `(tokens,)`): Diffusion times.
        noise (`torch.Tensor` of shape `(tokens, channels)`): Standard normal noise.

    Returns:
        `tuple` of two `torch.Tensor` of shape `(tokens,)`, float32: the mean squared error of the noise and the
        variational bound in bits per channel.
    """
    residual, noise = residual.float(), noise.float()
    noisy = scheduler.add_noise(residual, noise, timestep)
    output = residual_mlp(noisy.to(condition.dtype), timestep, condition).sample.float()
    predicted_noise, variance_fraction = output.chunk(2, dim=-1)
    mse = F.mse_loss(predicted_noise, noise, reduction="none").mean(-1)

    table = {name: values[timestep][:, None] for name, values in scheduler.training_tables_on(residual.device).items()}
    true_mean = table["mean_of_sample"] * residual + table["mean_of_noisy"] * noisy
    predicted = table["sample_from_noisy"] * noisy - table["sample_from_noise"] * predicted_noise.detach()
    mean = table["mean_of_sample"] * predicted + table["mean_of_noisy"] * noisy
    fraction = (variance_fraction + 1) / 2
    log_variance = fraction * table["log_beta"] + (1 - fraction) * table["log_posterior_variance"]

    divergence = _gaussian_kl(true_mean, table["log_posterior_variance"], mean, log_variance)
    likelihood = _discretized_gaussian_nll(residual, mean, log_variance)
    variational = torch.where(timestep[:, None] == 0, likelihood, divergence).mean(-1) / math.log(2)
    return mse, variational
