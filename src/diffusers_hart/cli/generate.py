# SPDX-License-Identifier: Apache-2.0
import argparse
import math
import secrets
import sys
from pathlib import Path
from typing import Any

from .argument_types import positive, seed
from .console import on_a_terminal, print_json, say
from .model_source import add_model_arguments, load_pipeline
from .picture_files import check_pictures, numbered_paths, picture_grid, save_picture


def generate(arguments: argparse.Namespace) -> None:
    """Draw pictures and write them, each with all that is needed to draw it again."""
    import torch
    from tqdm.auto import tqdm

    prompts = _read_prompts(arguments)
    paths = numbered_paths(arguments.output, len(prompts) * arguments.num_images)
    image_format = check_pictures(paths)
    if arguments.grid is not None:
        grid_format = check_pictures([arguments.grid])
    if image_format != "PNG":
        say(f"note: only PNG files keep prompt, seed and settings; {paths[0].suffix} files are written without")
    pipe, origin = load_pipeline(arguments)
    first_seed = arguments.seed
    if first_seed is None:
        first_seed = secrets.randbelow(2**32)
        say(f"seed {first_seed}")
    pictures = [(prompt, first_seed + i) for prompt in prompts for i in range(arguments.num_images)]

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
    size = arguments.batch_size
    batches = [pictures[start : start + size] for start in range(0, len(pictures), size)]
    if len(batches) > 1:
        pipe.set_progress_bar_config(disable=True)
    images, written = [], []
    with tqdm(total=len(pictures), unit="picture", disable=len(batches) == 1 or not on_a_terminal()) as progress_bar:
        for batch in batches:
            drawn = pipe(
                [prompt for prompt, _ in batch],
                generator=[torch.Generator().manual_seed(picture_seed) for _, picture_seed in batch],
                **settings,
            ).images
            for (prompt, picture_seed), image in zip(batch, drawn):
                path = paths[len(written)]
                parameters = {"prompt": prompt, "seed": picture_seed, **_decided(pipe, settings, image), **origin}
                parameters["versions"] = _versions()
                save_picture(image, path, image_format, prompt=prompt, seed=str(picture_seed), parameters=parameters)
                written.append({"path": str(path), **parameters})
                if arguments.grid is not None:
                    images.append(image)
                if not arguments.json:
                    print(path, flush=True)
            progress_bar.update(len(batch))

    if arguments.grid is not None:
        is_table = min(len(prompts), arguments.num_images) > 1
        columns = arguments.num_images if is_table else math.ceil(math.sqrt(len(images)))
        save_picture(picture_grid(images, columns), arguments.grid, grid_format, pictures=written)
        if not arguments.json:
            print(arguments.grid)
    if arguments.json:
        print_json({"pictures": written, "grid": None if arguments.grid is None else str(arguments.grid)})


def add_generate_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompt", nargs="*", help="what to draw; several prompts in quotes")
    parser.add_argument(
        "--prompts", metavar="FILE", help='file of further prompts, one a line; "-" for standard input'
    )
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        default=Path("hart.png"),
        help="the picture; several are numbered, prompt by prompt (default: %(default)s)",
    )
    parser.add_argument(
        "--grid",
        type=Path,
        metavar="FILE",
        help="also write all pictures into one, a row for each prompt if there are several of each",
    )
    add_model_arguments(parser)
    parser.add_argument(
        "--seed", type=seed, help="seed of the first picture of each prompt, one more for each next (default: any)"
    )
    parser.add_argument(
        "--num-images", type=positive, default=1, metavar="N", help="pictures of each prompt (default: 1)"
    )
    parser.add_argument(
        "--batch-size", type=positive, default=8, metavar="N", help="pictures that are drawn at once (default: 8)"
    )
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


def _read_prompts(arguments: argparse.Namespace) -> list[str]:
    prompts = list(arguments.prompt)
    if arguments.prompts is not None:
        if arguments.prompts == "-":
            text = sys.stdin.read()
        else:
            try:
                text = Path(arguments.prompts).read_text(encoding="utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(f"{arguments.prompts} must be UTF-8 text: {error}.") from error
        prompts += [line.strip() for line in text.splitlines() if line.strip()]
        if not prompts:
            raise ValueError(f"There are no prompts in {arguments.prompts}: it should have one a line.")
    if not prompts:
        arguments.parser.error("the following arguments are required: prompt or --prompts")
    return prompts


def _decided(pipe: Any, settings: dict[str, Any], image: Any) -> dict[str, Any]:
    """The settings, and what the checkpoint decided, as its next version may decide otherwise; top-k is a rule of its."""
    decided = {**settings, "guidance_scale": pipe.guidance_scale}
    decided["width"], decided["height"] = image.size
    if settings["num_inference_steps"] is None:
        decided["num_inference_steps"] = pipe.default_num_inference_steps
    if settings["system_prompt"] is None:
        decided["system_prompt"] = pipe.config.system_prompt
    return decided


def _versions() -> dict[str, str]:
    import diffusers
    import torch
    import transformers

    from .. import __version__

    versions = {"diffusers": diffusers.__version__, "transformers": transformers.__version__}
    return {"diffusers-hart": __version__, **versions, "torch": torch.__version__}
