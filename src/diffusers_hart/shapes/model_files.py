# SPDX-License-Identifier: Apache-2.0
from pathlib import Path

from .checker import ShapesChecker


FOLDER = Path(__file__).parent


def shapes_model_path() -> Path:
    """
    Folder of the small text-to-image pipeline that the package brings along, trained on [`ShapesDataset`], for
    [`HARTPipeline.from_pretrained`]; its `README.md` says how.
    """
    return FOLDER / "model"


def load_shapes_checker() -> ShapesChecker:
    """The trained checker that the package brings along, in float32, frozen and in evaluation mode."""
    return ShapesChecker.from_pretrained(FOLDER / "checker_weights").requires_grad_(False).eval()
