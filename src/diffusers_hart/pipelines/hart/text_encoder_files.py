# SPDX-License-Identifier: Apache-2.0
"""Checks of a saved text encoder. transformers fills what is missing with defaults and random numbers."""

import os
from pathlib import Path

import torch.nn as nn
from safetensors import safe_open

from ...models.strict_loading import check_finite, check_names


def check_text_encoder_config(pipeline_path: str | os.PathLike) -> None:
    """Raises `OSError` if a pipeline's folder has a text encoder without a config, which is loaded as one of 7 B."""
    folder = Path(pipeline_path) / "text_encoder"
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise OSError(f"Error no file named config.json found in directory {folder}.")


def check_text_encoder(text_encoder: nn.Module | None) -> None:
    """Raises `ValueError` if weights of a text encoder that was just loaded were not in its files, or are not finite."""
    folder = Path(getattr(text_encoder, "name_or_path", None) or "")
    if getattr(text_encoder, "hf_quantizer", None) is not None or not folder.is_dir():
        return
    saved = set()
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            saved |= {key.removeprefix(f"{text_encoder.base_model_prefix}.") for key in file.keys()}
    if saved:
        names = {key.removeprefix(f"{text_encoder.base_model_prefix}.") for key in text_encoder.state_dict()}
        heads = {key for key in saved if key.startswith("lm_head.")}  # of a whole language model, which are not needed
        check_names(type(text_encoder).__name__, str(folder), names - saved, saved - names - heads)
    check_finite(text_encoder, str(folder))
