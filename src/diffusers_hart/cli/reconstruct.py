# SPDX-License-Identifier: Apache-2.0
import argparse
import math
from pathlib import Path
from typing import Any

from .argument_types import positive
from .console import on_a_terminal, print_json
from .model_source import add_model_arguments, load_pipeline
from .picture_files import check_pictures, picture_grid, save_picture


def reconstruct(arguments: argparse.Namespace) -> None:
    """
    Show what the tokenizer makes of pictures, a row each: the picture, cut to a square of the model's size; what its
    codes alone show, as generation decodes them; and what codes and continuous residual show.
    """
    import PIL.Image
    import PIL.ImageOps
    import torch
    from tqdm.auto import tqdm

    from ..reconstruction import reconstruct as reconstruct_images

    image_format = check_pictures([arguments.output])
    originals = []
    for path in arguments.pictures:
        try:
            with PIL.Image.open(path) as image:
                originals.append(PIL.ImageOps.exif_transpose(image).convert("RGB"))
        except PIL.UnidentifiedImageError as error:
            raise ValueError(f"{path} is no picture that can be read.") from error
    pipe, origin = load_pipeline(arguments)
    side, scales = _size_and_scales(pipe, arguments.size)

    cells, rows = [], []
    for path, original in zip(arguments.pictures, tqdm(originals, unit="picture", disable=not on_a_terminal())):
        image = PIL.ImageOps.fit(original, (side, side), PIL.Image.Resampling.LANCZOS)
        pixels = pipe.image_processor.preprocess(image).to(pipe.vae.device)
        shown = [pixels, *reconstruct_images(pipe.vae, pixels, scales)[:2]]
        levels = [(picture / 2 + 0.5).clamp(0, 1).mul(255).round() for picture in shown]
        cells += pipe.image_processor.postprocess(torch.cat(shown), output_type="pil")
        rows.append(
            {
                "picture": str(path),
                "psnr_discrete": _psnr(levels[1], levels[0]),
                "psnr_hybrid": _psnr(levels[2], levels[0]),
            }
        )
    result = {"output": str(arguments.output), "size": side, **origin, "pictures": rows}
    save_picture(picture_grid(cells, columns=3), arguments.output, image_format, reconstruction=result)
    if arguments.json:
        print_json(result)
        return
    print(arguments.output)
    for row in rows:
        discrete, hybrid = (
            "equal" if row[name] is None else f"{row[name]:.2f} dB" for name in ("psnr_discrete", "psnr_hybrid")
        )
        print(f"{row['picture']}: codes {discrete}, codes and residual {hybrid}")


def add_reconstruct_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("pictures", nargs="+", type=Path, metavar="picture", help="files of any size")
    parser.add_argument(
        "-o", "--output", type=Path, default=Path("reconstruction.png"), help="the rows (default: %(default)s)"
    )
    parser.add_argument(
        "--size", type=positive, metavar="PIXELS", help="side of the square (default: the model's own)"
    )
    add_model_arguments(parser)


def _size_and_scales(pipe: Any, size: int | None) -> tuple[int, tuple[int, ...]]:
    schedules = {scales[-1] * pipe.vae_scale_factor: tuple(scales) for scales in pipe.scheduler.config.schedules}
    side = pipe.transformer.config.sample_size * pipe.vae_scale_factor if size is None else size
    if side not in schedules:
        sizes = " or ".join(str(known) for known in schedules)
        raise ValueError(f"--size {side} fits no schedule of scales; this model has some for {sizes} pixels.")
    return side, schedules[side]


def _psnr(levels: Any, originals: Any) -> float | None:
    """Peak signal-to-noise ratio in dB of pictures in levels of 255, as they are written; `None` if they are equal."""
    error = (levels.double() - originals.double()).square().mean().item()
    return 10 * math.log10(255**2 / error) if error else None
