# SPDX-License-Identifier: Apache-2.0
"""Draw the prompts of files on several GPUs: `accelerate launch generate_distributed.py ...`, or on one by `python`."""

import argparse
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import PIL.Image
import torch
from accelerate import PartialState
from accelerate.utils import gather_object, parse_flag_from_env
from diffusers import DiffusionPipeline
from PIL.PngImagePlugin import PngInfo
from tqdm.auto import tqdm

from diffusers_hart import HARTPipeline
from diffusers_hart.prompt_files import read_prompts
from diffusers_hart.training.arguments import positive_int


DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
SETTINGS = (
    "negative_prompt",
    "system_prompt",
    "height",
    "width",
    "guidance_scale",
    "num_inference_steps",
    "top_k",
    "top_p",
    "smooth",
    "residual_temperature",
)


@dataclass
class Picture:
    """One picture to draw: its file, and everything that decides what it shows."""

    path: Path
    prompt: str
    seed: int

    def __str__(self) -> str:
        return f"{self.path.name} ({self.prompt!r})"


def boolean(text: str) -> bool:
    """The type of an argument that is `true` or `false`."""
    if text not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"must be true or false, not {text}")
    return text == "true"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="folder or id on the Hub of a HARTPipeline")
    parser.add_argument("--revision", help="branch, tag or commit of it on the Hub")
    parser.add_argument("--variant", help="variant of its files, such as fp16")
    parser.add_argument("--prompts", nargs="+", required=True, help="files of prompts, one a line, or .jsonl")
    parser.add_argument("--caption_column", default="text", help="of .jsonl files")
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--num_images_per_prompt", type=positive_int, default=1)
    parser.add_argument("--batch_size", type=positive_int, default=8, help="pictures at once of each process")
    parser.add_argument("--seed", type=int, default=0, help="of the first picture, one more for each next")
    parser.add_argument("--dtype", choices=DTYPES, help="by default bf16 on a GPU and fp32 elsewhere")
    parser.add_argument("--warmup_batches", type=int, default=0, help="drawn before the clock runs, and thrown away")
    parser.add_argument("--json", action="store_true", help="print a summary as JSON, pictures a second among it")

    group = parser.add_argument_group("settings, by default the pipeline's own")
    group.add_argument("--negative_prompt")
    group.add_argument("--system_prompt", help='text before the prompt, "" for none')
    group.add_argument("--height", type=int)
    group.add_argument("--width", type=int)
    group.add_argument("--guidance_scale", type=float, help="0 for no guidance")
    group.add_argument("--num_inference_steps", type=int, help="of the residual diffusion, 0 for none")
    group.add_argument("--top_k", type=int)
    group.add_argument("--top_p", type=float)
    group.add_argument("--smooth", type=boolean, default=True, metavar="{true,false}")
    group.add_argument("--residual_temperature", type=float, default=1.0)
    return parser.parse_args(argv)


def load_pipeline(args: argparse.Namespace, device: torch.device) -> HARTPipeline:
    dtype = DTYPES[args.dtype or ("bf16" if device.type == "cuda" else "fp32")]
    pipe = DiffusionPipeline.from_pretrained(args.model, revision=args.revision, variant=args.variant, dtype=dtype)
    if not isinstance(pipe, HARTPipeline):
        raise ValueError(f"--model {args.model} is a {type(pipe).__name__}; a HARTPipeline is needed.")
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """What decides the pictures besides prompt and seed, as it is written into their files."""
    names = ("model", "revision", "variant", "dtype", *SETTINGS)
    return {name: getattr(args, name) for name in names}


def is_drawn(picture: Picture, settings: dict[str, Any]) -> bool:
    """Whether the file is there already; one of another prompt, seed or settings is an error."""
    if not picture.path.exists():
        return False
    with PIL.Image.open(picture.path) as image:
        drawn = json.loads(getattr(image, "text", {}).get("parameters", "{}"))
    expected = {"prompt": picture.prompt, "seed": picture.seed, **settings}
    for name, value in expected.items():
        if name not in drawn or drawn[name] != value:
            raise FileExistsError(
                f"{picture.path} was drawn with {name} {drawn.get(name)!r}, not {value!r}: choose another --output_dir, "
                "or the prompts and settings of the run that began this one."
            )
    return True


