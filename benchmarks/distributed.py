# SPDX-License-Identifier: Apache-2.0
"""
Several GPUs of one host against one of them: training steps of the published configuration under DDP and FSDP 2 (samples
per second, peak memory of a GPU), losses of the same global batch on one GPU and on all, a checkpoint of FSDP 2 that DDP
goes on with, and pictures per second of examples/generate_distributed.py.

Weights are random and float32, the arithmetic bfloat16 by autocast, blocks compiled, codes and text computed beforehand,
token drop on. Each part is a launch of its own, and the others go on if it fails.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from accelerate import DistributedType, PartialState
from transformers import Qwen2Config, Qwen2Model

from diffusers_hart import (
    HARTPipeline,
    HARTResidualScheduler,
    HARTScheduler,
    HARTTransformer2DModel,
    HybridTokenizer,
    ResidualDiffusionMLP,
)
from diffusers_hart.random_pipeline import random_pipeline
from diffusers_hart.training import HARTTrainingModule, TeacherForcingTargets
from diffusers_hart.training.arguments import add_training_arguments
from diffusers_hart.training.checkpoints import resume_from_checkpoint, save_checkpoint
from diffusers_hart.training.train_loop import create_accelerator
from diffusers_hart.training.weight_updates import WeightUpdates


REPOSITORY = Path(__file__).parents[1]
KINDS = ("one", "fsdp2", "ddp")  # in this order: DDP goes on with what FSDP 2 saved


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num_gpus", type=int, help="by default all")
    parser.add_argument("--parts", nargs="+", choices=("train", "generate"), default=["train", "generate"])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, help="of training")
    parser.add_argument("--runs", nargs="+", default=["512:16", "1024:4"], help="size:batch of each GPU")
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=8)
    parser.add_argument("--equality_steps", type=int, default=10, help="of the comparison of losses")
    parser.add_argument("--equality_size", type=int, default=512)
    parser.add_argument("--equality_batch", type=int, default=16, help="its pictures a step, of all GPUs together")
    parser.add_argument("--num_images", type=int, default=192, help="to draw, on one GPU and on all alike")
    parser.add_argument("--generation_size", type=int, default=512)
    parser.add_argument("--generation_batch", type=int, default=8)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--part_seconds", type=int, default=170, help="after which a part counts as failed")
    parser.add_argument("--no_compile", action="store_true")
    parser.add_argument("--tiny", action="store_true", help="tiny models on two CPU processes, to try this file")
    parser.add_argument("--output", type=Path, default=Path("distributed.json"))
    parser.add_argument("--kind", choices=KINDS, help=argparse.SUPPRESS)  # of the launch that this process belongs to
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.tiny:
        args.runs, args.generation_size, args.no_compile = ["128:2", "64:2"], 128, True
        args.equality_size = 128
        args.equality_batch, args.num_images, args.generation_batch = 4, 12, 2
    if args.num_gpus is None:
        args.num_gpus = 2 if args.tiny else torch.cuda.device_count()
    return args


# --- One launch: training ----------------------------------------------------------------------------------------------


def scales_of(args, size):
    if args.tiny:
        return {128: (1, 2, 3, 4, 6, 8), 64: (1, 2, 3, 4)}[size]
    return HARTScheduler().scales(size // 16)


def new_module(args, size):
    torch.manual_seed(args.seed)  # the same weights in every process: FSDP 2 does not send them around
    if args.tiny:
        pipe = random_pipeline()
        transformer, residual_mlp, vae = pipe.transformer, pipe.residual_mlp, pipe.vae
    else:
        with torch.device("cuda"):
            transformer, residual_mlp, vae = HARTTransformer2DModel(), ResidualDiffusionMLP(), HybridTokenizer()
    if not args.no_compile:
        transformer.compile_repeated_blocks(dynamic=True)
        residual_mlp.compile_repeated_blocks(dynamic=True)
    parts = (transformer, residual_mlp, vae, HARTScheduler(), HARTResidualScheduler())
    return HARTTrainingModule(*parts, scales_of(args, size), args.seed).train()


def batch_of(module, positions, device, seed):
    """Random targets and text of samples, the same for a position in whichever process it is."""
    config, scales = module.transformer.config, module.scales
    tokens, side = sum(side * side for side in scales), scales[-1]
    rows = []
    for position in positions:
        generator = torch.Generator(device).manual_seed(seed * 1_000_003 + position)
        options = {"generator": generator, "device": device}
        rows.append(
            (
                torch.randn(tokens - 1, config.in_channels, **options),
                torch.randint(config.codebook_size, (tokens,), **options),
                torch.randn(side * side, config.in_channels, **options),
                torch.randn(config.caption_length, config.caption_channels, **options),
            )
        )
    scale_inputs, codes, last_scale, embeds = map(torch.stack, zip(*rows))
    mask = torch.zeros(embeds.shape[:2], dtype=torch.long, device=device)
    mask[:, :80] = 1
    return TeacherForcingTargets(scale_inputs, codes, last_scale), embeds, mask


class Training:
    """Steps of one training module under the accelerator of this launch."""

    def __init__(self, args, size):
        parser = argparse.ArgumentParser()
        add_training_arguments(parser)
        precision = "no" if args.tiny else "bf16"
        options = f"--output_dir {args.folder}/runs/{args.kind} --mixed_precision {precision} --learning_rate 1e-5"
        self.settings = parser.parse_args(options.split())
        if args.tiny and args.kind != "one":
            on_cpu = PartialState(cpu=True)
            if args.kind == "fsdp2":
                on_cpu.distributed_type = DistributedType.MULTI_GPU  # accelerate shards over nothing else
        self.args = args
        self.accelerator = create_accelerator(self.settings)
        self.hart = new_module(args, size).to(self.accelerator.device)
        self.weights = WeightUpdates(self.settings, self.accelerator, self.hart)

    def step(self, index, batch_size):
        """The mean loss of a step over all processes, of `batch_size` samples in each."""
        start = (index * self.accelerator.num_processes + self.accelerator.process_index) * batch_size
        positions = list(range(start, start + batch_size))
        targets, embeds, mask = batch_of(self.hart, positions, self.accelerator.device, self.args.seed)
        with self.accelerator.accumulate(self.weights.module):
            losses = self.weights.module(targets, index, positions, embeds, mask)
            self.weights.update(losses["loss"])
        return losses["loss"].detach()

    def mean(self, losses):
        return self.accelerator.reduce(torch.stack(losses), reduction="mean").tolist()

    def synchronize(self):
        if self.accelerator.device.type == "cuda":
            torch.cuda.synchronize()
        self.accelerator.wait_for_everyone()


def measure_steps(training, size, batch_size):
    args, is_cuda = training.args, training.accelerator.device.type == "cuda"
    training.hart.scales = scales_of(args, size)
    steps = range(args.warmup, args.warmup + args.repeats)
    for index in (
        *range(args.warmup),
        *steps,
    ):  # kernels are planned for each number of kept tokens: all are met first
        training.step(index, batch_size)
    training.synchronize()
    if is_cuda:
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    for index in steps:
        training.step(index, batch_size)
    training.synchronize()
    seconds = time.perf_counter() - start
    samples = batch_size * training.accelerator.num_processes * len(steps)
    row = {"size": size, "batch_size": batch_size, "seconds_per_step": round(seconds / len(steps), 4)}
    row["samples_per_second"] = round(samples / seconds, 3)
    if is_cuda:
        peak = torch.tensor([torch.cuda.max_memory_allocated() / 2**30], device=training.accelerator.device)
        row["peak_gib"] = [round(value, 1) for value in training.accelerator.gather(peak).tolist()]
        row["gpu"] = torch.cuda.get_device_name()
    return row


def train_part(args):
    training = Training(args, args.equality_size)
    accelerator, result = training.accelerator, {"runs": []}

    def keep():
        if accelerator.is_main_process:
            (args.folder / f"{args.kind}.json").write_text(json.dumps(result))

    # 1. The losses of one global batch, from fresh weights; FSDP 2 saves in the middle
    batch_size, half = args.equality_batch // accelerator.num_processes, args.equality_steps // 2
    losses = []
    for index in range(args.equality_steps):
        if index == half and args.kind == "fsdp2":
            save_checkpoint(accelerator, args.folder, half)
        losses.append(training.step(index, batch_size))
    result["losses"] = training.mean(losses)
    keep()
    checkpoint = args.folder / f"checkpoint-{half}"
    if args.kind == "ddp" and checkpoint.is_dir():
        resumed_at = resume_from_checkpoint(accelerator, args.folder, str(checkpoint))
        resumed = [training.step(index, batch_size) for index in range(resumed_at, args.equality_steps)]
        result["losses_after_fsdp2_checkpoint"] = training.mean(resumed)
        keep()

    # 2. Throughput
    for run in args.runs:
        size, batch_size = map(int, run.split(":"))
        try:
            row = measure_steps(training, size, batch_size)
        except torch.OutOfMemoryError:  # of all processes alike
            row = {"size": size, "batch_size": batch_size, "out_of_memory": True}
            training.weights.optimizer.zero_grad()
            torch.cuda.empty_cache()
        result["runs"].append(row)
        keep()
    accelerator.end_training()


# --- All launches ------------------------------------------------------------------------------------------------------


def launch(args, kind, script, arguments):
    """Run a script in one process or in all; its output, and why it failed if it did."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, [str(REPOSITORY / "src"), os.environ.get("PYTHONPATH")]))
    }
    if args.tiny:
        environment["ACCELERATE_USE_CPU"] = "true"
        environment["OMP_NUM_THREADS"] = "1"
    command = [sys.executable]
    if kind != "one":
        command += ["-m", "accelerate.commands.accelerate_cli", "launch", "--num_processes", str(args.num_gpus)]
        command += ["--config_file", str(REPOSITORY / "examples" / "accelerate" / f"{kind}.yaml")]
        command += ["--main_process_port", "0", "--mixed_precision", "no" if args.tiny else "bf16"]
    else:
        environment["CUDA_VISIBLE_DEVICES"] = environment.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    command += [str(script), *map(str, arguments)]
    start = time.perf_counter()
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        output, errors = process.communicate(timeout=args.part_seconds)
        failure = None if process.returncode == 0 else f"exit code {process.returncode}: {errors[-3000:]}"
    except subprocess.TimeoutExpired:
        process.terminate()
        try:
            output, errors = process.communicate(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()
            output, errors = process.communicate()
        failure = f"not done after {args.part_seconds} s: {errors[-3000:]}"
    print(
        f"{Path(script).name} {kind}: {time.perf_counter() - start:.0f} s{', FAILED' if failure else ''}", flush=True
    )
    return output, failure


def save_random_pipeline(args, folder):
    """The published sizes, with a small text encoder of the width they read."""
    pipe = random_pipeline()
    if not args.tiny:
        torch.manual_seed(args.seed)
        transformer = HARTTransformer2DModel()
        sizes = {"hidden_size": transformer.config.caption_channels, "intermediate_size": 1536, "num_hidden_layers": 2}
        heads = {"num_attention_heads": 12, "num_key_value_heads": 2}
        text_encoder = Qwen2Model(Qwen2Config(vocab_size=len(pipe.tokenizer), **sizes, **heads))
        pipe = HARTPipeline(
            tokenizer=pipe.tokenizer,
            text_encoder=text_encoder,
            transformer=transformer,
            vae=HybridTokenizer(),
            scheduler=HARTScheduler(),
            residual_mlp=ResidualDiffusionMLP(),
            residual_scheduler=HARTResidualScheduler(),
        ).to(torch.bfloat16)
    pipe.save_pretrained(folder)


def generate_part(args, folder):
    pipeline, prompts = folder / "pipeline", folder / "prompts.txt"
    save_random_pipeline(args, pipeline)
    prompts.write_text("\n".join(f"picture number {number}" for number in range(args.num_images)))
    results, failures = {}, {}
    for kind in ("one", "ddp"):
        arguments = ["--model", pipeline, "--prompts", prompts, "--output_dir", folder / f"pictures-{kind}", "--json"]
        arguments += ["--height", args.generation_size, "--width", args.generation_size, "--warmup_batches", 1]
        arguments += ["--batch_size", args.generation_batch]
        script = REPOSITORY / "examples" / "generate_distributed.py"
        output, failure = launch(args, kind, script, arguments)
        if failure is None:
            results[kind] = json.loads(output[output.index("{") :])
        else:
            failures[f"generate {kind}"] = failure
    return results, failures


def largest_difference(first, second):
    return max(abs(a - b) / abs(b) for a, b in zip(first, second))


def compare(trained, generated):
    """Ratios and differences to one GPU, as far as there is something to compare."""
    comparison = {}
    one = trained.get("one", {})
    for kind in ("ddp", "fsdp2"):
        for row in trained.get(kind, {}).get("runs", []):
            alone = [r for r in one.get("runs", []) if r["size"] == row["size"] and "samples_per_second" in r]
            if alone and "samples_per_second" in row:
                ratio = row["samples_per_second"] / alone[0]["samples_per_second"]
                comparison[f"training speed at {row['size']} px, {kind} / one GPU"] = round(ratio, 3)
        if "losses" in trained.get(kind, {}) and "losses" in one:
            difference = largest_difference(trained[kind]["losses"], one["losses"])
            comparison[f"largest relative difference of a loss, {kind} to one GPU"] = difference
    resumed = trained.get("ddp", {}).get("losses_after_fsdp2_checkpoint")
    if resumed and "losses" in trained.get("fsdp2", {}):
        whole = trained["fsdp2"]["losses"][-len(resumed) :]
        name = "largest relative difference of a loss, DDP from FSDP 2's checkpoint to FSDP 2 going on"
        comparison[name] = largest_difference(resumed, whole)
    if {"one", "ddp"} <= generated.keys():
        ratio = generated["ddp"]["images_per_second"] / generated["one"]["images_per_second"]
        comparison["generation speed, all / one GPU"] = round(ratio, 3)
    return comparison


def save_report(args, report, start):
    """After each part, so that a run that is cut off leaves what it has."""
    report["comparison"] = compare(report["training"], report["generation"])
    report["total_seconds"] = round(time.perf_counter() - start, 1)
    args.output.write_text(json.dumps(report, indent=1) + "\n")


def print_tables(report):
    print("\n| GPUs | size | batch a GPU | s/step | samples/s | peak GiB a GPU |\n|---|---|---|---|---|---|")
    for kind, result in report["training"].items():
        for row in result["runs"]:
            peak = ", ".join(map(str, row.get("peak_gib", [])))
            figures = [row.get("seconds_per_step", "out of memory"), row.get("samples_per_second", ""), peak]
            print(f"| {kind} | {row['size']} | {row['batch_size']} | {' | '.join(map(str, figures))} |")
    for kind, row in report["generation"].items():
        print(f"generation, {kind}: {row['images_per_second']} pictures/s, batches of {row['batch_size']}")
    for name, value in report["comparison"].items():
        print(f"{name}: {value:.3g}" if "difference" in name else f"{name}: {value}")
    for name, failure in report["failures"].items():
        print(f"FAILED: {name}: {failure}")


def main():
    args = parse_args()
    if args.kind is not None:
        train_part(args)
        return
    start = time.perf_counter()
    report = {"torch": torch.__version__, "num_gpus": args.num_gpus, "training": {}, "generation": {}, "failures": {}}
    if args.num_gpus < 2:
        sys.exit(f"Two GPUs or more are needed; there are {args.num_gpus}. --tiny runs on the CPU.")
    with tempfile.TemporaryDirectory() as folder:
        for kind in args.kinds if "train" in args.parts else ():
            _, failure = launch(args, kind, __file__, [*sys.argv[1:], "--kind", kind, "--folder", folder])
            if failure is not None:
                report["failures"][f"training {kind}"] = failure
            file = Path(folder) / f"{kind}.json"
            if file.exists():  # what was measured before a failure counts
                report["training"][kind] = json.loads(file.read_text())
            save_report(args, report, start)
        if "generate" in args.parts:
            try:
                report["generation"], failures = generate_part(args, Path(folder))
                report["failures"] |= failures
            except Exception as error:
                report["failures"]["generation"] = f"{type(error).__name__}: {error}"
    save_report(args, report, start)
    print_tables(report)
    if report["failures"]:
        sys.exit(1)


if __name__ == "__main__":
    main()
