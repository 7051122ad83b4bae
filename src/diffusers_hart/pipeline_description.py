# SPDX-License-Identifier: Apache-2.0
import json
import re
from pathlib import Path
from typing import Any


def describe_pipeline(model: str) -> dict[str, Any]:
    """
    What a saved pipeline is made of, from its configs and the headers of its weights alone.

    Args:
        model (`str`): A folder or a Hub id.

    Returns:
        `dict`: `model`, `pipeline`, `bytes` of all files, `components` (each with `library`, `class`, `bytes` and
        `weights`, one entry a variant), `num_classes`, `schedules` and `defaults` of a call; JSON values all.

    Raises:
        ValueError: If it is no HART pipeline, or not a whole one.
    """
    from . import HARTClassConditionalPipeline, HARTPipeline
    from .pipelines.self_contained import installed_index

    folder, sizes, read_header = _open_model(model)
    if "model_index.json" not in sizes:
        raise ValueError(f"{model} has no model_index.json, so it is no pipeline in the layout of diffusers.")
    index = installed_index(json.loads((folder / "model_index.json").read_text()))
    pipelines = {pipeline.__name__: pipeline for pipeline in (HARTPipeline, HARTClassConditionalPipeline)}
    if index.get("_class_name") not in pipelines:
        raise ValueError(f"{model} is a {index.get('_class_name')}, not one of {', '.join(pipelines)}.")

    components = {}
    for name, value in index.items():
        if isinstance(value, list) and len(value) == 2 and value[1] is not None:
            files = {path: size for path, size in sizes.items() if path.startswith(f"{name}/")}
            components[name] = {
                "library": value[0],
                "class": value[1],
                "bytes": sum(files.values()),
                "weights": _weights(files, read_header),
            }
    if missing := {"transformer", "vae", "scheduler"} - components.keys():
        raise ValueError(f"{model} is incomplete, its model_index.json has no {' and no '.join(sorted(missing))}.")
    pipe = pipeline_without_weights(folder, {"pipeline": index["_class_name"], "components": components})
    defaults = {
        "guidance_scale": pipe.scheduler.config.guidance_scale,
        "num_inference_steps": pipe.default_num_inference_steps,
    }
    if isinstance(pipe, HARTPipeline):
        defaults["max_sequence_length"] = pipe.default_max_sequence_length
        defaults["system_prompt"] = index.get("system_prompt")
    return {
        "model": model,
        "pipeline": index["_class_name"],
        "bytes": sum(sizes.values()),
        "components": components,
        "num_classes": pipe.transformer.config.num_classes,
        "schedules": [
            {"pixels": scales[-1] * pipe.vae_scale_factor, "scales": list(scales)}
            for scales in pipe.scheduler.config.schedules
        ],
        "defaults": defaults,
    }


def _open_model(model: str) -> tuple[Path, dict[str, int], Any]:
    """The folder of a model's configs, the sizes of all its files by path, and what reads the header of weights."""
    from huggingface_hub import (
        model_info,
        parse_local_safetensors_file_metadata,
        parse_safetensors_file_metadata,
        snapshot_download,
    )
    from huggingface_hub.errors import OfflineModeIsEnabled
    from huggingface_hub.utils import httpx

    folder = Path(model)
    if not folder.is_dir():
        try:
            remote = model_info(model, files_metadata=True)
        except (OfflineModeIsEnabled, httpx.TransportError):
            remote = None  # what is cached must do
        configs = ["model_index.json", "*/*config.json"]
        folder = Path(snapshot_download(model, revision=remote and remote.sha, allow_patterns=configs))
        if remote is not None:
            sizes = {sibling.rfilename: sibling.size for sibling in remote.siblings}
            return folder, sizes, lambda path: parse_safetensors_file_metadata(model, path, revision=remote.sha)
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    return folder, sizes, lambda path: parse_local_safetensors_file_metadata(folder / path)


def _weights(files: dict[str, int], read_header: Any) -> list[dict[str, Any]]:
    """The weights of a component, one entry a variant."""
    names = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
    variants = {}
    for path, size in sorted(files.items()):
        if path.endswith(".safetensors"):
            stem = re.sub(r"-\d{5}-of-\d{5}", "", Path(path).name.removesuffix(".safetensors"))
            variant = stem.partition(".")[2] or None
            weights = variants.setdefault(variant, {"variant": variant, "parameters": 0, "dtypes": {}, "bytes": 0})
            for dtype, count in read_header(path).parameter_count.items():
                dtype = names.get(dtype, dtype)
                weights["dtypes"][dtype] = weights["dtypes"].get(dtype, 0) + count
                weights["parameters"] += count
            weights["bytes"] += size
    return list(variants.values())


def pipeline_without_weights(folder: Path, description: dict[str, Any]) -> Any:
    """A pipeline as its configs have it: models without memory, and nothing of other libraries."""
    import diffusers
    import torch

    import diffusers_hart

    components = description["components"]
    libraries = {"diffusers": diffusers, "diffusers_hart": diffusers_hart}
    parts = dict.fromkeys(components)
    for name, component in components.items():
        if component["library"] not in libraries:
            continue
        component_class = getattr(libraries[component["library"]], component["class"], None)
        if component_class is None:
            raise ValueError(f"`{name}` is a {component['class']}, which this {component['library']} does not have.")
        config = component_class.load_config(str(folder), subfolder=name)
        with torch.device("meta" if issubclass(component_class, torch.nn.Module) else "cpu"):
            parts[name] = component_class.from_config(config)
    return getattr(diffusers_hart, description["pipeline"])(**parts)
