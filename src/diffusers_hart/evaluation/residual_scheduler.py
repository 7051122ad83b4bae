# SPDX-License-Identifier: Apache-2.0
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import diffusers
from diffusers import DiffusionPipeline

from .. import schedulers


RESIDUAL_SCHEDULER = "residual_scheduler"


def scheduler_name(text: str) -> str:
    """The type of a setting that is the class of a scheduler of diffusion, of this package or of diffusers."""
    if not hasattr(_scheduler_class(text), "set_timesteps"):
        raise ValueError("must be the class of a scheduler, such as HARTResidualScheduler or DDIMScheduler")
    return text


@contextmanager
def with_residual_scheduler(pipe: DiffusionPipeline, settings: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """
    Within this context the pipeline has the residual scheduler that settings name, made from the configuration of its
    own one; gives those settings that are arguments of its call.
    """
    own = pipe.residual_scheduler
    name = settings.get(RESIDUAL_SCHEDULER)
    if name is not None and own is not None and name != type(own).__name__:
        pipe.residual_scheduler = _scheduler_class(name).from_config(own.config)
    try:
        yield {key: value for key, value in settings.items() if key != RESIDUAL_SCHEDULER}
    finally:
        pipe.residual_scheduler = own


def _scheduler_class(name: str) -> type | None:
    return getattr(schedulers, name, None) or getattr(diffusers, name, None)
