# SPDX-License-Identifier: Apache-2.0
import torch
import torch.nn as nn
import torch.nn.functional as F
from accelerate.utils import reduce

from .patch_discriminator import PatchDiscriminator


class AdversarialLoss(nn.Module):
    r"""
    The hinge loss of a discriminator, and what it says of reconstructions to who makes them. Calling it gives the loss
    that trains the discriminator, both kinds of pictures in one forward pass, so that DDP can wrap it.

    Args:
        discriminator ([`PatchDiscriminator`]): Trained.
    """

    def __init__(self, discriminator: PatchDiscriminator):
        super().__init__()
        self.discriminator = discriminator

    def forward(self, images: torch.Tensor, reconstructions: torch.Tensor) -> dict[str, torch.Tensor]:
        r"""
        The discriminator's loss.

        Args:
            images (`torch.Tensor` of shape `(batch_size, channels, height, width)`): Real images in [-1, 1].
            reconstructions (`torch.Tensor` of the same shape): Their reconstructions; they get no gradient.

        Returns:
            `dict[str, torch.Tensor]`: `discriminator_loss`, to be minimised, and the mean `real_logit` and
            `fake_logit`; all of shape `()`.
        """
        real_logits = self.discriminator(images).float()
        fake_logits = self.discriminator(reconstructions.detach()).float()
        return {
            "discriminator_loss": 0.5 * (F.relu(1 - real_logits).mean() + F.relu(1 + fake_logits).mean()),
            "real_logit": real_logits.detach().mean(),
            "fake_logit": fake_logits.detach().mean(),
        }

    def generator_loss(self, reconstructions: torch.Tensor) -> torch.Tensor:
        """The loss `()` that makes reconstructions look real. Gradients reach them alone, not the discriminator."""
        weights = {name: parameter.detach() for name, parameter in self.discriminator.named_parameters()}
        return -torch.func.functional_call(self.discriminator, weights, (reconstructions,)).float().mean()


def adaptive_weight(
    reconstruction_loss: torch.Tensor, generator_loss: torch.Tensor, last_layer: torch.Tensor
) -> torch.Tensor:
    r"""
    The factor by which the generator's loss pulls as hard at the decoder's last layer as the reconstruction loss does
    (VQGAN, [2012.09841](https://huggingface.co/papers/2012.09841), eq. 7), in all processes together.

    Args:
        reconstruction_loss (`torch.Tensor` of shape `()`), generator_loss (`torch.Tensor` of shape `()`): The losses.
        last_layer (`torch.Tensor`): Weight of the last layer that both depend on.

    Returns:
        `torch.Tensor` of shape `()`: between 0 and 10000, without gradients.
    """
    norms = [
        reduce(torch.autograd.grad(loss, last_layer, retain_graph=True)[0], "mean").float().norm()
        for loss in (reconstruction_loss, generator_loss)
    ]
    return (norms[0] / (norms[1] + 1e-4)).clamp(0, 1e4)
