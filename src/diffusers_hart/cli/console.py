# SPDX-License-Identifier: Apache-2.0
import json
import sys
from typing import Any


def say(message: str) -> None:
    """Tell people something, in one line and not where results go."""
    print(f"diffusers-hart: {' '.join(message.split())}", file=sys.stderr)


def print_json(value: Any) -> None:
    print(json.dumps(value, indent=2))


def on_a_terminal() -> bool:
    """Whether progress is shown."""
    return sys.stderr.isatty()
