# SPDX-License-Identifier: Apache-2.0
from collections.abc import Sequence

import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont
from diffusers.utils import make_image_grid


FONT_SIZE = 12
LINE_HEIGHT = 15
PADDING = 4
MAX_CAPTION_LINES = 6


def captioned_grid(images: Sequence[PIL.Image.Image], captions: Sequence[str], columns: int) -> PIL.Image.Image:
    r"""
    Pictures of one size in rows, each over its caption. A caption that is too long for its place ends in "...".

    Args:
        images (`Sequence[PIL.Image.Image]`): The pictures, row by row.
        captions (`Sequence[str]`): As many.
        columns (`int`): Number of pictures in a row.
    """
    font = PIL.ImageFont.load_default(FONT_SIZE)
    width, height = images[0].size
    wrapped = [_wrapped(caption, width - 2 * PADDING, font) for caption in captions]
    lines = max(len(text) for text in wrapped)
    cell_size = (width, height + lines * LINE_HEIGHT + 2 * PADDING)
    cells = []
    for image, text in zip(images, wrapped):
        cell = PIL.Image.new("RGB", cell_size, "white")
        cell.paste(image)
        draw = PIL.ImageDraw.Draw(cell)
        for i, line in enumerate(text):
            draw.text((PADDING, height + PADDING + i * LINE_HEIGHT), line, "black", font)
        cells.append(cell)
    rows = -(-len(cells) // columns)
    cells += [PIL.Image.new("RGB", cell_size, "white")] * (rows * columns - len(cells))
    return make_image_grid(cells, rows, columns)


def labelled_rows(rows: dict[str, Sequence[PIL.Image.Image]]) -> PIL.Image.Image:
    r"""
    Rows of pictures of one size, each with its name beside it.

    Args:
        rows (`dict[str, Sequence[PIL.Image.Image]]`): Pictures by name, equally many in each row.
    """
    font = PIL.ImageFont.load_default(FONT_SIZE)
    width, height = next(iter(rows.values()))[0].size
    label_width = max(int(font.getlength(name)) for name in rows) + 2 * PADDING
    strips = []
    for name, images in rows.items():
        strip = PIL.Image.new("RGB", (label_width + width * len(images), height), "white")
        PIL.ImageDraw.Draw(strip).text((PADDING, (height - LINE_HEIGHT) // 2), name, "black", font)
        for i, image in enumerate(images):
            strip.paste(image, (label_width + i * width, 0))
        strips.append(strip)
    return make_image_grid(strips, rows=len(strips), cols=1)


def stacked(sheets: dict[str, PIL.Image.Image]) -> PIL.Image.Image:
    """Sheets of any size below each other, each under its name."""
    font = PIL.ImageFont.load_default(FONT_SIZE)
    title_height = LINE_HEIGHT + 2 * PADDING
    width = max(sheet.width for sheet in sheets.values())
    page = PIL.Image.new("RGB", (width, sum(sheet.height + title_height for sheet in sheets.values())), "white")
    draw = PIL.ImageDraw.Draw(page)
    top = 0
    for name, sheet in sheets.items():
        draw.text((PADDING, top + PADDING), name, "black", font)
        page.paste(sheet, (0, top + title_height))
        top += sheet.height + title_height
    return page


def _wrapped(text: str, width: int, font: PIL.ImageFont.ImageFont) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if not lines[-1] or font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    if len(lines) > MAX_CAPTION_LINES:
        lines = [*lines[: MAX_CAPTION_LINES - 1], lines[MAX_CAPTION_LINES - 1] + " ..."]
    return lines
