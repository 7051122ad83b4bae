# SPDX-License-Identifier: Apache-2.0
import argparse
from typing import Any

from .console import on_a_terminal


OWN_MODEL = "the shapes model of the package"


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", help="Hub id or folder of a HARTPipeline (default: the package's own small model of shapes)"
    )
    parser.add_argument("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="(default: auto)")
    parser.add_argument(
        "--dtype",
        choices=["float32", "float16", "bfloat16"],
        help="(default: bfloat16 on cuda, float32 elsewhere)",
    )


def load_pipeline(arguments: argparse.Namespace) -> tuple[Any, dict[str, str]]:
    """
    The pipeline, and where it is from, which device it is on and which dtype it is in.

    Raises:
        ValueError: If there is no such device.
    """
    import torch

    from .. import HARTPipeline, shapes_model_path

    model, device, dtype = arguments.model, arguments.device, arguments.dtype
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if device == "auto":
        device = next(name for name in ("cuda", "mps", "cpu") if available[name])
    elif not available[device]:
        raise ValueError(
            f"PyTorch finds no {device} device here; pass --device cpu, or nothing for the best there is."
        )
    dtype = dtype or ("bfloat16" if device == "cuda" else "float32")
    pipe = HARTPipeline.from_pretrained(model or shapes_model_path(), dtype=getattr(torch, dtype)).to(device)
    pipe.set_progress_bar_config(disable=not on_a_terminal())
    return pipe, {"model": model or OWN_MODEL, "device": device, "dtype": dtype}
