# SPDX-License-Identifier: Apache-2.0
import os
from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData, create_repo, upload_folder

from ..pipelines import HARTPipeline
from ..pipelines.model_card import TAGS, drawn_sizes, use_of


CARD = """---
{header}
---

# HART as a diffusers pipeline

Text-to-image weights of HART, the Hybrid Autoregressive Transformer
([paper](https://huggingface.co/papers/2410.10812)), converted from their original layout.
They draw {sizes}.

## Use

{use}

## What was converted

| Component | From | Stored as |
|---|---|---|
{components}

Values were {values}. The training discriminator and constants that the original stores beside the weights are left out.

## Limits

- {system_prompt}
- Text longer than {tokens} tokens is cut.
- No safety checker is included.
- Neither training data nor an evaluation comes with these files: what is known of the weights is in the paper.

## Licence

{licence}
"""


def write_model_card(
    folder: str | os.PathLike,
    pipe: HARTPipeline,
    sources: Mapping[str, str],
    license: str | None = None,
    base_model: str | None = None,
    repo_id: str | None = None,
    changed_dtype: bool = False,
    self_contained: bool = False,
) -> Path:
    r"""
    Write the model card, `README.md`, of a converted pipeline.

    Args:
        folder (`str` or `os.PathLike`): The folder the pipeline was saved in.
        pipe ([`HARTPipeline`]): The pipeline.
        sources (`Mapping[str, str]`): For each component that has weights, what it was made of.
        license (`str`, *optional*): The licence of the weights. It is never guessed: without one the card says so.
        base_model (`str`, *optional*): Hub id of the model that was converted.
        repo_id (`str`, *optional*): Hub id of the converted one, for the example in the card.
        changed_dtype (`bool`, defaults to `False`): Whether the weights were stored in another type than they had.
        self_contained (`bool`, defaults to `False`): Whether the code of the pipeline lies beside the weights.

    Returns:
        `Path`: The card.
    """
    header = ModelCardData(
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=["text-to-image", *TAGS],
        license=license,
        base_model=base_model,
    )
    system_prompt = pipe.config.system_prompt
    card = CARD.format(
        header=header.to_yaml(),
        sizes=drawn_sizes(pipe),
        use=use_of(type(pipe).__name__, repo_id or "path/to/this/folder", '"a lighthouse at dusk"', self_contained),
        components="\n".join(
            f"| `{name}` | {source} | {_dtypes(pipe.components[name])} |" for name, source in sources.items()
        ),
        values="rounded to the type above where they were stored in another" if changed_dtype else "not changed",
        system_prompt="A system prompt is configured and goes before each prompt."
        if system_prompt
        else "No system prompt is configured. Weights that were trained with one draw better with it: pass "
        "`system_prompt`.",
        tokens=pipe.transformer.config.caption_length,
        licence=f"`{license}`, as stated by who converted the weights."
        if license
        else "No licence was stated when the weights were converted. That is no permission: ask who published them.",
    )
    path = Path(folder) / "README.md"
    ModelCard(card, ignore_metadata_errors=True).save(path)
    return path


def push_converted(
    folder: str | os.PathLike, repo_id: str, token: str | None = None, private: bool | None = None
) -> str:
    r"""
    Upload a converted folder to the Hub. The repository is created if there is none.

    Args:
        folder (`str` or `os.PathLike`): The folder.
        repo_id (`str`): Hub id of the repository.
        token (`str`, *optional*): Access token, by default the one `huggingface_hub` is logged in with.
        private (`bool`, *optional*): Whether a new repository is private, by default what its owner has set.

    Returns:
        `str`: The address of the commit.
    """
    repo_id = create_repo(repo_id, token=token, private=private, exist_ok=True).repo_id
    commit = upload_folder(
        repo_id=repo_id, folder_path=folder, token=token, commit_message="Upload converted HART weights"
    )
    return commit.commit_url


def _dtypes(model) -> str:
    return " and ".join(sorted({str(parameter.dtype).removeprefix("torch.") for parameter in model.parameters()}))
