# SPDX-License-Identifier: Apache-2.0
"""The command line: one function a subcommand, and one that declares its arguments."""

import argparse
import io
import json
import secrets
import sys
import tempfile
from pathlib import Path
from typing import Any


UNTRAINED = "untrained weights"


def generate(arguments: argparse.Namespace) -> None:
    """Draw pictures and write them, each with all that is needed to draw it again."""
    import torch

    paths = _picture_paths(arguments.output, arguments.num_images)
    image_format = _check_output(paths)
    if image_format != "PNG":
        _say(f"note: only PNG files keep prompt, seed and settings; {paths[0].suffix} files are written without")
    pipe, device, dtype = _load_pipeline(arguments.model, arguments.device, arguments.dtype)
    seed = arguments.seed
    if seed is None:
        seed = secrets.randbelow(2**32)
        _say(f"seed {seed}")
    seeds = [seed + i for i in range(arguments.num_images)]

    settings = {
        "negative_prompt": arguments.negative_prompt,
        "height": arguments.height,
        "width": arguments.width,
        "guidance_scale": arguments.guidance_scale,
        "num_inference_steps": arguments.steps,
        "top_k": arguments.top_k,
        "top_p": arguments.top_p,
        "smooth": arguments.smooth,
        "residual_temperature": arguments.residual_temperature,
        "system_prompt": arguments.system_prompt,
    }
    images = pipe(
        arguments.prompt,
        num_images_per_prompt=len(seeds),
        generator=[torch.Generator().manual_seed(image_seed) for image_seed in seeds],
        **settings,
    ).images

    # What the checkpoint decided is written down too, as its next version may decide otherwise; top-k is a rule of its.
    settings["width"], settings["height"] = images[0].size
    settings["guidance_scale"] = pipe.guidance_scale
    if settings["num_inference_steps"] is None:
        settings["num_inference_steps"] = pipe.default_num_inference_steps
    if settings["system_prompt"] is None:
        settings["system_prompt"] = pipe.config.system_prompt
    origin = {"model": arguments.model or UNTRAINED, "device": device, "dtype": dtype, "versions": _versions()}
    for path, image, image_seed in zip(paths, images, seeds):
        parameters = {"prompt": arguments.prompt, "seed": image_seed, **settings, **origin}
        options = {"pnginfo": _png_text(parameters)} if image_format == "PNG" else {}
        image.save(path, format=image_format, **options)
        print(path)


def info(arguments: argparse.Namespace) -> None:
    """Say what a saved pipeline is made of, from its configs and the headers of its weights."""
    from .pipeline_description import describe_pipeline

    description = describe_pipeline(arguments.model)
    if arguments.json:
        print(json.dumps(description, indent=2))
        return
    print(f"{description['pipeline']} in {description['model']}\n")
    rows = [("component", "class", "parameters", "dtype", "on disk")]
    for name, component in description["components"].items():
        weights = component["weights"] or [{"variant": None, "parameters": None, "dtypes": {}, "bytes": None}]
        for weight in weights:
            rows.append(
                (
                    name if weight["variant"] is None else f"{name} ({weight['variant']})",
                    component["class"],
                    "" if weight["parameters"] is None else f"{weight['parameters']:,}",
                    ", ".join(weight["dtypes"]),
                    _size(component["bytes"] if weight["bytes"] is None else weight["bytes"]),
                )
            )
    rows.append(("all files", "", "", "", _size(description["bytes"])))
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    for name, class_name, parameters, dtypes, size in rows:
        left = f"{name:{widths[0]}}  {class_name:{widths[1]}}  {parameters:>{widths[2]}}"
        print(f"{left}  {dtypes:{widths[3]}}  {size:>{widths[4]}}")
    print()
    for schedule in description["schedules"]:
        scales = " ".join(str(side) for side in schedule["scales"])
        print(f"{schedule['pixels']} px in {len(schedule['scales'])} scales: {scales}")
    if description["num_classes"] is not None:
        print(f"{description['num_classes']} classes")
    for name, value in description["defaults"].items():
        print(f"{name}: {json.dumps(value)}")


def _generate_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompt", help="what to draw")
    parser.add_argument(
        "-o", "--output", type=Path, default=Path("hart.png"), help="the picture (default: %(default)s)"
    )
    parser.add_argument("--model", help="Hub id or folder of a HARTPipeline (default: tiny untrained weights)")
    parser.add_argument("--seed", type=_seed, help="seed of the first picture, one more for each next (default: any)")
    parser.add_argument("--num-images", type=_positive, default=1, metavar="N", help="pictures (default: 1)")
    parser.add_argument("--negative-prompt", metavar="TEXT", help="what to lead away from")
    parser.add_argument("--system-prompt", metavar="TEXT", help='text before the prompt, "" for none')
    own = "(default: the model's own)"
    parser.add_argument("--height", type=int, metavar="PIXELS", help=own)
    parser.add_argument("--width", type=int, metavar="PIXELS", help=own)
    parser.add_argument("--guidance-scale", type=float, metavar="W", help=f"0 for no guidance {own}")
    parser.add_argument("--steps", type=int, metavar="N", help=f"steps of the residual diffusion, 0 for none {own}")
    parser.add_argument("--top-k", type=int, metavar="K", help=f"codes to choose from {own}")
    parser.add_argument("--top-p", type=float, metavar="P", help=f"probability mass to choose from {own}")
    parser.add_argument(
        "--no-smooth", dest="smooth", action="store_false", help="draw the picture from single codes, not mixtures"
    )
    parser.add_argument(
        "--residual-temperature", type=float, default=1.0, metavar="T", help="factor of the added noise (default: 1)"
    )
    parser.add_argument("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="(default: auto)")
    parser.add_argument(
        "--dtype",
        choices=["float32", "float16", "bfloat16"],
        help="(default: bfloat16 on cuda, float32 elsewhere and for untrained weights)",
    )


def _info_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="Hub id or folder of a pipeline")
    parser.add_argument("--json", action="store_true", help="print JSON")


