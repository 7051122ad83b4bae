# SPDX-License-Identifier: Apache-2.0
from collections.abc import Sequence
from typing import Any

from .confidence import estimated_share


def prompt_following(verdicts: Sequence[dict[str, bool]]) -> dict[str, Any]:
    r"""
    How many pictures are as their prompts say.

    Args:
        verdicts (`Sequence[dict[str, bool]]`): For each picture, which of the attributes that are stated are right.

    Returns:
        `dict`: `right`, the share of pictures that are right in every stated attribute, and in `attributes` the share
        that is right in each, among the pictures where it is stated; as [`estimated_share`] gives them.
    """
    names = list(dict.fromkeys(name for verdict in verdicts for name in verdict))
    return {
        "right": estimated_share([all(verdict.values()) for verdict in verdicts]),
        "attributes": {
            name: estimated_share([verdict[name] for verdict in verdicts if name in verdict]) for name in names
        },
    }