def save(image: PIL.Image.Image, picture: Picture, settings: dict[str, Any]) -> None:
    """Write a picture beside its place and move it there when it is whole."""
    text = PngInfo()
    text.add_text("prompt", picture.prompt)
    text.add_text("seed", str(picture.seed))
    text.add_text("parameters", json.dumps({"prompt": picture.prompt, "seed": picture.seed, **settings}))
    unfinished = picture.path.with_name(f"{picture.path.name}.unfinished")
    image.save(unfinished, format="PNG", pnginfo=text)
    unfinished.replace(picture.path)


class WorkNotes:
    """
    What each process is at, in files of its own, so that of a process that was killed the others, or whoever reads the
    folder, can say what it was drawing.
    """

    def __init__(self, output_dir: Path, process: int):
        self.output_dir = output_dir
        self.file = self._file(process)
        self.drawing = "nothing yet"

    def _file(self, process: int | str) -> Path:
        return self.output_dir / f"process-{process}.at-work"

    def write(self, batch: list[Picture]) -> None:
        self.drawing = ", ".join(map(str, batch))
        self.file.write_text(json.dumps({"pid": os.getpid(), "drawing": self.drawing}))

    def clear(self) -> None:
        self.file.unlink(missing_ok=True)

    def of_the_dead(self) -> list[str]:
        """A sentence for each process that ended in the middle of its work."""
        sentences = []
        for file in sorted(self.output_dir.glob(self._file("*").name)):
            try:
                note = json.loads(file.read_text())
                os.kill(note["pid"], 0)
            except ProcessLookupError:
                sentences.append(f"{file.stem.replace('-', ' ')} was killed while drawing {note['drawing']}")
            except (OSError, ValueError):
                continue  # gone, half written, or of another user: no news of its process
        return sentences


def draw(pipe: HARTPipeline, batch: list[Picture], args: argparse.Namespace) -> list[PIL.Image.Image]:
    """The pictures of a batch, each from a generator of its own."""
    generators = [torch.Generator().manual_seed(picture.seed) for picture in batch]
    settings = {name: getattr(args, name) for name in SETTINGS}
    return pipe([picture.prompt for picture in batch], generator=generators, **settings).images


def draw_share(
    pipe: HARTPipeline, batches: list[list[Picture]], args: argparse.Namespace, is_shown: bool, notes: WorkNotes
) -> None:
    """Draw the batches of a process and write them."""
    progress_bar = tqdm(total=sum(map(len, batches)), desc="Pictures", disable=not is_shown)
    for batch in batches:
        notes.write(batch)
        for image, picture in zip(draw(pipe, batch, args), batch):
            save(image, picture, settings_of(args))
            progress_bar.update()
    progress_bar.close()


def attempt(
    work: Callable[[], Any], state: PartialState, what: Callable[[], str]
) -> tuple[Any, dict[str, Any] | None]:
    """The result of some work, or what went wrong, told at once by the name of the process."""
    try:
        return work(), None
    except Exception as error:
        failure = {
            "process": state.process_index,
            "at": what(),
            "error": f"{type(error).__name__}: {error}",
            "exit_code": 1,
        }
        print(
            f"process {state.process_index} of {state.num_processes} failed while {failure['at']}, it will exit with "
            f"code 1: {failure['error']}\n{traceback.format_exc()}",
            file=sys.stderr,
            flush=True,
        )
        return None, failure


