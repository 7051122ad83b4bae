# SPDX-License-Identifier: Apache-2.0
"""Training of HART: losses, targets and draws of a step. Models and pipelines do not know of it."""

from .adversarial_loss import AdversarialLoss, adaptive_weight
from .codebook_usage import CodebookUsage
from .initialization import initialize_residual_mlp, initialize_transformer
from .lora import add_lora_adapter, load_lora_adapters, save_lora_adapters
from .lora_module import LoraTrainingModule
from .patch_discriminator import PatchDiscriminator
from .perceptual_loss import load_perceptual_loss
from .residual_loss import residual_diffusion_loss
from .teacher_forcing import TeacherForcingTargets, teacher_forcing_targets
from .token_drop import drop_fraction, kept_tokens, num_kept_tokens
from .tokenizer_loss import vector_quantization_loss
from .tokenizer_training import (
    TokenizerPhase,
    TokenizerTrainingModule,
    parse_phases,
    phase_of_step,
    quantize_for_training,
)
from .training_module import HARTTrainingModule


__all__ = [
    "AdversarialLoss",
    "CodebookUsage",
    "HARTTrainingModule",
    "LoraTrainingModule",
    "PatchDiscriminator",
    "TeacherForcingTargets",
    "TokenizerPhase",
    "TokenizerTrainingModule",
    "adaptive_weight",
    "add_lora_adapter",
    "drop_fraction",
    "initialize_residual_mlp",
    "initialize_transformer",
    "kept_tokens",
    "load_lora_adapters",
    "load_perceptual_loss",
    "num_kept_tokens",
    "parse_phases",
    "phase_of_step",
    "quantize_for_training",
    "residual_diffusion_loss",
    "save_lora_adapters",
    "teacher_forcing_targets",
    "vector_quantization_loss",
]
