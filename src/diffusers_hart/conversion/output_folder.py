# SPDX-License-Identifier: Apache-2.0
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory


def check_output_folder(path: str | os.PathLike) -> Path:
    """
    The absolute path of a folder that is to be written.

    Raises:
        FileExistsError: If it is a file, or a folder that is not empty.
    """
    path = Path(path).resolve()
    if path.is_dir() and any(path.iterdir()):
        raise FileExistsError(f"The output folder {path} is not empty: pass a new one, or empty it first.")
    if path.exists() and not path.is_dir():
        raise FileExistsError(f"{path} is a file: pass a new folder for the output.")
    return path


@contextmanager
def new_folder(path: str | os.PathLike) -> Iterator[Path]:
    """
    A folder to write into that becomes `path` at the end, whole. After an error there is nothing at `path`.

    Raises:
        FileExistsError: If `path` is a file, or a folder that is not empty.
    """
    path = check_output_folder(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as temporary:
        folder = Path(temporary) / path.name
        folder.mkdir()
        yield folder
        if path.exists():
            path.rmdir()
        folder.rename(path)
