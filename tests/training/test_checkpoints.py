# SPDX-License-Identifier: Apache-2.0
import shutil

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState

from diffusers_hart.training.checkpoints import list_checkpoints, resume_from_checkpoint, save_checkpoint


class DiskThatFillsUp:
    """Something to be saved whose n-th saving fails."""

    def __init__(self, fails_at):
        self.fails_at = fails_at
        self.saved = 0

    def state_dict(self):
        self.saved += 1
        if self.saved == self.fails_at:
            raise OSError("No space left on device")
        return {"saved": self.saved}

    def load_state_dict(self, state):
        self.saved = state["saved"]


class Run:
    """One weight under an optimizer with momentum."""

    def __init__(self, disk=None):
        self.accelerator = Accelerator()
        model = torch.nn.Linear(1, 1, bias=False)
        with torch.no_grad():
            model.weight.fill_(1.0)
        self.model, self.optimizer = self.accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=0.1))
        if disk is not None:
            self.accelerator.register_for_checkpointing(disk)

    def step(self):
        self.optimizer.zero_grad()
        self.model(torch.ones(1, 1)).square().sum().backward()
        self.optimizer.step()
        return self.model.weight.item()


@pytest.fixture(autouse=True)
def fresh_accelerators(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def names(folder):
    return [path.name for path in list_checkpoints(folder)]


@pytest.mark.parametrize("name", ["latest", "checkpoint-2", "path"])
def test_a_run_goes_on_as_if_nothing_had_happened(name, tmp_path):
    run = Run()
    run.step(), run.step()
    folder = save_checkpoint(run.accelerator, tmp_path, 2)
    expected = [run.step() for _ in range(3)]

    resumed = Run()
    checkpoint = str(folder) if name == "path" else name
    assert resume_from_checkpoint(resumed.accelerator, tmp_path, checkpoint) == 2
    assert [resumed.step() for _ in range(3)] == expected


def test_nothing_to_resume_from(tmp_path, caplog):
    run = Run()
    assert resume_from_checkpoint(run.accelerator, tmp_path, None) == 0
    assert resume_from_checkpoint(run.accelerator, tmp_path / "missing", "latest") == 0
    with pytest.raises(ValueError, match="checkpoint-7 is not a complete checkpoint"):
        resume_from_checkpoint(run.accelerator, tmp_path, "checkpoint-7")
    (tmp_path / "checkpoint-7").mkdir()
    with pytest.raises(ValueError, match="checkpoint-7 is not a complete checkpoint"):
        resume_from_checkpoint(run.accelerator, tmp_path, "latest")


def test_checkpoints_are_listed_by_their_steps(tmp_path):
    for name in (
        "checkpoint-10",
        "checkpoint-9",
        "checkpoint-100",
        "checkpoint-11.unfinished",
        "checkpoint-x",
        "logs",
    ):
        (tmp_path / name).mkdir()
    assert names(tmp_path) == ["checkpoint-9", "checkpoint-10", "checkpoint-100"]


def test_the_oldest_are_removed(tmp_path):
    run = Run()
    for step in (5, 9, 10, 11):
        save_checkpoint(run.accelerator, tmp_path, step, limit=2)
    assert names(tmp_path) == ["checkpoint-10", "checkpoint-11"]
    # A run that went back to an earlier checkpoint keeps what it saves itself.
    save_checkpoint(run.accelerator, tmp_path, 7, limit=1)
    assert names(tmp_path) == ["checkpoint-7", "checkpoint-10", "checkpoint-11"]


def test_a_checkpoint_of_the_same_step_is_replaced(tmp_path):
    run = Run()
    save_checkpoint(run.accelerator, tmp_path, 3)
    weight = run.step()
    save_checkpoint(run.accelerator, tmp_path, 3)
    resumed = Run()
    assert resume_from_checkpoint(resumed.accelerator, tmp_path, "latest") == 3
    assert resumed.model.weight.item() == weight


def test_an_interrupted_save_leaves_the_checkpoint_before_it(tmp_path):
    run = Run(DiskThatFillsUp(fails_at=2))
    run.step()
    save_checkpoint(run.accelerator, tmp_path, 1, limit=1)
    expected = run.step()
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(run.accelerator, tmp_path, 2, limit=1)
    assert names(tmp_path) == ["checkpoint-1"]

    resumed = Run(DiskThatFillsUp(fails_at=None))
    assert resume_from_checkpoint(resumed.accelerator, tmp_path, "latest") == 1
    assert resumed.step() == expected
    folder = save_checkpoint(resumed.accelerator, tmp_path, 2, limit=1)
    assert names(tmp_path) == ["checkpoint-2"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2"]
    assert (folder / "model.safetensors").exists()


def test_what_an_interruption_left_is_not_mixed_in(tmp_path):
    run = Run()
    leftover = tmp_path / "checkpoint-1.unfinished"
    shutil.copytree(save_checkpoint(run.accelerator, tmp_path, 0), leftover)
    (leftover / "stray.bin").write_bytes(b"half")
    folder = save_checkpoint(run.accelerator, tmp_path, 1)
    assert not leftover.exists() and not (folder / "stray.bin").exists()
