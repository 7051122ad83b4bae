# SPDX-License-Identifier: Apache-2.0
"""Conversion between the original layout of HART checkpoints and folders that diffusers loads."""

from .diffusers_to_hart import convert_diffusers_to_hart
from .hart_checkpoint import DTYPES, load_hart_checkpoint
from .hart_to_diffusers import convert_hart_to_diffusers
from .model_card import push_converted, write_model_card
from .system_prompt import read_system_prompt


__all__ = [
    "DTYPES",
    "convert_diffusers_to_hart",
    "convert_hart_to_diffusers",
    "load_hart_checkpoint",
    "push_converted",
    "read_system_prompt",
    "write_model_card",
]
