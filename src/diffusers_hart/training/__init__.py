from .initialization import initialize_residual_mlp, initialize_transformer
from .residual_loss import residual_diffusion_loss
from .teacher_forcing import TeacherForcingTargets, teacher_forcing_targets
from .token_drop import drop_fraction, kept_tokens
from .tokenizer_loss import vector_quantization_loss
from .training_module import HARTTrainingModule


__all__ = [
    "HARTTrainingModule",
    "TeacherForcingTargets",
    "drop_fraction",
    "initialize_residual_mlp",
    "initialize_transformer",
    "kept_tokens",
    "residual_diffusion_loss",
    "teacher_forcing_targets",
    "vector_quantization_loss",
]
