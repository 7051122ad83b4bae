# SPDX-License-Identifier: Apache-2.0
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from .teacher_forcing import TeacherForcingTargets
from .training_module import HARTTrainingModule


class LoraTrainingModule(HARTTrainingModule):
    r"""
    One step's loss of adapters: that of [`HARTTrainingModule`], with captions that a trained text encoder reads and, for
    DreamBooth, with the loss of other pictures of the subject's class.

    Args:
        text_encoder (`PreTrainedModel`, *optional*): The text encoder, if it is trained.
        encode_captions (`Callable`, *optional*):
            Makes embeddings `(batch_size, tokens, caption_channels)` and their mask of a list of captions with it.
        prior_loss_weight (`float`, defaults to `1.0`): Weight of the loss of pictures of the class.
        args (`tuple`): As in [`HARTTrainingModule`].
        kwargs (`dict`): As in [`HARTTrainingModule`].
    """

    def __init__(
        self,
        *args: Any,
        text_encoder: PreTrainedModel | None = None,
        encode_captions: Callable[[list[str]], tuple[torch.Tensor, torch.Tensor]] | None = None,
        prior_loss_weight: float = 1.0,
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        self.text_encoder = text_encoder
        self.encode_captions = encode_captions
        self.prior_loss_weight = prior_loss_weight

    def forward(
        self,
        targets: TeacherForcingTargets,
        step: int,
        positions: Sequence[int],
        captions: list[str] | None = None,
        prior: dict[str, Any] | None = None,
        **condition: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        r"""
        The losses of one batch.

        Args:
            targets ([`TeacherForcingTargets`]): What [`teacher_forcing_targets`] makes of the pictures.
            step (`int`): Number of optimizer steps before this one.
            positions (`Sequence[int]`): How many samples the run had seen before each of these.
            captions (`list[str]`, *optional*): The captions, if they are not given as embeddings in `condition`.
            prior (`dict[str, Any]`, *optional*): `targets` and captions or condition of as many pictures of the class.
            condition: As in [`HARTTrainingModule.forward`].

        Returns:
            `dict[str, torch.Tensor]`: As [`HARTTrainingModule.forward`]; with `prior` also `prior_loss`, which `loss`
            includes with its weight.
        """
        losses = self._losses(targets, step, positions, captions, **condition)
        if prior is None:
            return losses
        # Other draws than those of the subject's pictures.
        prior_losses = self._losses(step=step, positions=[-1 - position for position in positions], **prior)
        loss = losses["loss"] + self.prior_loss_weight * prior_losses["loss"]
        return {**losses, "loss": loss, "prior_loss": prior_losses["loss"].detach()}

    def _losses(
        self,
        targets: TeacherForcingTargets,
        step: int,
        positions: Sequence[int],
        captions: list[str] | None = None,
        **condition: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        if captions is not None:
            embeds, mask = self.encode_captions(captions)
            condition = {"prompt_embeds": embeds, "prompt_attention_mask": mask}
        return super().forward(targets, step, positions, **condition)
