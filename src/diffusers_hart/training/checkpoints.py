# SPDX-License-Identifier: Apache-2.0
import json
import re
import shutil
from pathlib import Path

from accelerate import Accelerator, DistributedType
from diffusers.utils import logging

from .sharded_state import load_sharded_state, save_sharded_state


logger = logging.get_logger(__name__)


def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    found = {
        int(match[1]): path
        for path in Path(output_dir).glob("checkpoint-*")
        if (match := re.fullmatch(r"checkpoint-(\d+)", path.name))
    }
    return [found[step] for step in sorted(found)]


def save_checkpoint(accelerator: Accelerator, output_dir: str | Path, step: int, limit: int | None = None) -> Path:
    """
    Save what a run needs to go on, into `output_dir/checkpoint-{step}`. It is written beside its place and moved there
    when it is whole, so an interrupted save leaves the checkpoint before it as it was. The files are those of an unsharded
    run also under FSDP 2, so that either goes on with the other's checkpoints, on any number of processes.

    Args:
        accelerator (`Accelerator`): Its prepared and registered objects are saved.
        output_dir (`str` or `Path`): Folder of the run.
        step (`int`): Number of optimizer steps so far.
        limit (`int`, *optional*):
            Number of checkpoints up to this one to keep; the oldest are removed once the new one is whole.

    Returns:
        `Path`: The checkpoint's folder.
    """
    folder = Path(output_dir) / f"checkpoint-{step}"
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    if accelerator.is_main_process and unfinished.exists():
        shutil.rmtree(unfinished)
    accelerator.wait_for_everyone()
    if accelerator.is_fsdp2:
        save_sharded_state(accelerator, unfinished)
    else:
        accelerator.save_state(str(unfinished))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        (unfinished / "progress.json").write_text(json.dumps({"step": step}))
        if folder.exists():
            shutil.rmtree(folder)
        unfinished.rename(folder)
        if limit is not None:
            checkpoints = list_checkpoints(output_dir)
            for old in checkpoints[: max(0, checkpoints.index(folder) + 1 - limit)]:
                shutil.rmtree(old)
    accelerator.wait_for_everyone()
    logger.info(f"Saved {folder}")
    return folder


def resume_from_checkpoint(accelerator: Accelerator, output_dir: str | Path, checkpoint: str | None) -> int:
    """
    Load a checkpoint into the accelerator's objects, whether it was saved sharded (FSDP 2) or not.

    Args:
        accelerator (`Accelerator`): Its prepared and registered objects are filled.
        output_dir (`str` or `Path`): Folder of the run.
        checkpoint (`str`, *optional*): A checkpoint's folder, its name in `output_dir`, or `"latest"`.

    Returns:
        `int`: Number of optimizer steps it was saved after; 0 if there is nothing to resume from.

    Raises:
        ValueError: If the checkpoint does not exist, was not completed or holds shards of FSDP 1.
    """
    if checkpoint is None:
        return 0
    if checkpoint == "latest":
        checkpoints = list_checkpoints(output_dir)
        if not checkpoints:
            logger.warning(f"No checkpoint in {output_dir}: starting anew.")
            return 0
        folder = checkpoints[-1]
    else:
        folder = Path(checkpoint) if Path(checkpoint).is_dir() else Path(output_dir) / checkpoint
    if not (folder / "progress.json").exists():
        raise ValueError(f"{folder} is not a complete checkpoint.")
    shards = sorted(path.name for path in folder.glob("pytorch_model_fsdp*"))
    if shards and (accelerator.distributed_type != DistributedType.FSDP or accelerator.is_fsdp2):
        raise ValueError(
            f"{folder} holds {shards[0]}, shards as FSDP 1 saves them: go on under FSDP 1, or start from the pipeline that "
            "its run saved. Checkpoints of FSDP 2 and of unsharded runs fit each other."
        )
    if accelerator.is_fsdp2:
        load_sharded_state(accelerator, folder)
    else:
        accelerator.load_state(str(folder))
    accelerator.step = 0  # a checkpoint lies between updates, of however many micro-batches
    return json.loads((folder / "progress.json").read_text())["step"]
