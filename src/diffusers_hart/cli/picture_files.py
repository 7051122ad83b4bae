# SPDX-License-Identifier: Apache-2.0
import io
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import PIL.Image
from PIL.PngImagePlugin import PngInfo


def numbered_paths(output: Path, number: int) -> list[Path]:
    """Where to write a number of pictures: `out-0.png`, `out-1.png`, ... if it is not one alone."""
    if number == 1:
        return [output]
    width = len(str(number - 1))
    return [output.with_name(f"{output.stem}-{i:0{width}}{output.suffix}") for i in range(number)]


def check_pictures(paths: Sequence[Path]) -> str:
    """
    The format of the pictures, after making sure, before anything is computed, that they can be written.

    Raises:
        ValueError: If they cannot.
    """
    PIL.Image.init()
    suffix, folder = paths[0].suffix.lower(), paths[0].parent
    image_format = PIL.Image.registered_extensions().get(suffix)
    try:
        PIL.Image.new("RGB", (16, 16)).save(io.BytesIO(), format=image_format or "unknown")
    except (KeyError, ValueError, OSError) as error:
        raise ValueError(f"{paths[0]}: pictures cannot be written as {suffix!r}; use .png, for example.") from error
    place = folder
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
        for place in paths:
            if place.exists():
                place.open("r+b").close()
    except OSError as error:
        raise ValueError(f"Pictures cannot be written to {place}: {error.strerror}.") from error
    return image_format


def save_picture(image: PIL.Image.Image, path: Path, image_format: str, **texts: Any) -> None:
    """Write a picture; what it was made of goes into the metadata of PNG files, as text or JSON."""
    options = {}
    if image_format == "PNG":
        options["pnginfo"] = PngInfo()
        for name, text in texts.items():
            options["pnginfo"].add_text(name, text if isinstance(text, str) else json.dumps(text))
    image.save(path, format=image_format, **options)


def picture_grid(images: Sequence[PIL.Image.Image], columns: int) -> PIL.Image.Image:
    """Pictures of one size in rows; places that are left over are white."""
    width, height = images[0].size
    rows = -(-len(images) // columns)
    grid = PIL.Image.new("RGB", (columns * width, rows * height), "white")
    for i, image in enumerate(images):
        grid.paste(image, (i % columns * width, i // columns * height))
    return grid
