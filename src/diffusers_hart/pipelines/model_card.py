# SPDX-License-Identifier: Apache-2.0
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError


TAGS = ["diffusers", "diffusers-hart", "hart", "autoregressive"]

CARD = """---
{header}
---

# {title}

{task} with HART, the Hybrid Autoregressive Transformer ([paper](https://huggingface.co/papers/2410.10812)), as a
diffusers pipeline. It draws {sizes}.

## Use

{use}

## Training data

{training_data}

## Limits

{limits}

## Licence

{licence}
"""

# In lines, none of which begins with `from`: diffusers takes such lines in the code of a folder for imports.
USE = (
    "With `diffusers-hart` installed:\n\n```py\nimport torch\n"
    "from diffusers_hart import {pipeline_class}\n\n"
    'pipe = {pipeline_class}.from_pretrained("{repo_id}", dtype=torch.bfloat16).to("cuda")\n'
    'image = pipe({condition}, generator=torch.Generator("cuda").manual_seed(0)).images[0]\n'
    'image.save("picture.png")\n```'
)
SELF_CONTAINED_USE = (
    "\n\nWithout it, with diffusers alone: the code lies beside the weights, and `trust_remote_code=True` runs it.\n\n"
    "```py\nimport torch\n"
    "from diffusers import DiffusionPipeline\n\n"
    'pipe = DiffusionPipeline.from_pretrained("{repo_id}", trust_remote_code=True, torch_dtype=torch.bfloat16)\n'
    'pipe.to("cuda")\n```'
)


def pipeline_card(
    pipe: Any,
    repo_id: str,
    self_contained: bool = False,
    license: str | None = None,
    training_data: str | None = None,
) -> ModelCard:
    r"""
    The model card of a pipeline: use, training data, limits and licence, as far as they are known.

    Args:
        pipe (`HARTPipeline` or `HARTClassConditionalPipeline`): The pipeline; its weights are not looked at.
        repo_id (`str`): Where it will be, for the example.
        self_contained (`bool`, defaults to `False`): Whether its code lies beside its weights.
        license (`str`, *optional*): The licence of the weights. It is never guessed: without one the card says so.
        training_data (`str`, *optional*): A sentence on what the weights were trained on.
    """
    draws_classes = pipe.transformer.config.num_classes is not None
    header = ModelCardData(
        library_name="diffusers",
        pipeline_tag="unconditional-image-generation" if draws_classes else "text-to-image",
        tags=[*TAGS] if draws_classes else ["text-to-image", *TAGS],
        license=license,
    )
    card = CARD.format(
        header=header.to_yaml(),
        title=repo_id.split("/")[-1],
        task="Pictures of classes" if draws_classes else "Text to image",
        sizes=drawn_sizes(pipe),
        use=use_of(type(pipe).__name__, repo_id, "0" if draws_classes else '"a lighthouse at dusk"', self_contained),
        training_data=training_data or "Not stated by who uploaded the weights.",
        limits="\n".join(f"- {limit}" for limit in _limits(pipe)),
        licence=f"`{license}`, as stated by who uploaded the weights."
        if license
        else "No licence was stated when the weights were uploaded. That is no permission: ask who published them.",
    )
    return ModelCard(card, ignore_metadata_errors=True)


def load_or_write_card(
    pipe: Any,
    repo_id: str,
    self_contained: bool = False,
    license: str | None = None,
    training_data: str | None = None,
    token: str | None = None,
) -> ModelCard:
    """The card that a repository of the Hub has, as it is, or else a new one; arguments as in [`pipeline_card`]."""
    try:
        return ModelCard.load(repo_id, token=token, ignore_metadata_errors=True)
    except (EntryNotFoundError, RepositoryNotFoundError):
        return pipeline_card(pipe, repo_id, self_contained, license, training_data)


def use_of(pipeline_class: str, repo_id: str, condition: str, self_contained: bool) -> str:
    """How to load and call a pipeline."""
    use = USE + (SELF_CONTAINED_USE if self_contained else "")
    return use.format(pipeline_class=pipeline_class, repo_id=repo_id, condition=condition)


def drawn_sizes(pipe: Any) -> str:
    """What a pipeline draws, in words."""
    sides = [schedule[-1] * pipe.vae_scale_factor for schedule in pipe.scheduler.config.schedules]
    default = pipe.transformer.config.sample_size * pipe.vae_scale_factor
    sizes = f"squares of {default} pixels a side"
    if others := [str(side) for side in sides if side != default]:
        sizes += f"; {' and '.join(others)} pixels can be asked for, but are not what the weights were trained on last"
    return sizes


def _limits(pipe: Any) -> list[str]:
    config = pipe.transformer.config
    if config.num_classes is not None:
        limits = [f"It draws its {config.num_classes} classes and nothing else."]
    else:
        limits = [f"Text longer than {config.caption_length} tokens is cut."]
    if getattr(pipe, "safety_checker", None) is None:
        limits.append("No safety checker is included.")
    if not pipe.default_num_inference_steps:
        limits.append("There is no residual diffusion: pictures are drawn from their codes alone.")
    return [*limits, "It draws what it was trained on and has the biases of that; pictures are no statements of fact."]
