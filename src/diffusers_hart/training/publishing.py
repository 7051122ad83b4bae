# SPDX-License-Identifier: Apache-2.0
import argparse
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from diffusers.utils.hub_utils import populate_model_card
from huggingface_hub import ModelCard, ModelCardData, create_repo, upload_folder


CARD = """---
{header}
---

# {title}

{description}

## Use

{use}

## Training

| | |
|---|---|
{settings}
"""
USE = """With `pip install diffusers-hart`:

```py
from diffusers_hart import {pipeline_class}

pipe = {pipeline_class}.from_pretrained("{repo_id}")
```"""


def hub_repository(args: argparse.Namespace) -> str | None:
    """
    The repository the result is pushed to, created if there is none; `None` without `--push_to_hub`. To be asked for
    before a training rather than after it.
    """
    if not args.push_to_hub:
        return None
    name = args.hub_model_id or Path(args.output_dir).resolve().name
    return create_repo(name, token=args.hub_token, exist_ok=True).repo_id


def publish_pipeline(
    args: argparse.Namespace,
    pipe: Any,
    description: str,
    settings: dict[str, object],
    pipeline_tag: str | None,
    repo_id: str | None = None,
    base_model: str | None = None,
    use: str = USE,
) -> Path:
    r"""
    Save a trained pipeline and its model card into the folder of the run, and push them. The pipeline is written beside
    its place first, so that after an error the folder holds what it held before.

    Args:
        args (`argparse.Namespace`): The arguments of [`add_training_arguments`].
        pipe (`DiffusionPipeline`): The pipeline, or a model or anything else that has `save_pretrained`.
        description (`str`): What it is, for the card.
        settings (`dict[str, object]`): How it was trained, for the card.
        pipeline_tag (`str`, *optional*): The task, as the Hub knows it.
        repo_id (`str`, *optional*): Repository to push to, of [`hub_repository`]; without it nothing is pushed.
        base_model (`str`, *optional*): What it was trained from; named in the card if it is not a local folder.
        use (`str`, *optional*): What the card says of its use, with `{pipeline_class}` and `{repo_id}` in their places.

    Returns:
        `Path`: The folder.
    """
    output_dir = Path(args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    public_base = base_model if base_model and not Path(base_model).exists() else None
    header = ModelCardData(
        library_name="diffusers", pipeline_tag=pipeline_tag, license=args.license, base_model=public_base
    )
    card = ModelCard(
        CARD.format(
            header=header.to_yaml(),
            title=(repo_id or output_dir.resolve().name).split("/")[-1],
            description=description,
            use=use.format(pipeline_class=type(pipe).__name__, repo_id=repo_id or "path/to/this/folder"),
            settings="\n".join(f"| {name} | {value} |" for name, value in settings.items()),
        ),
        ignore_metadata_errors=True,
    )
    tags = ["diffusers", "diffusers-hart", "hart", "autoregressive"]
    with TemporaryDirectory(prefix=".pipeline-", dir=output_dir) as temporary:
        pipe.save_pretrained(temporary)
        populate_model_card(card, tags).save(Path(temporary) / "README.md")
        for part in Path(temporary).iterdir():
            place = output_dir / part.name
            if place.is_dir():
                shutil.rmtree(place)
            part.rename(place)
    if repo_id is not None:
        upload_folder(
            repo_id=repo_id,
            folder_path=output_dir,
            token=args.hub_token,
            commit_message="End of training",
            ignore_patterns=["checkpoint-*", f"{args.logging_dir}/*", "validation/*"],
        )
    return output_dir
