# SPDX-License-Identifier: Apache-2.0
import argparse
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch.nn as nn
from diffusers.utils.hub_utils import populate_model_card
from huggingface_hub import ModelCard, ModelCardData, upload_folder

from .lora import save_lora_adapters


CARD = """---
{header}
---

# {title}

{description}
{pictures}
## Use

With `pip install diffusers-hart`:

```py
from diffusers_hart import HARTPipeline

pipe = HARTPipeline.from_pretrained("{base_model}")
pipe.load_lora_weights("{repo_id}")
image = pipe({prompt!r}).images[0]
```

`pipe.set_adapters` weighs the adapter, `pipe.fuse_lora` adds it to the weights, `pipe.unload_lora_weights` removes it.

## Training

| | |
|---|---|
{settings}
"""

PICTURES_FILE = "validation.png"


def publish_lora(
    args: argparse.Namespace,
    models: Mapping[str, nn.Module],
    description: str,
    settings: Mapping[str, object],
    repo_id: str | None = None,
    instance_prompt: str | None = None,
) -> Path:
    r"""
    Save the adapters of models, their model card and the last validation pictures into the folder of the run, and push
    them. Everything is written beside its place first.

    Args:
        args (`argparse.Namespace`): The arguments of [`add_lora_arguments`] and [`add_training_arguments`].
        models (`Mapping[str, nn.Module]`): The models with adapters, by their names in the pipeline.
        description (`str`): What the adapters are, for the card.
        settings (`Mapping[str, object]`): How they were trained, for the card.
        repo_id (`str`, *optional*): Repository to push to, of [`hub_repository`]; without it nothing is pushed.
        instance_prompt (`str`, *optional*): What the subject is called, for DreamBooth.

    Returns:
        `Path`: The folder.
    """
    output_dir = Path(args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    base_model = args.pretrained_model_name_or_path
    public_base = None if Path(base_model).exists() else base_model
    grids = sorted(output_dir.glob("validation/step-*.png")) if args.validation_prompt else []
    header = ModelCardData(
        library_name="diffusers",
        pipeline_tag="text-to-image",
        license=args.license,
        base_model=public_base,
        instance_prompt=instance_prompt,
    )
    card = ModelCard(
        CARD.format(
            header=header.to_yaml(),
            title=(repo_id or output_dir.resolve().name).split("/")[-1],
            description=description,
            pictures=_pictures(args.validation_prompt) if grids else "",
            base_model=public_base or "path/to/the/base/model",
            repo_id=repo_id or "path/to/this/folder",
            prompt=(args.validation_prompt or [instance_prompt or "a prompt"])[0],
            settings="\n".join(f"| {name} | {value} |" for name, value in settings.items()),
        ),
        ignore_metadata_errors=True,
    )
    tags = ["diffusers", "diffusers-hart", "hart", "lora"] + ["dreambooth"] * (instance_prompt is not None)
    with TemporaryDirectory(prefix=".lora-", dir=output_dir) as temporary:
        save_lora_adapters(temporary, models)
        populate_model_card(card, tags).save(Path(temporary) / "README.md")
        if grids:
            shutil.copy(grids[-1], Path(temporary) / PICTURES_FILE)
        for part in Path(temporary).iterdir():
            part.replace(output_dir / part.name)
    if repo_id is not None:
        upload_folder(
            repo_id=repo_id,
            folder_path=output_dir,
            token=args.hub_token,
            commit_message="End of training",
            allow_patterns=["pytorch_lora_weights.safetensors", "README.md", "metrics.jsonl", PICTURES_FILE],
        )
    return output_dir


def _pictures(prompts: Sequence[str]) -> str:
    rows = "\n".join(f"{place}. {prompt}" for place, prompt in enumerate(prompts, start=1))
    return f"\n![Validation pictures]({PICTURES_FILE})\n\nA row for each prompt, with the adapter:\n\n{rows}\n"
