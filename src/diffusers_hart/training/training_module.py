# SPDX-License-Identifier: Apache-2.0
from collections.abc import Sequence
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F

from ..models import HARTTransformer2DModel, HybridTokenizer, ResidualDiffusionMLP
from ..schedulers import HARTResidualScheduler, HARTScheduler
from .random_draws import draw_integers, draw_normal, draw_uniform
from .residual_loss import residual_diffusion_loss
from .teacher_forcing import TeacherForcingTargets, teacher_forcing_targets
from .token_drop import drop_fraction, kept_tokens, num_kept_tokens


class HARTTrainingModule(nn.Module):
    r"""
    One step's loss of a HART transformer and its residual MLP, in one forward pass, so that DDP and FSDP wrap one
    module (section 3.3 of the [paper](https://huggingface.co/papers/2410.10812)). Text or class conditioning follows
    from the transformer.

    Every random draw of a step is a function of the seed and the sample's position in the run; the drop fraction, which
    all samples share, of the seed and the step.

    Args:
        transformer ([`HARTTransformer2DModel`]): Trained.
        residual_mlp ([`ResidualDiffusionMLP`]): Trained.
        vae ([`HybridTokenizer`]): Frozen; only its codebook is kept here.
        scheduler ([`HARTScheduler`]): Draws the codes that the residual builds upon.
        residual_scheduler ([`HARTResidualScheduler`]): The process of the residual diffusion.
        scales (`Sequence[int]`): Sides of the scales of the training resolution.
        seed (`int`, defaults to `0`): Seed of the run.
        token_drop (`bool`, defaults to `True`): Whether to drop tokens of the last scale.
        condition_dropout (`float`, defaults to `0.1`): Share of samples that are trained without their condition.
        residual_loss_weight (`float`, defaults to `1.0`): Weight of the residual diffusion's loss.
        residual_batch_multiplier (`int`, defaults to `4`): How often each residual is used, with different noise.
        sample_top_k (`int`, defaults to `600`), sample_top_p (`float`, defaults to `0.96`):
            From what the codes under the residual are drawn.
        self_correction (`float`, defaults to `0.0`):
            Largest share of a picture's tokens from which scales go on with a code that the model has drawn instead of
            the right one, so that it learns to make up for what does not fit: tokens of a scale are drawn independently.
            After [Infinity](https://huggingface.co/papers/2412.04431), section 3.3, whose mistakes are random.
        num_scales (`int`, *optional*):
            Train on the first so many scales alone, without the residual: what is where, for a fraction of the cost of
            a picture. Goes without self-correction.

    Raises:
        ValueError: If both `num_scales` and `self_correction` are given.
    """

    _no_split_modules = ["HARTTransformerBlock", "ResidualMLPBlock"]  # what FSDP shards by

    def __init__(
        self,
        transformer: HARTTransformer2DModel,
        residual_mlp: ResidualDiffusionMLP,
        vae: HybridTokenizer,
        scheduler: HARTScheduler,
        residual_scheduler: HARTResidualScheduler,
        scales: Sequence[int],
        seed: int = 0,
        token_drop: bool = True,
        condition_dropout: float = 0.1,
        residual_loss_weight: float = 1.0,
        residual_batch_multiplier: int = 4,
        sample_top_k: int = 600,
        sample_top_p: float = 0.96,
        self_correction: float = 0.0,
        num_scales: int | None = None,
    ):
        super().__init__()
        if num_scales is not None and self_correction:
            raise ValueError(
                f"`num_scales`={num_scales}, the first scales alone, goes without `self_correction`={self_correction}."
            )
        self.transformer = transformer
        self.residual_mlp = residual_mlp
        self.register_buffer("codebook", vae.codebook.weight.detach().float().clone(), persistent=False)
        self.scheduler = scheduler
        self.residual_scheduler = residual_scheduler
        self.scales = tuple(scales)
        self.seed = seed
        self.token_drop = token_drop and num_scales is None
        self.condition_dropout = condition_dropout
        self.residual_loss_weight = residual_loss_weight
        self.residual_batch_multiplier = residual_batch_multiplier
        self.sample_top_k = sample_top_k
        self.sample_top_p = sample_top_p
        self.self_correction = self_correction
        self.num_scales = num_scales
        self.targets_of = partial(teacher_forcing_targets, vae, self.scales)

    def forward(
        self,
        targets: TeacherForcingTargets,
        step: int,
        positions: Sequence[int] | torch.Tensor,
        prompt_embeds: torch.Tensor | None = None,
        prompt_attention_mask: torch.Tensor | None = None,
        class_labels: torch.LongTensor | None = None,
    ) -> dict[str, torch.Tensor]:
        r"""
        The losses of one batch.

        Args:
            targets ([`TeacherForcingTargets`]): What [`teacher_forcing_targets`] makes of the pictures.
            step (`int`): Number of optimizer steps before this one.
            positions (`Sequence[int]` or `torch.LongTensor` of shape `(batch_size,)`):
                How many samples the run had seen before each of these.
            prompt_embeds (`torch.Tensor` of shape `(batch_size, tokens, caption_channels)`, *optional*): The captions.
            prompt_attention_mask (`torch.Tensor` of shape `(batch_size, tokens)`, *optional*): Their mask.
            class_labels (`torch.LongTensor` of shape `(batch_size,)`, *optional*): The classes.

        Returns:
            `dict[str, torch.Tensor]`: `loss`, to be minimised, and its parts `code_loss` (cross-entropy in nats),
            `residual_mse` and `residual_variational` (bits per channel; not for the first scales alone), and
            `code_accuracy`; all of shape `()`.
        """
        # 1. The condition, dropped for some samples, and the tokens of the last scale that are gone through
        device = targets.codes.device
        positions = torch.as_tensor(positions).to(device, non_blocking=True)
        condition = self.drop_condition(prompt_embeds, prompt_attention_mask, class_labels, positions)
        if self.num_scales is not None:
            return self.losses_of_first_scales(targets, condition)
        if self.self_correction:
            mistakes = self.draw_mistakes(targets, condition, positions)
            targets = self.targets_of(latents=targets.latents, mistakes=mistakes)
        codes, last_scale, kept = targets.codes, targets.last_scale, None
        if self.token_drop:
            fraction = drop_fraction(self.seed, step)
            kept = kept_tokens(last_scale.shape[1], fraction, self.seed, positions, device)
            last_codes = codes[:, -last_scale.shape[1] :].gather(1, kept)
            codes = torch.cat([codes[:, : -last_scale.shape[1]], last_codes], dim=1)
            last_scale = last_scale.gather(1, kept[..., None].expand(-1, -1, last_scale.shape[2]))

        # 2. All scales at once, from their true inputs
        scale_inputs = targets.scale_inputs.to(self.transformer.dtype)
        output = self.transformer(scale_inputs, self.scales, **condition, kept_tokens=kept)
        logits = output.logits.float()
        code_loss = F.cross_entropy(logits.flatten(0, 1), codes.flatten())

        # 3. The residual behind codes that are drawn as in generation, not behind the true ones
        num_last = last_scale.shape[1]
        sampled_embeds = F.embedding(self.sample_codes(logits[:, -num_last:].detach(), positions), self.codebook)
        residual = (last_scale - sampled_embeds) / self.residual_mlp.config.residual_scale
        residual_condition = self.transformer.residual_condition(output.hidden_states[:, -num_last:], sampled_embeds)
        residual_mse, residual_variational = self.residual_loss(residual, residual_condition, positions)

        loss = code_loss + self.residual_loss_weight * (residual_mse + residual_variational)
        return {
            "loss": loss,
            "code_loss": code_loss.detach(),
            "residual_mse": residual_mse.detach(),
            "residual_variational": residual_variational.detach(),
            "code_accuracy": (logits.argmax(-1) == codes).float().mean(),
        }

    def losses_of_first_scales(
        self, targets: TeacherForcingTargets, condition: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """The losses of one batch at the first `num_scales` scales."""
        num_tokens = sum(side * side for side in self.scales[: self.num_scales])
        scale_inputs = targets.scale_inputs[:, : num_tokens - 1].to(self.transformer.dtype)
        codes = targets.codes[:, :num_tokens]
        logits = self.transformer(scale_inputs, self.scales, **condition).logits.float()
        code_loss = F.cross_entropy(logits.flatten(0, 1), codes.flatten())
        accuracy = (logits.argmax(-1) == codes).float().mean()
        return {"loss": code_loss, "code_loss": code_loss.detach(), "code_accuracy": accuracy}

    def num_kept_tokens(self, step: int) -> int:
        """How many tokens of the last scale a step goes through."""
        num_last = self.scales[-1] ** 2
        return num_kept_tokens(num_last, drop_fraction(self.seed, step)) if self.token_drop else num_last

    def drop_condition(
        self,
        prompt_embeds: torch.Tensor | None,
        prompt_attention_mask: torch.Tensor | None,
        class_labels: torch.LongTensor | None,
        positions: Sequence[int] | torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        """The transformer's condition, for some samples the unconditional one that guidance starts from."""
        given = class_labels if class_labels is not None else prompt_embeds
        dropped = draw_uniform((), given.device, self.seed, "condition dropout", positions) < self.condition_dropout
        if class_labels is not None:
            return {"class_labels": class_labels.masked_fill(dropped, self.transformer.config.num_classes)}
        # The text's offset goes with it: generation has the unconditional branch at position 0.
        unconditional_mask = torch.zeros_like(prompt_attention_mask)
        unconditional_mask[:, 0] = 1
        return {
            "encoder_hidden_states": prompt_embeds.masked_fill(dropped[:, None, None], 0).to(self.transformer.dtype),
            "encoder_attention_mask": torch.where(dropped[:, None], unconditional_mask, prompt_attention_mask),
        }

    @torch.no_grad()
    def draw_mistakes(
        self,
        targets: TeacherForcingTargets,
        condition: dict[str, torch.Tensor],
        positions: Sequence[int] | torch.Tensor,
    ) -> torch.LongTensor:
        """Codes `(batch_size, L)` that the model draws for some tokens before the last scale; -1 for the others."""
        device = targets.codes.device
        # The last scale, behind which there is none to make up for it, is left out but for one token.
        no_last = torch.zeros(len(targets.codes), 1, dtype=torch.long, device=device)
        inputs = targets.scale_inputs.to(self.transformer.dtype)
        logits = self.transformer(inputs, self.scales, **condition, kept_tokens=no_last).logits[:, :-1].float()
        torch.clear_autocast_cache()  # of weights that were cast here, without gradients
        uniform = 1 - draw_uniform(logits.shape[1:2], device, self.seed, "mistakes", positions)
        drawn = self.scheduler.draw_codes(logits, uniform)
        # As many as leave the right picture to be seen: of whole scales that are drawn nothing could be mended.
        share = self.self_correction * draw_uniform((1,), device, self.seed, "share of mistakes", positions)
        chosen = draw_uniform(drawn.shape[1:], device, self.seed, "mistaken tokens", positions) < share
        return F.pad(drawn.masked_fill(~chosen, -1), (0, self.scales[-1] ** 2), value=-1)

    @torch.no_grad()
    def sample_codes(self, logits: torch.Tensor, positions: Sequence[int] | torch.Tensor) -> torch.LongTensor:
        """Codes `(batch_size, tokens)` drawn from logits `(batch_size, tokens, codebook_size)`."""
        uniform = 1 - draw_uniform(logits.shape[1:2], logits.device, self.seed, "codes", positions)
        masked = self.scheduler.mask_logits(logits, 0, self.sample_top_k, self.sample_top_p)
        return self.scheduler.draw_codes(masked, uniform)

    def residual_loss(
        self, residual: torch.Tensor, condition: torch.Tensor, positions: Sequence[int] | torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Both terms of the residual's loss, each residual `(batch_size, tokens, channels)` used several times."""
        shape = (self.residual_batch_multiplier, *residual.shape[1:])
        num_timesteps = self.residual_scheduler.config.num_train_timesteps
        timestep = draw_integers(num_timesteps, shape[:-1], residual.device, self.seed, "timestep", positions)
        noise = draw_normal(shape, residual.device, self.seed, "noise", positions)
        repeated = [
            tensor[:, None].expand(-1, self.residual_batch_multiplier, -1, -1).flatten(0, 2)
            for tensor in (residual, condition)
        ]
        mse, variational = residual_diffusion_loss(
            self.residual_mlp, self.residual_scheduler, *repeated, timestep.flatten(), noise.flatten(0, 2)
        )
        return mse.mean(), variational.mean()
