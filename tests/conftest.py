# SPDX-License-Identifier: Apache-2.0
import json
import tarfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, Qwen2Model

from diffusers_hart import HARTPipeline
from diffusers_hart.conversion import load_hart_checkpoint


pytest_plugins = ["hub_server"]

torch.set_num_threads(1)  # models are tiny here, and the suite runs in as many processes as there are cores


@pytest.fixture(scope="session")
def golden(tmp_path_factory) -> Path:
    """Small checkpoints in the original layout, and what the original implementation computes from them."""
    folder = tmp_path_factory.mktemp("fixtures")
    with tarfile.open(Path(__file__).parent / "fixtures" / "golden.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return folder / "golden"


class GoldenModel:
    """A converted golden checkpoint and its tensors; the pipeline is in float32 and must not be changed by tests."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.tensors = load_file(folder / "golden.safetensors")
        self.text_tensors = load_file(folder / "text_golden.safetensors")
        self.text = json.loads((folder / "text_golden.json").read_text())
        self.pipe = HARTPipeline(
            tokenizer=AutoTokenizer.from_pretrained(folder / "text_tokenizer"),
            text_encoder=Qwen2Model.from_pretrained(folder / "text_encoder").eval(),
            **load_hart_checkpoint(folder / "original"),
        )
        self.pipe.set_progress_bar_config(disable=True)
        self.scales = tuple(self.pipe.vae.config.scales)

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.tensors[name]


@pytest.fixture(scope="session", params=["t2i_tiny", "t2i_variant"])
def model(request, golden) -> GoldenModel:
    return GoldenModel(golden / request.param)


@pytest.fixture(scope="session")
def tiny(golden) -> GoldenModel:
    return GoldenModel(golden / "t2i_tiny")


@pytest.fixture
def assert_close():
    """Agreement as the golden tensors promise it: `atol` absolutely, or 1e-6 relative to the largest value."""

    def check(actual: torch.Tensor, expected: torch.Tensor, atol: float = 1e-4):
        assert actual.shape == expected.shape
        assert actual.dtype == expected.dtype
        difference = (actual - expected).abs().max().item()
        assert difference <= max(atol, 1e-6 * expected.abs().max().item())

    return check