def stop_with_the_others(state: PartialState, notes: WorkNotes) -> None:
    """When the launcher stops this process because another one died, say what that one was at."""

    def stop(*_: Any) -> None:
        for sentence in notes.of_the_dead():
            print(f"{sentence}; process {state.process_index} stops with it", file=sys.stderr, flush=True)
        notes.clear()
        os._exit(128 + signal.SIGTERM)  # at once: what waits for a dead process would never return

    signal.signal(signal.SIGTERM, stop)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    args = parse_args(argv)
    on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    state = PartialState(on_cpu, timeout=timedelta(days=30))  # for those that are done before the others

    # 1. The pictures in the order of the prompts, and which of them are missing; all look before any of them draws
    prompts = [prompt for file in args.prompts for prompt in read_prompts(file, args.caption_column)]
    output_dir = Path(args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    repeated = [prompt for prompt in prompts for _ in range(args.num_images_per_prompt)]
    pictures = [
        Picture(output_dir / f"{number:06d}.png", prompt, args.seed + number) for number, prompt in enumerate(repeated)
    ]
    missing = [picture for picture in pictures if not is_drawn(picture, settings_of(args))]
    notes = WorkNotes(output_dir, state.process_index)
    if state.is_main_process:
        for sentence in notes.of_the_dead():
            print(f"in an earlier run, {sentence}", file=sys.stderr)
    state.wait_for_everyone()
    notes.clear()

    if state.num_processes > 1:
        stop_with_the_others(state, notes)

    # 2. Whole batches are split: what is drawn together does not depend on the number of processes
    batches = [missing[start : start + args.batch_size] for start in range(0, len(missing), args.batch_size)]
    with state.split_between_processes(list(range(len(batches)))) as share:
        own = [batches[number] for number in share]
    pipe = failure = None
    if own:
        pipe, failure = attempt(lambda: load_pipeline(args, state.device), state, lambda: "loading the pipeline")
    if pipe is not None:
        for _ in range(args.warmup_batches):
            draw(pipe, own[0], args)
    state.wait_for_everyone()

    # 3. Every process draws its share; one that fails leaves the others to theirs
    start = time.perf_counter()
    if pipe is not None:
        _, failure = attempt(
            lambda: draw_share(pipe, own, args, state.is_main_process, notes),
            state,
            lambda: f"drawing {notes.drawing}",
        )
    seconds = time.perf_counter() - start
    notes.clear()
    results = gather_object([{"seconds": seconds, "failure": failure}])

    # 4. The summary
    failures = [result["failure"] for result in results if result["failure"] is not None]
    there = [picture for picture in pictures if picture.path.exists()]
    num_drawn = len(missing) - (len(pictures) - len(there))
    seconds = max(result["seconds"] for result in results)
    summary = {
        "output_dir": str(output_dir),
        "pictures": len(pictures),
        "already_there": len(pictures) - len(missing),
        "drawn": num_drawn,
        "processes": state.num_processes,
        "batch_size": args.batch_size,
        "seconds": round(seconds, 3),
        "images_per_second": round(num_drawn / seconds, 3),
        "failures": failures,
    }
    if state.is_main_process:
        lines = [
            json.dumps({"file_name": picture.path.name, "text": picture.prompt, "seed": picture.seed})
            for picture in there
        ]
        unfinished = output_dir / "metadata.jsonl.unfinished"
        unfinished.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        unfinished.replace(output_dir / "metadata.jsonl")
        print(json.dumps(summary, indent=2) if args.json else describe(summary))
    state.wait_for_everyone()  # a launcher stops the others as soon as one ends with an error
    state.destroy_process_group()
    if failures:
        sys.exit(1)
    return summary


def describe(summary: dict[str, Any]) -> str:
    """The summary for people."""
    lines = [
        f"{summary['drawn']} pictures drawn by {summary['processes']} processes in {summary['seconds']} s, "
        f"{summary['images_per_second']} a second; {summary['already_there']} were there. All: {summary['output_dir']}"
    ]
    for failure in summary["failures"]:
        lines.append(
            f"process {failure['process']} failed while {failure['at']}, exit code {failure['exit_code']}: "
            f"{failure['error']}"
        )
    if summary["failures"]:
        lines.append("The same command draws the pictures that are missing.")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
