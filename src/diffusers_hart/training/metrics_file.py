# SPDX-License-Identifier: Apache-2.0
import json
from pathlib import Path
from typing import Any

from accelerate.tracking import GeneralTracker, on_main_process


class MetricsFile(GeneralTracker):
    r"""
    A tracker that needs nothing installed: what a run logs, a line of JSON each step, in one file. A run that is resumed
    adds to the file; of several lines of one step the last one holds.

    Args:
        path (`str` or `Path`): The file.
    """

    name = "metrics_file"
    requires_logging_directory = False

    def __init__(self, path: str | Path):
        super().__init__()
        self.path = Path(path)

    @property
    def tracker(self) -> Path:
        return self.path

    @on_main_process
    def log(self, values: dict[str, Any], step: int | None = None, **kwargs):
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
