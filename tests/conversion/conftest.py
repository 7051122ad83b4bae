# SPDX-License-Identifier: Apache-2.0
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from diffusers_hart.conversion import convert_hart_to_diffusers


@pytest.fixture(scope="session")
def text_encoder(golden) -> Callable[[str], Path]:
    """The folder that holds the text encoder of a golden checkpoint beside its tokenizer."""

    def folder(name: str) -> Path:
        path = golden / name / "text_encoder_and_tokenizer"
        if not path.is_dir():
            for part in ("text_encoder", "text_tokenizer"):
                shutil.copytree(golden / name / part, path, dirs_exist_ok=True)
        return path

    return folder


@pytest.fixture(scope="session", params=["t2i_tiny", "t2i_variant"])
def converted(request, golden, text_encoder, tmp_path_factory) -> tuple[Path, Path]:
    """The golden folder of a checkpoint, and the folder that its EMA weights were converted into."""
    dump_path = tmp_path_factory.mktemp("converted") / request.param
    return golden / request.param, convert_hart_to_diffusers(
        golden / request.param / "original", text_encoder(request.param), dump_path, system_prompt="Draw this:\n"
    )


@pytest.fixture
def checkpoint(golden, tmp_path) -> Path:
    """A copy of an original checkpoint to do damage to."""
    return Path(shutil.copytree(golden / "t2i_tiny" / "original", tmp_path / "checkpoint"))


@pytest.fixture
def assert_same_tensors():
    """Equal bit for bit, type and names included."""

    def check(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]):
        assert actual.keys() == expected.keys()
        for name, tensor in expected.items():
            assert actual[name].dtype == tensor.dtype, name
            assert torch.equal(actual[name], tensor), name

    return check
