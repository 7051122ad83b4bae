# SPDX-License-Identifier: Apache-2.0
import argparse

import pytest
import torch

from diffusers_hart.training.arguments import add_training_arguments
from diffusers_hart.training.weight_updates import create_lr_scheduler


def learning_rates(text):
    """The rates of the steps of a run whose highest is 1."""
    parser = argparse.ArgumentParser()
    add_training_arguments(parser)
    args = parser.parse_args(["--output_dir", "run", *text.split()])
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = create_lr_scheduler(args, optimizer)
    rates = []
    for _ in range(args.max_train_steps):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    return rates, schedule.get_last_lr()[0]


def test_warmup_stable_decay():
    rates, end = learning_rates(
        "--lr_scheduler warmup_stable_decay --lr_warmup_steps 2 --lr_decay_steps 4 --max_train_steps 9"
    )
    assert rates == pytest.approx([0, 0.5, 1, 1, 1, 1, 0.75, 0.5, 0.25]) and end == 0
    rates, _ = learning_rates("--lr_scheduler warmup_stable_decay --lr_decay_steps 3 --max_train_steps 3")
    assert rates == pytest.approx([1, 2 / 3, 1 / 3])


def test_schedules_of_diffusers():
    assert learning_rates("--lr_warmup_steps 2 --max_train_steps 4")[0] == pytest.approx([0, 0.5, 1, 1])
    assert learning_rates("--lr_scheduler linear --max_train_steps 4")[0] == pytest.approx([1, 0.75, 0.5, 0.25])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("--lr_scheduler warmup_stable_decay", "needs --lr_decay_steps"),
        ("--lr_scheduler cosine --lr_decay_steps 4", "--lr_scheduler cosine takes no --lr_decay_steps"),
        (
            "--lr_scheduler warmup_stable_decay --lr_warmup_steps 5 --lr_decay_steps 5 --max_train_steps 9",
            "5 --lr_warmup_steps and 5 --lr_decay_steps are more than the 9 steps",
        ),
    ],
)
def test_schedules_that_do_not_fit(text, message):
    with pytest.raises(ValueError, match=message):
        learning_rates(text)