SUBCOMMANDS = {
    "generate": (generate, _generate_arguments, "draw pictures from a prompt"),
    "info": (info, _info_arguments, "describe a model without drawing anything"),
}


def main(argv: list[str] | None = None) -> int:
    """
    The entry point.

    Args:
        argv (`list[str]`, *optional*): The arguments, those of the process by default.

    Returns:
        `int`: The exit code: 0, 1 after an error that is told in one line, 130 if interrupted. Wrong usage exits
        with 2.
    """
    import diffusers
    import transformers
    from huggingface_hub.errors import SafetensorsParsingError
    from safetensors import SafetensorError

    from . import __version__

    parser = argparse.ArgumentParser("diffusers-hart", description="Draw pictures with HART.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    subparsers = parser.add_subparsers(required=True, metavar="command")
    for name, (command, add_arguments, summary) in SUBCOMMANDS.items():
        subparser = subparsers.add_parser(name, help=summary, description=command.__doc__)
        add_arguments(subparser)
        subparser.add_argument("--debug", action="store_true", help="show where an error comes from")
        subparser.set_defaults(command=command)
    arguments = parser.parse_args(argv)
    if not sys.stderr.isatty():
        diffusers.utils.logging.disable_progress_bar()
        transformers.utils.logging.disable_progress_bar()  # and those of huggingface_hub
    try:
        arguments.command(arguments)
    except KeyboardInterrupt:
        return 130
    except (ValueError, OSError, SafetensorsParsingError, SafetensorError) as error:
        if arguments.debug:
            raise
        _say(f"error: {error}")
        return 1
    return 0


def _say(message: str) -> None:
    print(f"diffusers-hart: {' '.join(message.split())}", file=sys.stderr)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a positive integer, not {text}")
    return int(text)


def _seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"must be an integer from 0 to 2**63 - 1, not {text}")
    return int(text)


def _picture_paths(output: Path, num_images: int) -> list[Path]:
    if num_images == 1:
        return [output]
    return [output.with_name(f"{output.stem}-{i}{output.suffix}") for i in range(num_images)]


def _check_output(paths: list[Path]) -> str:
    """The format of the pictures, after making sure, before anything is computed, that they can be written."""
    from PIL import Image

    Image.init()
    suffix, folder = paths[0].suffix.lower(), paths[0].parent
    image_format = Image.registered_extensions().get(suffix)
    try:
        Image.new("RGB", (16, 16)).save(io.BytesIO(), format=image_format or "unknown")
    except (KeyError, ValueError, OSError) as error:
        raise ValueError(f"{paths[0]}: pictures cannot be written as {suffix!r}; use .png, for example.") from error
    place = folder
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
        for place in paths:
            if place.exists():
                place.open("r+b").close()
    except OSError as error:
        raise ValueError(f"Pictures cannot be written to {place}: {error.strerror}.") from error
    return image_format


def _load_pipeline(model: str | None, device: str, dtype: str | None) -> tuple[Any, str, str]:
    """The pipeline, and the names of the device and of the dtype that it is on and in."""
    import torch

    from . import HARTPipeline
    from .random_pipeline import random_pipeline

    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if device == "auto":
        device = next(name for name in ("cuda", "mps", "cpu") if available[name])
    elif not available[device]:
        raise ValueError(
            f"PyTorch finds no {device} device here; pass --device cpu, or nothing for the best there is."
        )
    if model is None:
        _say(f"no --model was given: drawing with {UNTRAINED}, the picture is noise")
        pipe = random_pipeline().to(device)
        if dtype is not None:
            pipe.to(getattr(torch, dtype))
    else:
        dtype = dtype or ("bfloat16" if device == "cuda" else "float32")
        pipe = HARTPipeline.from_pretrained(model, dtype=getattr(torch, dtype)).to(device)
    pipe.set_progress_bar_config(disable=not sys.stderr.isatty())
    return pipe, device, dtype or "float32"


def _versions() -> dict[str, str]:
    import diffusers
    import torch
    import transformers

    from . import __version__

    versions = {"diffusers": diffusers.__version__, "transformers": transformers.__version__}
    return {"diffusers-hart": __version__, **versions, "torch": torch.__version__}


def _png_text(parameters: dict[str, Any]) -> Any:
    from PIL.PngImagePlugin import PngInfo

    text = PngInfo()
    text.add_text("prompt", parameters["prompt"])
    text.add_text("seed", str(parameters["seed"]))
    text.add_text("parameters", json.dumps(parameters))
    return text


def _size(number: int) -> str:
    return f"{number / 1e6:,.1f} MB"
