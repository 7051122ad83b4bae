# SPDX-License-Identifier: Apache-2.0
"""
What each memory feature costs and saves, on the published configuration with random weights, text encoder included:
seconds a picture, peak memory, and how far the picture is from the one without the feature.

Every row is a pipeline loaded anew, warmed up by one picture. Seconds are the median of calls, text encoding included.
Peak memory is what torch's allocator held at most in these calls, weights included; `between calls` is what it holds
after them, `reserved` what it took from the device, CUDA graphs' memory included. Models are bfloat16 and pictures 1024
px, with the scheduler's guidance of 4.5 and 8 residual steps.

Pictures are compared with those of the row `plain`, or `plain-4` where four are drawn, of the same seed. Random weights
are unsure of the codes, so that rounding alone draws other ones: the comparison is made once more without smoothing and
with the codes of the plain row forced upon the other, which shows what the feature does to the numbers.
"""

import argparse
import gc
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import diffusers
import torch
import transformers
from diffusers import BitsAndBytesConfig, PipelineQuantizationConfig, QuantoConfig, TorchAoConfig
from diffusers.utils import is_bitsandbytes_available, is_optimum_quanto_available, is_torchao_available
from full_size import RecordingScheduler, psnr
from lora_training import CAPTION, build_pipeline
from speed import free_memory, is_cuda, reason, synchronize

from diffusers_hart import HARTPipeline


# 1. Features: each loads the pipeline and switches one on


def save_random_pipeline(args):
    pipe = build_pipeline(args)
    if not args.tiny:  # sharp enough for codes to be drawn with some certainty, as by a trained model
        pipe.transformer.proj_out.weight.data.mul_(8)
    pipe.save_pretrained(args.folder)
    return pipe.scheduler.config.schedules[-1][-1] * pipe.vae.spatial_factor


