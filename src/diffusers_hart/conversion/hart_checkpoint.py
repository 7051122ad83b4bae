# SPDX-License-Identifier: Apache-2.0
import os
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import ModelMixin

from ..models import HARTTransformer2DModel, HybridTokenizer, ResidualDiffusionMLP
from ..schedulers import HARTResidualScheduler, HARTScheduler
from .key_tables import (
    NOT_OF_THE_MODEL,
    Row,
    check_original,
    residual_mlp_table,
    to_ours,
    tokenizer_table,
    transformer_table,
)
from .original_config import OriginalConfig
from .weight_files import find_weights, read_weights


DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

EMA_FILES = ("ema_model.bin",)
MODEL_FILES = ("model.safetensors", "pytorch_model.bin")
TOKENIZER_FILES = ("model.safetensors", "model.bin", "pytorch_model.bin")


def load_hart_checkpoint(
    checkpoint_path: str | os.PathLike,
    use_ema: bool = True,
    dtype: torch.dtype | None = None,
    allow_extra_keys: bool = False,
) -> dict[str, Any]:
    r"""
    Load an original HART checkpoint, a folder with `llm/` and `tokenizer/`.

    Args:
        checkpoint_path (`str` or `os.PathLike`): The folder.
        use_ema (`bool`, defaults to `True`):
            Whether to take `llm/ema_model.bin`, the weights the original samples with, or those that were trained,
            `llm/model.safetensors` or `llm/pytorch_model.bin`.
        dtype (`torch.dtype`, *optional*):
            Floating-point type of the weights, by default that of the files. What must stay precise (the head, the
            codebook and its corrections) is kept in float32 beside float16 and bfloat16, as `from_pretrained` does.
        allow_extra_keys (`bool`, defaults to `False`): Whether to leave out weights of unknown names, with a warning.

    Returns:
        `dict`: The components `transformer` ([`HARTTransformer2DModel`]), `residual_mlp` ([`ResidualDiffusionMLP`]),
        `vae` ([`HybridTokenizer`]), `scheduler` ([`HARTScheduler`]) and `residual_scheduler`
        ([`HARTResidualScheduler`]), on the CPU, in evaluation mode.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a file is damaged or holds code, a config asks for what is not supported, or keys are missing,
            unknown or of the wrong shape.
    """
    checkpoint = Path(checkpoint_path)
    llm_file, tokenizer_file = checkpoint_files(checkpoint, use_ema)
    config = OriginalConfig.read(checkpoint)
    with init_empty_weights():
        transformer = HARTTransformer2DModel(**config.transformer())
        residual_mlp = ResidualDiffusionMLP(**config.residual_mlp())
        vae = HybridTokenizer(**config.vae())

    llm = _read_model(llm_file)
    diffusion = {name: llm.pop(name) for name in list(llm) if name.startswith("diffloss.")}
    sources = (
        (transformer, transformer_table(transformer), llm, llm_file),
        (residual_mlp, residual_mlp_table(residual_mlp), diffusion, llm_file),
        (
            vae,
            tokenizer_table(vae, config.tokenizer["share_quant_resi"]),
            _read_model(tokenizer_file),
            tokenizer_file,
        ),
    )
    for model, table, weights, file in sources:
        _fill(model, table, weights, dtype, str(file), allow_extra_keys)
    return {
        "transformer": transformer,
        "residual_mlp": residual_mlp,
        "vae": vae,
        "scheduler": HARTScheduler(**config.scheduler()),
        "residual_scheduler": HARTResidualScheduler(),
    }


def checkpoint_files(checkpoint: Path, use_ema: bool) -> tuple[Path, Path]:
    """
    The files that hold the weights of an original checkpoint: transformer and residual MLP, and tokenizer.

    Raises:
        FileNotFoundError: If the folder is no such checkpoint.
    """
    for folder in (checkpoint, checkpoint / "llm", checkpoint / "tokenizer"):
        if not folder.is_dir():
            raise FileNotFoundError(
                f"There is no folder {folder}: an original checkpoint has `llm` and `tokenizer` side by side."
            )
    if use_ema:
        advice = " Without EMA weights (`use_ema=False`, `--no_ema`) the trained ones are taken."
        llm_file = find_weights(checkpoint / "llm", EMA_FILES, advice)
    else:
        llm_file = find_weights(checkpoint / "llm", MODEL_FILES)
    return llm_file, find_weights(checkpoint / "tokenizer", TOKENIZER_FILES)


def _read_model(path: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in read_weights(path).items() if not NOT_OF_THE_MODEL.fullmatch(name)}


def _fill(
    model: ModelMixin,
    table: list[Row],
    original: dict[str, torch.Tensor],
    dtype: torch.dtype | None,
    source: str,
    allow_extra_keys: bool,
) -> None:
    """Give an empty model the weights of the original."""
    shapes = {name: parameter.shape for name, parameter in model.state_dict().items()}
    check_original(original, table, shapes, source, allow_extra_keys)
    weights = to_ours(original, table, shapes)
    if dtype is not None:
        precise = set(model._keep_in_fp32_modules or ()) if dtype in (torch.float16, torch.bfloat16) else set()
        weights = {
            name: weight.to(torch.float32 if precise & set(name.split(".")) else dtype)
            for name, weight in weights.items()
        }
    model.load_state_dict(weights, assign=True)
    model.eval()
