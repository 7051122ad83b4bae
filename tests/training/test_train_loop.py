# SPDX-License-Identifier: Apache-2.0
import argparse
import json

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState

from diffusers_hart.training.arguments import add_data_arguments, add_training_arguments
from diffusers_hart.training.checkpoints import list_checkpoints
from diffusers_hart.training.data import UnreadableImage
from diffusers_hart.training.train_loop import (
    NonFiniteLoss,
    create_accelerator,
    create_optimizer,
    mean_figures,
    train,
)


@pytest.fixture(autouse=True)
def fresh_accelerators(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture
def arguments(tmp_path):
    def parse(text=""):
        parser = argparse.ArgumentParser()
        add_data_arguments(parser)
        add_training_arguments(parser)
        return parser.parse_args(["--output_dir", str(tmp_path / "run"), "--logging_steps", "1", *text.split()])

    return parse


def number(example, generator):
    if isinstance(example, str):
        raise UnreadableImage(f"{example} is not a readable picture")
    return {"number": torch.tensor(float(example))}


def lines(args):
    with open(f"{args.output_dir}/metrics.jsonl") as file:
        return [json.loads(line) for line in file]


class Run:
    """Fits one weight to the mean of numbers."""

    def __init__(self, args):
        self.args = args
        self.accelerator = create_accelerator(args)
        weight = torch.nn.Linear(1, 1, bias=False)
        torch.nn.init.zeros_(weight.weight)
        optimizer = torch.optim.SGD(weight.parameters(), lr=0.25)
        self.module, self.optimizer = self.accelerator.prepare(weight, optimizer)
        self.positions, self.validated = [], []

    def step(self, micro_batches, step):
        figures = []
        for batch in micro_batches:
            self.positions.append((step, batch["position"]))
            with self.accelerator.accumulate(self.module):
                loss = (self.module(torch.ones(1, 1)) - batch["number"]).square().mean()
                self.accelerator.backward(loss)
                self.optimizer.step()
                self.optimizer.zero_grad()
            figures.append({"loss": loss})
        return mean_figures(figures)

    def __call__(self, source):
        return train(self.args, self.accelerator, source, number, self.step, self.validated.append)


def test_steps_micro_batches_and_what_happens_when(arguments):
    args = arguments(
        "--train_batch_size 2 --gradient_accumulation_steps 3 --max_train_steps 5 --checkpointing_steps 2"
        " --validation_steps 3 --checkpoints_total_limit 2"
    )
    run = Run(args)
    assert run(list(range(8))) == 5
    blocks = [list(range(start, start + 2)) for start in range(0, 30, 2)]
    assert run.positions == [(i // 3, block) for i, block in enumerate(blocks)]
    assert run.validated == [3, 5]
    assert [path.name for path in list_checkpoints(args.output_dir)] == ["checkpoint-4", "checkpoint-5"]
    assert [line["step"] for line in lines(args)] == [1, 2, 3, 4, 5]
    assert all(set(line) == {"step", "loss", "skipped_images"} for line in lines(args))


def test_accumulated_micro_batches_are_one_batch(arguments):
    losses = []
    for name, options in (
        ("whole", "--train_batch_size 6"),
        ("parts", "--gradient_accumulation_steps 3 --train_batch_size 2"),
    ):
        args = arguments(f"{options} --max_train_steps 4")
        args.output_dir = f"{args.output_dir}-{name}"
        Run(args)([1.0, 2.0, 3.0, 4.0, 5.0, 9.0, 7.0])
        losses.append([line["loss"] for line in lines(args)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert losses[0][-1] < losses[0][0]


def test_resuming_continues_exactly(arguments):
    whole = arguments("--max_train_steps 6 --checkpointing_steps 4 --train_batch_size 2")
    Run(whole)([1.0, 2.0, 3.0, 5.0, 8.0])
    part = arguments("--max_train_steps 6 --train_batch_size 2 --resume_from_checkpoint checkpoint-4")
    resumed = Run(part)
    assert resumed([1.0, 2.0, 3.0, 5.0, 8.0]) == 6
    assert [step for step, _ in resumed.positions] == [4, 5]
    assert lines(whole)[6:] == lines(whole)[4:6]  # the file goes on with what the resumed run logs


def test_a_run_that_is_over_makes_no_step(arguments):
    Run(arguments("--max_train_steps 2 --train_batch_size 2"))([1.0, 2.0])
    run = Run(arguments("--max_train_steps 2 --train_batch_size 2 --resume_from_checkpoint latest"))
    assert run([1.0, 2.0]) == 2 and run.positions == []


def test_a_loss_that_is_no_number_stops_the_run(arguments):
    args = arguments("--max_train_steps 9 --checkpointing_steps 1 --train_batch_size 1")
    source = [1.0, 2.0, 3.0, float("nan")]
    run = Run(args)
    with pytest.raises(NonFiniteLoss, match=r"`loss` of step \d is not finite.*resume from the last checkpoint"):
        run(source)
    last = len(run.positions) - 1  # steps before the one that failed
    assert last < 4 and [path.name for path in list_checkpoints(args.output_dir)] == [
        f"checkpoint-{step}" for step in range(1, last + 1)
    ]
    resumed = Run(
        arguments("--max_train_steps 9 --checkpointing_steps 1 --train_batch_size 1 --resume_from_checkpoint latest")
    )
    assert resumed.module.weight.isfinite().all()
    with pytest.raises(NonFiniteLoss, match=f"step {last + 1} "):
        resumed(source)


def test_a_gradient_that_is_no_number_stops_the_run(arguments):
    args = arguments("--max_train_steps 3 --checkpointing_steps 1 --train_batch_size 1")
    run = Run(args)
    with pytest.raises(NonFiniteLoss, match="`grad_norm` of step 1 is not finite"):
        train(
            args,
            run.accelerator,
            [1.0],
            number,
            lambda batches, step: {"loss": torch.tensor(1.0), "grad_norm": torch.tensor(float("inf"))},
        )
    assert list_checkpoints(args.output_dir) == []


def test_skipped_pictures_are_counted(arguments, caplog):
    args = arguments("--max_train_steps 6 --train_batch_size 1 --on_bad_image skip")
    Run(args)([1.0, "bad.png", 3.0])
    assert [line["skipped_images"] for line in lines(args)][2::3] == [1, 2]  # once an epoch
    with pytest.raises(UnreadableImage, match="bad.png"):
        Run(arguments("--max_train_steps 6 --train_batch_size 1"))([1.0, "bad.png", 3.0])


def test_too_small_a_data_set(arguments):
    with pytest.raises(ValueError, match="has 3 examples, too few for one batch of 4 on each of 1 processes"):
        Run(arguments("--train_batch_size 4"))([1.0, 2.0, 3.0])


def test_a_tracker_that_is_not_installed(arguments):
    with pytest.raises(ImportError, match="--report_to comet_ml needs a package that is not installed"):
        create_accelerator(arguments("--report_to comet_ml"))


def test_the_optimizer(arguments):
    module = torch.nn.Linear(3, 2)
    module.frozen = torch.nn.Parameter(torch.zeros(2, 2), requires_grad=False)
    args = arguments(
        "--learning_rate 0.1 --scale_lr --train_batch_size 8 --gradient_accumulation_steps 4 --adam_weight_decay 0.3"
    )
    optimizer = create_optimizer(args, module.parameters(), create_accelerator(args))
    matrices, vectors = optimizer.param_groups
    assert matrices["params"] == [module.weight] and matrices["weight_decay"] == 0.3
    assert vectors["params"] == [module.bias] and vectors["weight_decay"] == 0
    assert matrices["lr"] == pytest.approx(0.1 * 32 / 256) and matrices["betas"] == (0.9, 0.95)


def test_figures_of_micro_batches():
    figures = [{"loss": torch.tensor(1.0)}, {"loss": torch.tensor(3.0), "grad_norm": torch.tensor(5.0)}]
    assert mean_figures(figures) == {"loss": torch.tensor(2.0), "grad_norm": torch.tensor(5.0)}