def load(args, **options):
    pipe = HARTPipeline.from_pretrained(args.folder, dtype=torch.bfloat16, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def plain(args, **options):
    return load(args, **options).to(args.device)


def device_map(args):
    return load(args, device_map=args.device)


def accelerate_offload(method, args):
    pipe = load(args)
    getattr(pipe, method)(device=args.device)
    return pipe


def group_offload(args, to_disk=False, **options):
    if to_disk:
        options["offload_to_disk_path"] = args.folder / "offloaded"
    pipe = load(args)
    pipe.enable_group_offload(torch.device(args.device), **options)
    return pipe


def layerwise_casting(args):
    pipe = plain(args)
    pipe.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
    return pipe


def slicing(args):
    pipe = plain(args)
    pipe.vae.enable_slicing()
    return pipe


def tiling(args):
    pipe = plain(args)
    pipe.vae.enable_tiling(args.size // 2, args.size * 3 // 8)  # the defaults, at 1024 px
    return pipe


def torchao_int8():
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


def quanto_int8():
    return QuantoConfig(weights_dtype="int8")


def bitsandbytes_4bit():
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)


def quantized(make_config, args):
    mapping = {name: make_config() for name in ("transformer", "residual_mlp")}
    return plain(args, quantization_config=PipelineQuantizationConfig(quant_mapping=mapping))


def fused_projections(args):
    pipe = plain(args)
    pipe.transformer.fuse_qkv_projections()
    return pipe


def compiled_blocks(args):
    pipe = plain(args)
    pipe.transformer.compile_repeated_blocks(fullgraph=True, backend=args.backend)
    return pipe


def fast_path(args):
    pipe = plain(args)
    pipe.enable_fast_path(args.size, compile_options={"backend": args.backend})
    if pipe._fast_path is None:
        raise RuntimeError("the fast path is not available, see its warning")
    return pipe


@dataclass
class Feature:
    prepare: Callable
    reference: str = "plain"
    batch_size: int = 1
    text_beforehand: bool = False  # and the text encoder dropped
    needs_cuda: bool = False
    package: tuple[str, Callable[[], bool]] | None = None


block_offload = partial(group_offload, offload_type="block_level", num_blocks_per_group=1)
# Those that compile take longest, and come last for a run that is cut off.
FEATURES = {
    "plain": Feature(plain),
    "device-map": Feature(device_map),
    "embeddings": Feature(plain, text_beforehand=True),
    "model-offload": Feature(partial(accelerate_offload, "enable_model_cpu_offload")),
    "sequential-offload": Feature(partial(accelerate_offload, "enable_sequential_cpu_offload"), needs_cuda=True),
    "group-blocks": Feature(block_offload),
    "group-blocks-stream": Feature(partial(block_offload, use_stream=True), needs_cuda=True),
    "group-leaves-stream": Feature(
        partial(group_offload, offload_type="leaf_level", use_stream=True), needs_cuda=True
    ),
    "group-disk": Feature(partial(block_offload, to_disk=True)),
    "fp8-storage": Feature(layerwise_casting),
    "torchao-int8": Feature(partial(quantized, torchao_int8), package=("torchao", is_torchao_available)),
    "quanto-int8": Feature(partial(quantized, quanto_int8), package=("optimum-quanto", is_optimum_quanto_available)),
    "bitsandbytes-4bit": Feature(
        partial(quantized, bitsandbytes_4bit),
        needs_cuda=True,
        package=("bitsandbytes", is_bitsandbytes_available),
    ),
    "tiling": Feature(tiling),
    "plain-4": Feature(plain, reference="plain-4", batch_size=4),
    "slicing-4": Feature(slicing, reference="plain-4", batch_size=4),
    "fused-projections": Feature(fused_projections),
    "compiled-blocks": Feature(compiled_blocks),
    "fast-path": Feature(fast_path),
}


# 2. Measuring one


def draw(args, pipe, text, batch_size, **options):
    return pipe(
        **text,
        num_images_per_prompt=batch_size,
        height=args.size,
        generator=torch.Generator(args.device).manual_seed(args.seed),
        output_type="pt",
        **options,
    ).images


def draw_with_codes(args, pipe, text, batch_size, codes):
    """A picture of the given codes, or of those it draws, if none are given; and these codes."""
    scheduler = pipe.scheduler
    pipe.scheduler = RecordingScheduler(**scheduler.config)
    if codes is not None:
        pipe.scheduler.replay, pipe.scheduler.codes = True, codes
    images = draw(args, pipe, text, batch_size, smooth=False).float().cpu()
    codes, pipe.scheduler = pipe.scheduler.codes, scheduler
    return images, codes


def difference(images, reference):
    largest = (images - reference).abs().max().item()
    # An infinite one is no JSON.
    return {"max_difference": round(largest, 5), "psnr_db": round(psnr(images, reference), 2) if largest else None}


def gibibytes(count):
    return round(count / 2**30, 2)


def measure(args, name, references):
    feature, row = FEATURES[name], {}
    start = time.perf_counter()
    pipe, text = feature.prepare(args), {"prompt": CAPTION}
    if feature.text_beforehand:
        with torch.no_grad():
            encoded = pipe.encode_prompt(CAPTION)
        names = ("prompt_embeds", "prompt_attention_mask", "negative_prompt_embeds", "negative_prompt_attention_mask")
        text = dict(zip(names, encoded))
        pipe.text_encoder = None
    first = draw(args, pipe, text, feature.batch_size).cpu()
    row["first_image_seconds"] = round(time.perf_counter() - start, 2)
    free_memory(args)

    times = []
    while len(times) < args.repeats and sum(times) < args.row_seconds:
        start = time.perf_counter()
        images = draw(args, pipe, text, feature.batch_size)
        synchronize(args)
        times.append(time.perf_counter() - start)
    images = images.cpu()  # so that between calls there is none on the device
    row |= {"seconds": round(statistics.median(times), 4), "repeats": len(times)}
    if is_cuda(args):
        row["peak_gib"] = gibibytes(torch.cuda.max_memory_allocated())
        row["between_calls_gib"] = gibibytes(torch.cuda.memory_allocated())
        row["reserved_gib"] = gibibytes(torch.cuda.max_memory_reserved())
    row["finite"] = bool(images.isfinite().all())
    row["repeats_itself"] = bool(torch.equal(images, first))

    images = images.float()
    if name == feature.reference:
        references[name] = (images, *draw_with_codes(args, pipe, text, feature.batch_size, None))
    elif feature.reference in references and row["finite"]:
        expected, expected_with_codes, codes = references[feature.reference]
        row |= difference(images, expected)
        if row["max_difference"]:
            images, _ = draw_with_codes(args, pipe, text, feature.batch_size, codes)
            row["same_codes"] = difference(images, expected_with_codes)
    return row


def reason_to_skip(args, feature):
    if feature.needs_cuda and not is_cuda(args):
        return "needs a GPU"
    if feature.package is not None and not feature.package[1]():
        return f"{feature.package[0]} is not installed"
    return None


# 3. The table


def run(args, name, references):
    row = {"feature": name, "batch_size": FEATURES[name].batch_size}
    if skipped := reason_to_skip(args, FEATURES[name]):
        return row | {"skipped": skipped}
    torch.compiler.reset()
    free_memory(args)
    if is_cuda(args):
        row["left_by_others_gib"] = gibibytes(torch.cuda.memory_allocated())
    try:
        return row | measure(args, name, references)
    except Exception as error:
        return row | {"failed": reason(error)}


def difference_cells(row):
    if "max_difference" not in row:
        return "- | -"
    if row["psnr_db"] is None:
        return "none | -"
    return f"{row['max_difference']} | {row['psnr_db']} dB"


def markdown(results):
    lines = [
        f"{results['device']}, torch {results['torch']}, diffusers {results['diffusers']}, transformers "
        f"{results['transformers']}; {results['size']} px, bfloat16.",
        "",
        "| feature | pictures | seconds | peak | between calls | reserved | first picture | repeats itself "
        "| difference | PSNR | difference, same codes | PSNR, same codes |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in results["rows"]:
        head = f"| `{row['feature']}` | {row['batch_size']} |"
        if why := [f"{word}: {row[word]}" for word in ("failed", "skipped") if word in row]:
            lines.append(f"{head} {why[0].replace('|', '/')} | | | | | | | | | |")
            continue
        kinds = ("peak_gib", "between_calls_gib", "reserved_gib")
        memory = " | ".join(f"{row[kind]} GiB" if kind in row else "" for kind in kinds)
        repeats = ("yes" if row["repeats_itself"] else "no") if row["finite"] else "not finite"
        lines.append(
            f"{head} {row['seconds']:.3f} | {memory} | {row['first_image_seconds']} s | {repeats} "
            f"| {difference_cells(row)} | {difference_cells(row.get('same_codes', {}))} |"
        )
    return "\n".join(lines) + "\n"


def save(args, results):
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(results, indent=1) + "\n")
        args.output.with_suffix(".md").write_text(markdown(results))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true", help="small models of 128 px, to try this script on a CPU")
    parser.add_argument("--size", type=int, default=1024)
    parser.add_argument(
        "--rows",
        nargs="+",
        choices=FEATURES,
        default=list(FEATURES),
        metavar="NAME",
        help=f"some of {', '.join(FEATURES)}; what they are compared with is added",
    )
    parser.add_argument("--backend", default="inductor", help="of torch.compile")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--row_seconds", type=float, default=10, help="after which a row draws no more pictures")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="JSON file; a Markdown file is written beside it")
    args = parser.parse_args()

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    references = {FEATURES[name].reference for name in args.rows}
    with tempfile.TemporaryDirectory() as folder:
        args.folder = Path(folder)
        trained_size = save_random_pipeline(args)
        args.size = trained_size if args.tiny else args.size
        results = {
            "device": torch.cuda.get_device_name() if is_cuda(args) else f"CPU, {torch.get_num_threads()} thread(s)",
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "transformers": transformers.__version__,
            "size": args.size,
            "rows": [],
        }
        drawn = {}
        for name in FEATURES:
            if name in args.rows or name in references:
                results["rows"].append(run(args, name, drawn))
                print(json.dumps(results["rows"][-1]), flush=True)
                save(args, results)
                gc.collect()
    print(markdown(results))


if __name__ == "__main__":
    main()
