# SPDX-License-Identifier: Apache-2.0
"""What a user of diffusers does who has not installed this package. `run` is called in a process of its own."""

import io
import sys
from logging import StreamHandler

import torch
from diffusers import DDIMScheduler, DiffusionPipeline, DPMSolverMultistepScheduler, logging
from pipeline_digest import describe


def run(folder):
    """All that is done with the pipelines in a folder and on the Hub, in one process, and what is said meanwhile."""
    sys.modules["diffusers_hart"] = None  # whoever imports it fails
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    logging.disable_default_handler()
    said = io.StringIO()
    logging.add_handler(StreamHandler(said))
    own = load(f"{folder}/own")
    return {
        "refused": [refuse(f"{folder}/own"), refuse("me/own")],
        "loaded": [describe(pipe) for pipe in (own, load(f"{folder}/sharded", variant="fp16"), load("me/own"))],
        "classes": [describe(load(place), 1) for place in (f"{folder}/classes", "me/classes")],
        "swapped": swap_schedulers(load(f"{folder}/own")),
        "saved": save_again(own, f"{folder}/saved_again"),
        "said": said.getvalue(),
    }


def load(place, **options):
    return DiffusionPipeline.from_pretrained(place, trust_remote_code=True, **options)


def refuse(place):
    """The error of loading without trust."""
    try:
        DiffusionPipeline.from_pretrained(place)
    except ValueError as error:
        return str(error)
    return None


def save_again(pipe, folder):
    """What comes back of a pipeline that was saved, and of one that shares its components."""
    pipe.save_pretrained(folder)
    again = load(folder)
    return [describe(again), describe(type(again).from_pipe(again))]


def swap_schedulers(pipe):
    """Pictures of other residual schedulers and of the first one again."""
    own = type(pipe.residual_scheduler)
    pictures = [describe(pipe)[-1]]
    for scheduler_class in (DDIMScheduler, DPMSolverMultistepScheduler, own):
        pipe.residual_scheduler = scheduler_class.from_config(pipe.residual_scheduler.config)
        pictures.append(describe(pipe)[-1])
    return pictures
