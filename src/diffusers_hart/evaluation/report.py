# SPDX-License-Identifier: Apache-2.0
import platform
from typing import Any

import diffusers
import torch
import torchmetrics
import transformers

from .. import __version__
from .reconstruction import PATHS


LEGEND = (
    "Margins and intervals are of 95 %: Wilson's for shares, from the spread of pictures for means, and from resampled "
    "pictures for Fréchet distances. Differences are to `base`, on the same prompts and random numbers."
)
# Titles of the figures of generation and reconstruction that are plain numbers, and their digits.
DISTANCES = {"kernel_distance": ("Kernel distance", 4), "fid": ("FID", 2), "kid": ("KID", 4)}


def versions_and_hardware(device: torch.device) -> dict[str, Any]:
    """Versions of what figures depend on, and where they were measured."""
    modules = {"diffusers": diffusers, "transformers": transformers, "torch": torch, "torchmetrics": torchmetrics}
    versions = {"diffusers-hart": __version__} | {name: module.__version__ for name, module in modules.items()}
    if device.type == "cuda":
        hardware = torch.cuda.get_device_name(device)
    else:
        hardware = f"{platform.machine()} {device.type}, {torch.get_num_threads()} threads"
    return {"versions": versions, "hardware": hardware}


def markdown_report(report: dict[str, Any]) -> str:
    """The figures of an evaluation as tables in GitHub's markdown."""
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    base = ", ".join(f"{name} {'own' if value is None else value}" for name, value in report["settings"].items())
    parts = [
        f"# {report['model']}",
        f"{report['resolution']} px, {report['dtype']} on {report['hardware']}, seed {report['seed']}; {versions}. "
        f"`base` is: {base}.",
        LEGEND,
    ]
    groups = report["groups"]
    parts += _section("Reconstruction", _reconstruction_table(groups))
    parts += _section("Codebook", _codebook_table(groups))
    for name, group in groups.items():
        parts += _section(f"Generation: {name}", _generation_table(group["generation"]))
        parts += _section(f"Pictures that are right in each attribute: {name}", _attribute_table(group["generation"]))
    if report["not_measured"]:
        parts += ["## Not measured", "\n".join(f"- {what}: {why}" for what, why in report["not_measured"].items())]
    if report["notes"]:
        parts += ["## Notes", "\n".join(f"- {note}" for note in report["notes"])]
    return "\n\n".join(parts) + "\n"


def _reconstruction_table(groups: dict[str, Any]) -> list[dict[str, str]]:
    rows = []
    for name, group in groups.items():
        figures = group["reconstruction"]
        for path in PATHS if figures else ():
            row = figures[path]
            cells = {
                "Pictures": f"{name}, {figures['num_images']}",
                "Path": path,
                "PSNR": f"{_mean(row['psnr'], 2)} dB",
                "Gain": f"{_mean(figures['psnr_gain'], 2, sign='+')} dB" if path == "hybrid" else "",
                "SSIM": _mean(row["ssim"], 4),
                "Fréchet distance": f"{row['frechet_distance']:.3f}",
            }
            cells |= {title: f"{row[key]:.{d}f}" for key, (title, d) in DISTANCES.items() if key in row}
            if "right" in row:
                cells["Right in every attribute"] = _share(row["right"])
            rows.append(cells)
    return rows


def _codebook_table(groups: dict[str, Any]) -> list[dict[str, str]]:
    return [
        {
            "Pictures": name,
            "Scale": f"{row['side']}x{row['side']}",
            "Tokens": str(row["tokens"]),
            "Codes used": f"{100 * row['used']:.1f} %",
            "Perplexity": f"{row['perplexity']:.1f}",
        }
        for name, group in groups.items()
        if group["reconstruction"]
        for row in group["reconstruction"]["codebook"]
    ]


def _generation_table(generation: dict[str, Any]) -> list[dict[str, str]]:
    rows = []
    for variation, row in generation.items():
        cells = {"Settings": variation, "Pictures": str(row["num_images"])}
        if "right" in row:
            cells["Right in every attribute"] = _share(row["right"])
            cells["Difference of it"] = _percentage_points(row["right"].get("difference"))
        if "frechet_distance" in row:
            distance = row["frechet_distance"]
            cells["Fréchet distance"] = _mean(distance, 3)
            cells["Difference of distance"] = _mean(distance["difference"], 3, "+") if "difference" in distance else ""
        cells |= {title: f"{row[key]['value']:.{d}f}" for key, (title, d) in DISTANCES.items() if key in row}
        if "clip_score" in row:
            cells["CLIP score"] = _mean(row["clip_score"], 2)
        rows.append(cells)
    return rows


def _attribute_table(generation: dict[str, Any]) -> list[dict[str, str]]:
    return [
        {"Settings": variation} | {name: _share(share) for name, share in row["attributes"].items()}
        for variation, row in generation.items()
        if "attributes" in row
    ]


def _section(title: str, rows: list[dict[str, str]]) -> list[str]:
    """A heading and a table whose columns are those of any row; nothing without rows."""
    if not rows:
        return []
    columns = list(dict.fromkeys(name for row in rows for name in row))
    lines = [columns, ["---"] * len(columns), *([row.get(name, "") for name in columns] for row in rows)]
    return [f"## {title}", "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)]


def _share(share: dict[str, float]) -> str:
    return f"{100 * share['value']:.1f} % ({100 * share['low']:.1f} to {100 * share['high']:.1f})"


def _percentage_points(difference: dict[str, float] | None) -> str:
    if difference is None:
        return ""
    return f"{100 * difference['value']:+.1f} ± {100 * difference['plus_minus']:.1f}"


def _mean(mean: dict[str, float], digits: int, sign: str = "") -> str:
    text = f"{mean['value']:{sign}.{digits}f}"
    return f"{text} ± {mean['plus_minus']:.{digits}f}" if "plus_minus" in mean else text
