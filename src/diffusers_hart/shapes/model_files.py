# SPDX-License-Identifier: Apache-2.0
from pathlib import Path

from .checker import ShapesChecker


FOLDER = Path(__file__).parent


def shapes_model_path() -> Path:
    """
    Folder of what is trained so far of a small text-to-image pipeline of [`ShapesDataset`]: `vae`, `text_encoder` and
    `tokenizer`, from which `examples/shapes/train.sh` goes on. Its transformer is still to come.
    """
    return FOLDER / "model"


def load_shapes_checker() -> ShapesChecker:
    """The trained checker that the package brings along, in float32, frozen and in evaluation mode."""
    return ShapesChecker.from_pretrained(FOLDER / "checker_weights").requires_grad_(False).eval()
