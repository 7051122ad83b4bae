# SPDX-License-Identifier: Apache-2.0
import json
from pathlib import Path


def read_prompts(path: str | Path, column: str = "text") -> list[str]:
    r"""
    Prompts from a file: one a line, or of a `.jsonl` file the texts in a column; empty lines do not count.

    Raises:
        ValueError: If there are none, or a line of JSON has no text in that column.
    """
    path = Path(path)
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if path.suffix == ".jsonl":
        prompts = [json.loads(line).get(column) for line in lines]
        for number, prompt in enumerate(prompts, 1):
            if not isinstance(prompt, str):
                raise ValueError(f"{path}: example {number} has no text in {column!r}, but {prompt!r}.")
    else:
        prompts = lines
    if not prompts:
        raise ValueError(f"{path} holds no prompts: one a line is expected.")
    return prompts
