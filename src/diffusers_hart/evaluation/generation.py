# SPDX-License-Identifier: Apache-2.0
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline
from tqdm.auto import tqdm

from ..training.random_draws import seeded_generator
from .confidence import estimated_mean, paired_difference
from .examples import ExampleGroup, batches
from .feature_distances import bootstrap_margins, feature_distances
from .instruments import Instruments, PictureMeasurements
from .prompt_following import prompt_following
from .residual_scheduler import with_residual_scheduler


BASE = "base"
REAL = "real pictures"


def prepare_condition(pipe: DiffusionPipeline, conditions: Sequence[str | int]) -> dict[str, Any]:
    """Arguments of a HART pipeline's call for prompts, which are encoded here, or for class labels."""
    if pipe.transformer.config.num_classes is not None:
        return {"class_labels": list(conditions)}
    with torch.no_grad():
        embeds, mask, _, _ = pipe.encode_prompt(list(conditions), do_classifier_free_guidance=False)
    return {"prompt_embeds": embeds, "prompt_attention_mask": mask}


def generate(
    pipe: DiffusionPipeline,
    condition: dict[str, Any],
    settings: dict[str, Any],
    side: int,
    seed: int,
    positions: Sequence[int],
) -> torch.Tensor:
    r"""
    Draw pictures, each from a generator of its own: a picture is a function of the seed, its position and the settings,
    whichever others are drawn with it, and settings are compared on the same random numbers.

    Args:
        pipe (`HARTPipeline` or `HARTClassConditionalPipeline`): What draws.
        condition (`dict`): From [`prepare_condition`].
        settings (`dict`): Arguments of the call, and the name of another `residual_scheduler`.
        side (`int`): Side of the pictures in pixels.
        seed (`int`): Seed of the run.
        positions (`Sequence[int]`): Place of each picture in the run.

    Returns:
        `torch.Tensor` of shape `(batch_size, 3, side, side)`, float32 in [-1, 1].
    """
    generators = [seeded_generator(pipe.device, seed, "evaluation", position) for position in positions]
    with with_residual_scheduler(pipe, settings) as arguments:
        images = pipe(**condition, **arguments, height=side, generator=generators, output_type="pt").images
    return images.float() * 2 - 1


def measure_generation(
    pipe: DiffusionPipeline,
    side: int,
    group: ExampleGroup,
    variations: dict[str, dict[str, Any]],
    instruments: Instruments,
    batch_size: int,
    seed: int = 0,
    real: PictureMeasurements | None = None,
    num_resamples: int = 20,
    num_shown: int = 0,
) -> tuple[dict[str, Any], dict[str, list]]:
    r"""
    Draw the prompts of a group under every variation and measure the pictures.

    Args:
        pipe (`HARTPipeline` or `HARTClassConditionalPipeline`): What draws.
        side (`int`): Side of the pictures in pixels.
        group ([`ExampleGroup`]): The prompts, and the references of what is drawn.
        variations (`dict[str, dict]`): Settings by name, `"base"` among them.
        instruments ([`Instruments`]): What to measure with.
        batch_size (`int`): Number of pictures at once.
        seed (`int`, defaults to `0`): Decides the pictures.
        real ([`PictureMeasurements`], *optional*):
            Those of the group's own pictures; if they are other pictures than the references, they are reported too, as
            what would be perfect.
        num_resamples (`int`, defaults to `20`): Resamples for the margins of Fréchet distances; 0 for none.
        num_shown (`int`, defaults to `0`): Number of pictures to show of each variation.

    Returns:
        `tuple`: the figures by variation, and pictures to show by variation.
    """
    pipe.set_progress_bar_config(disable=True)
    measured = {name: PictureMeasurements(instruments, num_shown) for name in variations}
    for indices in tqdm(batches(range(len(group.conditions)), batch_size), desc=f"{group.name}: generation"):
        condition = prepare_condition(pipe, [group.conditions[i] for i in indices])
        statements = None if group.statements is None else [group.statements[i] for i in indices]
        captions = [group.captions[i] for i in indices]
        for name, settings in variations.items():
            measured[name].add(generate(pipe, condition, settings, side, seed, indices), statements, captions)
    shown = {name: measurements.shown for name, measurements in measured.items()}

    references = _measure_references(group, instruments, batch_size, pipe.device)
    if references is not None and real is not None and group.references.start >= group.num_images:
        measured[REAL] = real
    margins = {}
    if references is not None and num_resamples:
        paired = {name: found.features["checker"] for name, found in measured.items()}
        paired = {name: found for name, found in paired.items() if len(found) == len(group.conditions)}
        margins = bootstrap_margins(paired, references.features["checker"], BASE, num_resamples, seed)

    figures = {}
    for name, found in measured.items():
        row = {"num_images": len(found.features["checker"]), "settings": variations.get(name)}
        if references is not None:
            distances = feature_distances(found.features, references.features, seed)
            row |= {metric: {"value": distance} for metric, distance in distances.items()}
            if name != BASE:
                difference = row["frechet_distance"]["value"] - figures[BASE]["frechet_distance"]["value"]
                row["frechet_distance"]["difference"] = {"value": difference}
            if name in margins:
                row["frechet_distance"]["plus_minus"] = margins[name][0]
                if name != BASE:
                    row["frechet_distance"]["difference"]["plus_minus"] = margins[name][1]
        if found.verdicts:
            row |= prompt_following(found.verdicts)
            if name != BASE:
                row["right"]["difference"] = paired_difference(_right(found), _right(measured[BASE]))
        if found.clip_scores is not None:
            row["clip_score"] = estimated_mean(found.clip_scores)
        figures[name] = row
    return figures, shown


def _measure_references(
    group: ExampleGroup, instruments: Instruments, batch_size: int, device: torch.device
) -> PictureMeasurements | None:
    if group.load_images is None:
        return None
    references = PictureMeasurements(instruments)
    for indices in tqdm(batches(group.references, batch_size), desc=f"{group.name}: references"):
        references.add(group.load_images(indices, device))
    return references


def _right(measured: PictureMeasurements) -> list[bool]:
    return [all(verdict.values()) for verdict in measured.verdicts]
