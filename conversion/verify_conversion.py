# SPDX-License-Identifier: Apache-2.0
"""
Compare a converted pipeline with the original implementation, stage by stage, on the same inputs.

It needs a GPU, the published files and a checkout of the original code in which `sample.py` runs (its CUDA kernels
built, its own old packages installed). The original runs in a process of its own; if it lives in another environment,
name that one's Python with --original_python.

It has been run against a stand-in with the original's interface, and its comparison against recorded results of the
original on small weights, but not yet against the published files. The tolerances are what the number formats suggest.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import load_file, save_file

from diffusers_hart import HARTPipeline
from diffusers_hart.conversion import DTYPES, read_system_prompt
from diffusers_hart.conversion.comparison import Comparison, compare, format_comparisons, pipeline_outputs


GUIDANCE_SCALE = 4.5
WHAT_IS_RANDOM = """
what cannot be compared:
  The original draws codes. A tiny top-p leaves it one code to draw, so that its codes are its best guesses; top-k and
  Gumbel smoothing are thereby out of the comparison. The noise that its residual diffusion adds at each step cannot be
  given or switched off inside its generation, so the residual is sampled at temperature 0 by its diffusion alone, from
  the first noise that a seed fixes. Its training forward drops random tokens and is not called.
  In 16 bits the original runs under autocast, as its sample.py does, and keeps its weights in float32, while the
  pipeline has its own in 16 bits. What runs freely there, the residual diffusion and the whole picture, is shown and
  not judged, since one early code that differs makes another picture. In float32 such a code is rare but possible: if
  picture.* alone fails and generation.codes has a share above 0, that is what happened.
  Kernels on a GPU add up in changing order: two runs of one implementation may differ, too.

exit status: 0 if every stage passes, 1 if one does not or the comparison could not be made.
"""


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=WHAT_IS_RANDOM, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--original_code", required=True, help="A checkout of the original code.")
    parser.add_argument("--checkpoint_path", required=True, help="The original checkpoint, with llm/ and tokenizer/.")
    parser.add_argument("--text_encoder_path", required=True, help="The original's text model and tokenizer.")
    parser.add_argument("--model_path", required=True, help="The converted folder.")
    parser.add_argument("--original_python", default=sys.executable, help="The Python that the original runs in.")
    parser.add_argument("--prompt", nargs="+", default=["a lighthouse at dusk, oil on canvas"], help="What to draw.")
    parser.add_argument("--no_ema", action="store_true", help="The trained weights were converted, not their EMA.")
    parser.add_argument("--device", default="cuda", help="Where to run (the original knows no other than cuda).")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="What to compute in.")
    parser.add_argument("--tolerance", type=float, help="Relative tolerance of values, instead of the dtype's.")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    args = parse_args(arguments)
    try:
        rows = verify(args)
    except (OSError, ValueError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return report(rows)


def report(rows: list[Comparison]) -> int:
    """Print the table; the exit status."""
    print(format_comparisons(rows))
    return 0 if all(row.passed for row in rows) else 1


def verify(args: argparse.Namespace) -> list[Comparison]:
    """Run both implementations, one after the other, and compare what they computed."""
    dtype = DTYPES[args.dtype]
    system_prompt = read_system_prompt(Path(args.original_code))
    pipe = HARTPipeline.from_pretrained(args.model_path, dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    side = pipe.transformer.config.sample_size * pipe.vae_scale_factor

    with TemporaryDirectory() as folder:
        image, record, settings = (
            Path(folder) / name for name in ("image.safetensors", "record.safetensors", "settings")
        )
        save_file({"image": picture(side)}, image)
        values = {
            "original_code": str(Path(args.original_code).resolve()),
            "checkpoint_path": str(Path(args.checkpoint_path).resolve()),
            "text_encoder_path": args.text_encoder_path,
            "prompts": args.prompt,
            "use_ema": not args.no_ema,
            "guidance_scale": GUIDANCE_SCALE,
            "device": args.device,
            "dtype": str(dtype).removeprefix("torch."),
            "image": str(image),
            "record": str(record),
        }
        settings.write_text(json.dumps(values))
        run = subprocess.run([args.original_python, Path(__file__).with_name("run_original.py"), settings])
        if run.returncode != 0:
            raise ValueError(f"The original implementation failed with exit status {run.returncode}, see above.")
        original = load_file(record)

    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    pipe.to(args.device)
    return compare(
        original, pipeline_outputs(pipe, original, GUIDANCE_SCALE, args.prompt, system_prompt), dtype, args.tolerance
    )


def picture(side: int) -> torch.Tensor:
    """A test picture `(1, 3, side, side)` in [-1, 1]: two gradients and rings."""
    axis = torch.linspace(-1, 1, side)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    return torch.stack([x, y, torch.cos(12 * (x.square() + y.square()).sqrt())])[None]


if __name__ == "__main__":
    sys.exit(main())
