# SPDX-License-Identifier: Apache-2.0
"""How good a HART pipeline is: reconstruction, generation and prompt following, with margins. Needs torchmetrics."""

from ..prompt_files import read_prompts
from .codebook_statistics import CodebookStatistics
from .confidence import estimated_mean, estimated_share, paired_difference, wilson_interval
from .examples import ExampleGroup, pictures_group, shapes_group
from .feature_distances import bootstrap_margins, feature_distances, frechet_distance, kernel_distance
from .generation import generate, measure_generation, prepare_condition
from .instruments import Instruments, PictureMeasurements, load_instruments
from .prompt_following import prompt_following
from .reconstruction import measure_reconstruction, psnr, reconstruct, ssim
from .report import markdown_report, versions_and_hardware
from .tokenizer_swap import swap_tokenizer
from .variations import parse_variations


__all__ = [
    "CodebookStatistics",
    "ExampleGroup",
    "Instruments",
    "PictureMeasurements",
    "bootstrap_margins",
    "estimated_mean",
    "estimated_share",
    "feature_distances",
    "frechet_distance",
    "generate",
    "kernel_distance",
    "load_instruments",
    "markdown_report",
    "measure_generation",
    "measure_reconstruction",
    "paired_difference",
    "parse_variations",
    "pictures_group",
    "prepare_condition",
    "prompt_following",
    "psnr",
    "read_prompts",
    "reconstruct",
    "shapes_group",
    "ssim",
    "swap_tokenizer",
    "versions_and_hardware",
    "wilson_interval",
]
