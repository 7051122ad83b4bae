# SPDX-License-Identifier: Apache-2.0
"""The command line, `diffusers-hart`: one module a subcommand."""

from .command_line import main


__all__ = ["main"]
