# SPDX-License-Identifier: Apache-2.0
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from ..models import HybridTokenizer
from .adversarial_loss import AdversarialLoss, adaptive_weight
from .random_draws import seeded_generator
from .tokenizer_loss import vector_quantization_loss


TRAINED_PARTS = {
    "continuous": ("encoder", "quant_conv", "post_quant_conv", "decoder"),
    "discrete": ("encoder", "quant_conv", "codebook", "phi", "post_quant_conv", "decoder"),
    "joint": ("encoder", "quant_conv", "codebook", "phi", "post_quant_conv", "decoder"),
    "alternating": ("post_quant_conv", "decoder"),
}


class TokenizerPhase(NamedTuple):
    """
    A part of a tokenizer's training.

    Args:
        name (`str`): `"continuous"`, `"discrete"`, `"joint"` or `"alternating"`, see [`TokenizerTrainingModule`].
        steps (`int`): Number of optimizer steps.
    """

    name: str
    steps: int


def parse_phases(text: str) -> tuple[TokenizerPhase, ...]:
    """
    Phases from text such as `continuous:1000,discrete:5000,alternating:2000`.

    Raises:
        ValueError: If it is not of this form.
    """
    phases = []
    for part in text.split(","):
        name, _, steps = part.strip().partition(":")
        if name not in TRAINED_PARTS or not steps.isdecimal() or int(steps) == 0:
            raise ValueError(
                f"{part.strip()!r} is not a phase: expected a name of {', '.join(TRAINED_PARTS)} and a number of steps, "
                "as in 'continuous:1000,discrete:5000,alternating:2000'."
            )
        phases.append(TokenizerPhase(name, int(steps)))
    return tuple(phases)


def phase_of_step(phases: Sequence[TokenizerPhase], step: int) -> str:
    """Name of the phase that has `step` optimizer steps before it; past the end, of the last one."""
    for name, steps in phases:
        if step < steps:
            return name
        step -= steps
    return phases[-1].name


class QuantizedLatents(NamedTuple):
    """
    What [`quantize_for_training`] makes of latents. `L` is the number of tokens of all scales together.

    Args:
        decoder_latents (`torch.Tensor` of shape `(batch_size, latent_channels, P, P)`): What the decoder gets.
        vq_loss (`torch.Tensor` of shape `()`): The loss of [`vector_quantization_loss`].
        codes (`torch.LongTensor` of shape `(batch_size, L)`): The codes of all scales.
        scale_residuals (`torch.Tensor` of shape `(batch_size, L, latent_channels)`):
            What each scale was asked to code, without gradients.
    """

    decoder_latents: torch.Tensor
    vq_loss: torch.Tensor
    codes: torch.LongTensor
    scale_residuals: torch.Tensor


def quantize_for_training(
    vae: HybridTokenizer,
    latents: torch.Tensor,
    use_residual: bool = False,
    commitment_weight: float = 0.25,
) -> QuantizedLatents:
    r"""
    Quantize latents as the tokenizer's own training does: with phi at every scale, the last one too.

    Args:
        vae ([`HybridTokenizer`]): The tokenizer.
        latents (`torch.Tensor` of shape `(batch_size, latent_channels, P, P)`): The continuous latents.
        use_residual (`bool`, defaults to `False`):
            Whether the decoder gets the whole latents. Otherwise it gets the sum of the discrete scales, which passes
            its gradients straight through to the latents.
        commitment_weight (`float`, defaults to `0.25`): As in [`vector_quantization_loss`].

    Returns:
        [`QuantizedLatents`].
    """
    codes, partial_latents, _ = vae.quantize(latents, phi_at_last_scale=True)
    with torch.no_grad():
        rests = [latents, *(latents - partial for partial in partial_latents[:-1])]
        scale_residuals = torch.cat([vae.next_scale_input(rest, k) for k, rest in enumerate(rests)], dim=1)
    return QuantizedLatents(
        # The discrete sum and what it leaves over are the latents.
        decoder_latents=latents if use_residual else latents + (partial_latents[-1] - latents).detach(),
        vq_loss=vector_quantization_loss(latents, partial_latents, commitment_weight),
        codes=codes,
        scale_residuals=scale_residuals,
    )


