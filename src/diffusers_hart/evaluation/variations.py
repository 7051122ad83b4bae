# SPDX-License-Identifier: Apache-2.0
from collections.abc import Sequence
from itertools import product
from typing import Any

from .generation import BASE
from .residual_scheduler import RESIDUAL_SCHEDULER, scheduler_name


def boolean(text: str) -> bool:
    """The type of a setting that is `true` or `false`."""
    if text not in ("true", "false"):
        raise ValueError(f"must be true or false, not {text}")
    return text == "true"


SETTINGS = {
    "guidance_scale": float,
    "num_inference_steps": int,
    "top_k": int,
    "top_p": float,
    "smooth": boolean,
    "residual_temperature": float,
    RESIDUAL_SCHEDULER: scheduler_name,
}


def parse_variations(base: dict[str, Any], sweeps: Sequence[str]) -> dict[str, dict[str, Any]]:
    r"""
    The settings to compare.

    Args:
        base (`dict`): Values of all [`SETTINGS`]; `None` leaves one to the pipeline.
        sweeps (`Sequence[str]`): Such as `"guidance_scale=0,1,4.5"`: each value takes the place of the base's one, and
            everything else stays. Settings that `" x "` joins, such as
            `"residual_scheduler=DDIMScheduler,DDPMScheduler x num_inference_steps=4,8"`, are compared in every
            combination.

    Returns:
        `dict[str, dict]`: `"base"`, and settings such as `"guidance_scale=0"` or
        `"residual_scheduler=DDIMScheduler num_inference_steps=4"` for each that is not the base's.

    Raises:
        ValueError: If a setting is unknown or a value is not of its kind.
    """
    variations = {BASE: dict(base)}
    for sweep in sweeps:
        for combination in product(*(_parse_sweep(part, sweep) for part in sweep.split(" x "))):
            settings = base | {name: value for name, _, value in combination}
            if settings not in variations.values():
                variations[" ".join(f"{name}={text}" for name, text, _ in combination)] = settings
    return variations


def _parse_sweep(part: str, sweep: str) -> list[tuple[str, str, Any]]:
    """Name, text and value of each value of a setting."""
    name, equals, values = part.strip().partition("=")
    if name not in SETTINGS or not equals:
        raise ValueError(f"--vary {sweep}: expected name=value,value,... with a name of {', '.join(SETTINGS)}.")
    parsed = []
    for text in values.split(","):
        try:
            parsed.append((name, text, SETTINGS[name](text)))
        except ValueError as error:
            raise ValueError(f"--vary {sweep}: {text!r} is no value of {name}: {error}.") from error
    return parsed
