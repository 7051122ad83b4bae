# SPDX-License-Identifier: Apache-2.0
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator

from diffusers_hart.training.gradient_graphs import GradientGraphs
from diffusers_hart.training.weight_updates import WeightUpdates


def run_arguments(**changes):
    defaults = {"learning_rate": 1e-2, "scale_lr": False, "use_8bit_adam": False, "adam_beta1": 0.9}
    defaults |= {"adam_beta2": 0.95, "adam_weight_decay": 0.05, "adam_epsilon": 1e-8, "max_grad_norm": 1.0}
    defaults |= {"lr_scheduler": "constant", "lr_decay_steps": None, "lr_warmup_steps": 0, "max_train_steps": 10}
    return SimpleNamespace(**(defaults | {"use_ema": True, "ema_decay": 0.9, "cuda_graphs": False} | changes))


@pytest.mark.parametrize(
    ("accelerator", "needed"),
    [
        ({"device": "cpu"}, "a CUDA device, not cpu"),
        ({"num_processes": 2}, "one process, not 2"),
        ({"scaler": object()}, "--mixed_precision bf16 or no, not fp16"),
        ({"gradient_accumulation_steps": 4}, "--gradient_accumulation_steps 1"),
    ],
)
def test_runs_that_cannot_be_recorded_are_errors(accelerator, needed):
    settings = {"device": "cuda", "num_processes": 1, "scaler": None, "gradient_accumulation_steps": 1} | accelerator
    settings["device"] = torch.device(settings["device"])
    with pytest.raises(ValueError, match=f"--cuda_graphs needs {needed}"):
        GradientGraphs(SimpleNamespace(**settings), torch.nn.Linear(2, 2))


@pytest.mark.gpu
def test_recorded_steps_train_as_others_do():
    def trained(cuda_graphs):
        torch.manual_seed(0)
        module = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.GELU(), torch.nn.Linear(32, 1))
        weights = WeightUpdates(run_arguments(cuda_graphs=cuda_graphs), Accelerator(), module)
        figures = []

        def losses(batch):
            return {"loss": (weights.module(batch["x"]) - batch["x"].sum(1, keepdim=True)).square().mean()}

        for step in range(12):
            size = (16, 24)[step % 2]  # two kinds of batches
            batch = {"x": torch.randn(size, 8, device="cuda"), "caption": ["not a tensor"]}
            made = weights.step(losses, batch, size)
            figures.append({name: value.item() for name, value in made.items()})
        return figures, [parameter.detach().clone() for parameter in module.parameters()]

    figures, parameters = trained(cuda_graphs=True)
    expected_figures, expected_parameters = trained(cuda_graphs=False)
    for made, expected in zip(figures, expected_figures):
        assert made == pytest.approx(expected, rel=1e-4)
    for made, expected in zip(parameters, expected_parameters):
        assert torch.allclose(made, expected, atol=1e-5)