class TokenizerTrainingModule(nn.Module):
    r"""
    One step's loss of a [`HybridTokenizer`], in one forward pass. What is trained, and what the decoder gets, depends
    on the phase:

    - `"continuous"`: encoder and decoder, without any quantization;
    - `"discrete"`: everything; the decoder gets the sum of the discrete scales, whose gradients go straight through to
      the continuous latents;
    - `"joint"`: everything; a whole step's decoder gets the discrete sum or the continuous latents, as the seed and the
      step decide, so that the latents keep what codes cannot say;
    - `"alternating"`: the decoder and `post_quant_conv` alone, with either kind of latents as in the joint phase, so
      that one decoder serves both.

    Args:
        vae ([`HybridTokenizer`]): Trained, in float32, for images that its configured scales fit.
        seed (`int`, defaults to `0`): Seed of the run.
        discrete_probability (`float`, defaults to `0.5`):
            How probable the discrete sum is in a step of the joint and the alternating phase.
        mse_weight (`float`, defaults to `1.0`), l1_weight (`float`, defaults to `0.0`):
            Weights of the pixels' squared and absolute differences.
        vq_weight (`float`, defaults to `1.0`), commitment_weight (`float`, defaults to `0.25`):
            Weight of [`vector_quantization_loss`] and the one inside it. Only phases that train the codebook add this loss.
        perceptual_weight (`float`, defaults to `1.0`), adversarial_weight (`float`, defaults to `0.5`):
            Weights of the losses that a call may bring along.
        adaptive_adversarial_weight (`bool`, defaults to `True`):
            Whether the latter is multiplied by [`adaptive_weight`], or fixed.
    """

    def __init__(
        self,
        vae: HybridTokenizer,
        seed: int = 0,
        discrete_probability: float = 0.5,
        mse_weight: float = 1.0,
        l1_weight: float = 0.0,
        vq_weight: float = 1.0,
        commitment_weight: float = 0.25,
        perceptual_weight: float = 1.0,
        adversarial_weight: float = 0.5,
        adaptive_adversarial_weight: bool = True,
    ):
        super().__init__()
        self.vae = vae
        self.seed = seed
        self.discrete_probability = discrete_probability
        self.mse_weight = mse_weight
        self.l1_weight = l1_weight
        self.vq_weight = vq_weight
        self.commitment_weight = commitment_weight
        self.perceptual_weight = perceptual_weight
        self.adversarial_weight = adversarial_weight
        self.adaptive_adversarial_weight = adaptive_adversarial_weight
        self.set_phase("discrete")

    def set_phase(self, phase: str) -> None:
        """Begin or go on with a phase: from now on it decides what the decoder gets and which weights get gradients."""
        self.phase = phase
        for name, part in self.vae.named_children():
            part.requires_grad_(name in TRAINED_PARTS[phase])

    def uses_residual(self, step: int) -> bool:
        """Whether the decoder gets the continuous latents in this step."""
        if self.phase in ("continuous", "discrete"):
            return self.phase == "continuous"
        draw = torch.rand((), generator=seeded_generator("cpu", self.seed, "alternating", step)).item()
        return draw >= self.discrete_probability

    def forward(
        self,
        images: torch.Tensor,
        step: int,
        perceptual_loss: nn.Module | None = None,
        adversarial_loss: AdversarialLoss | None = None,
    ) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        r"""
        The losses of one batch, as far as the tokenizer is trained by them.

        Args:
            images (`torch.Tensor` of shape `(batch_size, channels, height, width)`): Images in [-1, 1].
            step (`int`): Number of optimizer steps before this one.
            perceptual_loss (`nn.Module`, *optional*):
                Takes reconstructions and images and gives their distances, such as [`load_perceptual_loss`].
            adversarial_loss ([`AdversarialLoss`], *optional*): Holds the discriminator, which is not trained here.

        Returns:
            `tuple` of two dicts. The first holds `loss`, to be minimised, and its parts `mse_loss`, `l1_loss`,
            `vq_loss` (except in the continuous phase), `perceptual_loss`, `generator_loss` and the latter's
            `generator_weight` (where there is such a loss); all of shape `()`. The second holds the `reconstructions`
            of the images' shape and, except in the continuous phase, `codes` and `scale_residuals` as in
            [`QuantizedLatents`]; none has gradients.
        """
        # 1. Latents, and what the decoder gets of them
        latents = self.vae.quant_conv(self.vae.encoder(images)).float()
        if self.phase == "continuous":
            decoder_latents, details, losses = latents, {}, {}
        else:
            use_residual = self.uses_residual(step)
            quantized = quantize_for_training(self.vae, latents, use_residual, self.commitment_weight)
            decoder_latents = quantized.decoder_latents
            details = {"codes": quantized.codes, "scale_residuals": quantized.scale_residuals}
            losses = {"vq_loss": quantized.vq_loss}

        # 2. Reconstructions, not clamped: gradients of all pixels are wanted
        reconstructions = self.vae.decoder(self.vae.post_quant_conv(decoder_latents)).float()
        losses["mse_loss"] = F.mse_loss(reconstructions, images)
        losses["l1_loss"] = F.l1_loss(reconstructions, images)
        loss = self.mse_weight * losses["mse_loss"] + self.l1_weight * losses["l1_loss"]
        if perceptual_loss is not None:
            losses["perceptual_loss"] = perceptual_loss(reconstructions, images).float().mean()
            loss = loss + self.perceptual_weight * losses["perceptual_loss"]

        # 3. What the discriminator says of them, weighed against the losses so far, and the codebook's loss
        if adversarial_loss is not None:
            losses["generator_loss"] = adversarial_loss.generator_loss(reconstructions)
            losses["generator_weight"] = images.new_tensor(self.adversarial_weight)
            if self.adaptive_adversarial_weight:
                last_layer = self.vae.decoder.conv_out.weight
                losses["generator_weight"] *= adaptive_weight(loss, losses["generator_loss"], last_layer)
            loss = loss + losses["generator_weight"] * losses["generator_loss"]
        if "codebook" in TRAINED_PARTS[self.phase]:
            loss = loss + self.vq_weight * losses["vq_loss"]

        details["reconstructions"] = reconstructions.detach()
        return {"loss": loss, **{name: value.detach() for name, value in losses.items()}}, details
