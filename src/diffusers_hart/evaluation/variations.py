# SPDX-License-Identifier: Apache-2.0
from collections.abc import Sequence
from typing import Any

from .generation import BASE


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
}


def parse_variations(base: dict[str, Any], sweeps: Sequence[str]) -> dict[str, dict[str, Any]]:
    r"""
    The settings to compare.

    Args:
        base (`dict`): Values of all [`SETTINGS`]; `None` leaves one to the pipeline.
        sweeps (`Sequence[str]`): Such as `"guidance_scale=0,1,4.5"`: each value takes the place of the base's one, and
            everything else stays.

    Returns:
        `dict[str, dict]`: `"base"`, and settings such as `"guidance_scale=0"` for each value that is not the base's.

    Raises:
        ValueError: If a setting is unknown or a value is not of its kind.
    """
    variations = {BASE: dict(base)}
    for sweep in sweeps:
        name, equals, values = sweep.partition("=")
        if name not in SETTINGS or not equals:
            raise ValueError(f"--vary {sweep}: expected name=value,value,... with a name of {', '.join(SETTINGS)}.")
        for text in values.split(","):
            try:
                value = SETTINGS[name](text)
            except ValueError as error:
                raise ValueError(f"--vary {sweep}: {text!r} is no value of {name}: {error}.") from error
            if value != base[name]:
                variations[f"{name}={text}"] = base | {name: value}
    return variations
