# SPDX-License-Identifier: Apache-2.0
"""Several trainings in one pair of processes of `accelerate launch`: a JSON list of [is sharded, arguments] each."""

import importlib.util
import json
import os
import sys
from pathlib import Path

import torch
from accelerate import DistributedType, PartialState
from accelerate.state import AcceleratorState, GradientState


def main(script_path, folder, runs):
    torch.set_num_threads(1)
    spec = importlib.util.spec_from_file_location("script", script_path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    for number, (is_sharded, arguments) in enumerate(runs):
        meeting = f"file://{Path(folder).absolute()}/meeting-{number}"  # the launcher's own is used up by one run
        torch.distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world_size)
        os.environ["ACCELERATE_USE_FSDP"] = str(is_sharded).lower()
        state = PartialState(cpu=True)
        if is_sharded:
            state.distributed_type = DistributedType.MULTI_GPU  # accelerate shards over nothing else; gloo is as good
        script.main(arguments)
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]))
