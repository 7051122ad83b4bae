# SPDX-License-Identifier: Apache-2.0
from collections.abc import Callable, Hashable
from typing import Any

import torch
import torch.nn as nn
from accelerate import Accelerator


WARM_UP_RUNS = 3


class GradientGraphs:
    r"""
    Losses and gradients of batches by CUDA graphs: what one batch sends to the device is recorded once for each kind of
    batch and replayed for all others. For small models, whose steps are over before the CPU has described them, that is
    several times as fast.

    Gradients stay in the buffers that were recorded: they are zeroed, never set to `None`.

    Args:
        accelerator (`Accelerator`): Of the run.
        module (`nn.Module`): What is trained.

    Raises:
        ValueError: If the run is of a kind that cannot be recorded.
    """

    def __init__(self, accelerator: Accelerator, module: nn.Module):
        obstacles = {
            f"a CUDA device, not {accelerator.device.type}": accelerator.device.type != "cuda",
            f"one process, not {accelerator.num_processes}": accelerator.num_processes > 1,
            "--mixed_precision bf16 or no, not fp16": accelerator.scaler is not None,
            "--gradient_accumulation_steps 1": accelerator.gradient_accumulation_steps > 1,
        }
        for needed, found in obstacles.items():
            if found:
                raise ValueError(f"--cuda_graphs needs {needed}.")
        self.accelerator = accelerator
        self.parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        self.recorded: dict[Hashable, tuple[torch.cuda.CUDAGraph, dict[str, Any], dict[str, torch.Tensor]]] = {}

    def __call__(
        self, compute: Callable[[dict[str, Any]], dict[str, torch.Tensor]], batch: dict[str, Any], kind: Hashable
    ) -> dict[str, torch.Tensor]:
        r"""
        The gradients of one batch, in the parameters.

        Args:
            compute (`Callable`): Makes losses of shape `()`, `loss` among them, of a batch; must not wait for the device.
            batch (`dict[str, Any]`): Tensors, whose shapes and dtypes follow from `kind`. What is no tensor is left out.
            kind (`Hashable`): Batches of one kind are computed in the same way.

        Returns:
            `dict[str, torch.Tensor]`: What `compute` makes, valid until the next call.
        """
        tensors = {name: value for name, value in batch.items() if isinstance(value, torch.Tensor)}
        if kind not in self.recorded:
            self.recorded[kind] = self._record(compute, tensors)
        graph, inputs, losses = self.recorded[kind]
        for name, value in inputs.items():
            value.copy_(tensors[name], non_blocking=True)
        graph.replay()
        return losses

    def _record(
        self, compute: Callable[[dict[str, Any]], dict[str, torch.Tensor]], tensors: dict[str, torch.Tensor]
    ) -> tuple[torch.cuda.CUDAGraph, dict[str, Any], dict[str, torch.Tensor]]:
        inputs = {name: value.to(self.accelerator.device, copy=True) for name, value in tensors.items()}
        for parameter in self.parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        gradients = [parameter.grad for parameter in self.parameters]

        def run() -> dict[str, torch.Tensor]:
            torch._foreach_zero_(gradients)
            losses = compute(inputs)
            self.accelerator.backward(losses["loss"])
            return {name: value.detach() for name, value in losses.items()}

        # As PyTorch asks for: what is set up at first use is so before anything is recorded, on a stream of its own.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP_RUNS):
                run()
        torch.cuda.current_stream().wait_stream(stream)
        # Graphs are replayed one at a time, and nothing but inputs, losses and gradients outlives a replay: one pool.
        pool = next((graph.pool() for graph, _, _ in self.recorded.values()), None)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            losses = run()
        return graph, inputs, losses
