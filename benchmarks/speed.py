# SPDX-License-Identifier: Apache-2.0
"""
Speed and memory of generation: latency, images a second, peak memory and the time of each part, for sizes, batches and
ways to run, beside what the chip reaches in copies and matrix products. Prints as it goes and writes JSON and Markdown.

Weights are random in the published configuration, or those of a pipeline's folder (`--model`). Sections:

- `table`: every mode of `--modes` for every size and batch. A mode that fails gives a row that says why.
- `attention`, `decoder`: the kernels of the last scale's attention and the decoder, by themselves.
- `text`: the text encoder, of the published one's shape unless `--model` has its own.
- `profile`: the largest kernels of one call of the first mode, size and batch, and how long the device was idle.
- `scaling`: images a second and memory of the first mode over growing batches, until one does not fit; with a plot if
  matplotlib is there.
"""

import argparse
import copy
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from diffusers_hart import (
    HARTPipeline,
    HARTResidualScheduler,
    HARTScheduler,
    HARTTransformer2DModel,
    HybridTokenizer,
    ResidualDiffusionMLP,
)
from diffusers_hart.pipelines.hart.fast_path import measured_convolutions


SECTIONS = ("table", "attention", "decoder", "text", "profile", "scaling")
# Of one guided picture of the published configuration: linears, attention, residual MLP of 8 steps, decoder.
TERA_OPERATIONS = {1024: 26.5 + 17.7 + 4.8 + 6.5, 512: 6.9 + 1.2 + 1.2 + 1.6}


# 1. Clocks and ceilings


def is_cuda(args):
    return torch.device(args.device).type == "cuda"


def synchronize(args):
    if is_cuda(args):
        torch.cuda.synchronize()


def free_memory(args):
    gc.collect()
    if is_cuda(args):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def moment(args):
    """A point on the device's time line."""
    if not is_cuda(args):
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds_between(start, end):
    return end - start if isinstance(start, float) else start.elapsed_time(end) / 1000


def median_seconds(args, function, repeats=None):
    """Seconds of one call of `function`, the median over repeats after a warm-up."""
    for _ in range(args.warmup):
        function()
    times = []
    for _ in range(repeats or args.repeats):
        synchronize(args)
        start = moment(args)
        function()
        end = moment(args)
        synchronize(args)
        times.append(seconds_between(start, end))
    return statistics.median(times)


def measure_ceilings(args):
    """Bytes a second of a copy, read and written, and bf16 operations a second of a large product, on random data."""
    copied, side = (2**30, 8192) if is_cuda(args) else (2**26, 1024)
    source = torch.randn(copied // 4, device=args.device)
    target = torch.empty_like(source)
    copy = median_seconds(args, lambda: target.copy_(source), 20)
    left, right = (torch.randn(side, side, device=args.device, dtype=args.dtype) for _ in range(2))
    product = median_seconds(args, lambda: left @ right, 20)
    return {
        "copy_terabytes_per_second": round(2 * copied / copy / 1e12, 3),
        "product_teraflops": round(2 * side**3 / product / 1e12, 2),
    }


# 2. Pipelines and ways to run them


def save_random_pipeline(args, folder):
    torch.manual_seed(args.seed)
    transformer, residual_mlp, vae, schedule = {}, {}, {}, {}
    if args.tiny:
        transformer = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16, "caption_channels": 32}
        transformer |= {"caption_length": 12, "codebook_size": 640, "sample_size": 16}
        residual_mlp = {"condition_dim": 32, "hidden_size": 32, "num_layers": 2}
        vae = {"block_out_channels": (32, 32), "layers_per_block": 1, "codebook_size": 640}
        schedule = {"schedules": ((1, 2, 3, 4, 6, 8), (1, 2, 3, 4, 5, 6, 8, 10, 13, 16))}
    with torch.device(args.device):
        pipe = HARTPipeline(
            tokenizer=None,
            text_encoder=None,
            transformer=HARTTransformer2DModel(**transformer),
            vae=HybridTokenizer(**vae),
            scheduler=HARTScheduler(**schedule),
            residual_mlp=ResidualDiffusionMLP(**residual_mlp),
            residual_scheduler=HARTResidualScheduler(),
        )
    # Sharp enough for codes to be drawn with some certainty, as by a trained model.
    pipe.transformer.proj_out.weight.data.mul_(8)
    pipe.to(args.dtype).save_pretrained(folder)  # of half the size, to be loaded for each mode


def load(args):
    pipe = HARTPipeline.from_pretrained(args.model, tokenizer=None, text_encoder=None, dtype=args.dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(args.device)


def draw(args, pipe, size, batch_size, **options):
    config = pipe.transformer.config
    generator = torch.Generator("cpu").manual_seed(args.seed)
    embeds = torch.randn(batch_size, config.caption_length, config.caption_channels, generator=generator)
    mask = torch.ones(batch_size, config.caption_length, dtype=torch.long)
    mask[:, config.caption_length // 3 :] = 0
    return pipe(
        prompt_embeds=embeds.to(args.device),
        prompt_attention_mask=mask.to(args.device),
        height=size,
        generator=torch.Generator(args.device).manual_seed(args.seed),
        output_type="pt",
        **options,
    ).images


def eager(args, pipe, sizes, batch_sizes):
    pass


def compiled_blocks(args, pipe, sizes, batch_sizes):
    pipe.transformer.compile_repeated_blocks(fullgraph=True, backend=args.backend)
    pipe.residual_mlp.compile_repeated_blocks(fullgraph=True, backend=args.backend)


def fast_path(args, pipe, sizes, batch_sizes, options=None, scheduler=None, attention=None, fuse=False, **settings):
    if scheduler:
        pipe.scheduler = HARTScheduler.from_config(pipe.scheduler.config, **scheduler)
    if attention:
        pipe.transformer.set_attention_backend(attention)
    if fuse:
        pipe.transformer.fuse_qkv_projections()
    compile_options = {"backend": args.backend, **(options or {})} if settings.get("compile_models", True) else None
    pipe.enable_fast_path(sizes, batch_sizes, compile_options=compile_options, **settings)
    if pipe._fast_path is None:
        raise RuntimeError("the fast path is not available, see its warning")


def tf32(args, pipe, sizes, batch_sizes):
    torch.set_float32_matmul_precision("high")  # main() sets it back
    fast_path(args, pipe, sizes, batch_sizes)


def quantized(kind, args, pipe, sizes, batch_sizes):
    import torchao.quantization as torchao

    configs = {
        "fp8": torchao.Float8DynamicActivationFloat8WeightConfig,
        "int8": torchao.Int8DynamicActivationInt8WeightConfig,
        "int8-weights": torchao.Int8WeightOnlyConfig,
    }
    # The linears of the blocks, which do the work; heads stay in float32.
    torchao.quantize_(pipe.transformer.transformer_blocks, configs[kind]())
    fast_path(args, pipe, sizes, batch_sizes)


MODES = {
    "eager": eager,
    "blocks": compiled_blocks,
    "graphs": partial(fast_path, compile_models=False),
    "fast": fast_path,
    "fast-no-graphs": partial(fast_path, cuda_graphs=False),
    "fast-fused": partial(fast_path, fuse=True),
    "fast-autotune": partial(fast_path, options={"mode": "max-autotune-no-cudagraphs"}),
    "fast-cudnn": partial(fast_path, attention="_native_cudnn"),
    "fast-flash": partial(fast_path, attention="_native_flash"),
    "fast-tf32-head": tf32,
    "guidance-ends": partial(fast_path, scheduler={"guidance_interval": (0.0, 0.85)}),
    "pruned": partial(fast_path, scheduler={"kept_fractions": (0.5, 0.25)}),
    "fp8": partial(quantized, "fp8"),
    "int8": partial(quantized, "int8"),
    "int8-weights": partial(quantized, "int8-weights"),
}
DEFAULT_MODES = ("eager", "blocks", "graphs", "fast", "guidance-ends", "pruned")


# 3. The table


def time_parts(args, pipe, size, batch_size):
    """Median seconds of the parts of a call: each scale, the residual diffusion, decoding."""
    runs = []
    for _ in range(max(2, args.repeats // 2)):
        marks = []

        def mark(name, marks=marks):
            marks.append((name, moment(args)))

        def timed(name, function, mark=mark):
            def call(*arguments, **options):
                mark(f"before {name}")
                result = function(*arguments, **options)
                mark(name)
                return result

            return call

        plain = {name: getattr(pipe, name) for name in ("_generate_latents", "sample_residual", "_decode_latents")}
        try:
            for name, function in plain.items():
                setattr(pipe, name, timed(name, function))
            draw(args, pipe, size, batch_size, callback_on_step_end=lambda pipe, k, side, tensors: mark(k) or {})
        finally:
            for name in plain:
                delattr(pipe, name)
        synchronize(args)
        at = dict(marks)
        scales, start = [], at["before _generate_latents"]
        for k in range(pipe.num_timesteps):
            scales.append(seconds_between(start, at[k]))
            start = at[k]
        residual = 0.0
        if "sample_residual" in at:
            residual = seconds_between(at["before sample_residual"], at["sample_residual"])
            scales[-1] -= residual
        decode = seconds_between(at["before _decode_latents"], at["_decode_latents"])
        runs.append([*scales, residual, decode])
    *scales, residual, decode = (round(statistics.median(values), 5) for values in zip(*runs))
    return {"scales": scales, "scales_total": round(sum(scales), 5), "residual": residual, "decode": decode}


def measure(args, pipe, size, batch_size, ceilings):
    draw(args, pipe, size, batch_size)
    free_memory(args)
    seconds = median_seconds(args, lambda: draw(args, pipe, size, batch_size))
    row = {"seconds": round(seconds, 5), "images_per_second": round(batch_size / seconds, 3)}
    if is_cuda(args):
        row["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        row["reserved_gib"] = round(torch.cuda.max_memory_reserved() / 2**30, 2)
    work = TERA_OPERATIONS.get(size)
    if work and args.random_weights and not args.tiny:
        row["percent_of_product_ceiling"] = round(100 * work * batch_size / seconds / ceilings["product_teraflops"], 1)
    return row | {"parts": time_parts(args, pipe, size, batch_size)}


def reason(error):
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:160] if str(error).strip() else ''}"


def run_mode(args, mode, ceilings):
    """Rows of one mode. Preparing is timed with the first picture: that is what a user waits for."""
    rows, pipe = [], None
    for size in args.sizes:
        for batch_size in args.batch_sizes:
            row = {"mode": mode, "size": size, "batch_size": batch_size}
            try:
                pipe = None
                torch.compiler.reset()
                free_memory(args)
                torch.set_float32_matmul_precision("highest")
                pipe = load(args)
                synchronize(args)
                start = time.perf_counter()
                MODES[mode](args, pipe, (size,), (batch_size,))
                image = draw(args, pipe, size, batch_size)
                synchronize(args)
                row["first_image_seconds"] = round(time.perf_counter() - start, 2)
                row |= {"finite": bool(image.isfinite().all()), "image_std": round(image.float().std().item(), 4)}
                row |= measure(args, pipe, size, batch_size, ceilings)
            except Exception as error:
                row["failed"] = reason(error)
            rows.append(row)
            print(json.dumps(row), flush=True)
    return rows


def run_isolated(args, mode):
    """Rows of one mode from a process of its own, which no other mode's failure can reach."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "rows.json"
        command = [sys.executable, __file__, *sys.argv[1:], "--model", str(args.model), "--output", str(output)]
        command += ["--sections", "table", "--modes", mode, "--no-isolate"]
        if args.random_weights:
            command.append("--random_weights")
        code = subprocess.run(command).returncode
        if output.exists():
            return json.loads(output.read_text())["rows"]
        return [{"mode": mode, "failed": f"the process ended with {code}"}]


# 4. Parts by themselves


def compare(args, name, kinds, work=None):
    rows = []
    for kind, function in kinds.items():
        row = {"what": name, "kind": kind}
        try:
            seconds = median_seconds(args, function)
            row["seconds"] = round(seconds, 6)
            if work:
                row["teraflops"] = round(work / seconds / 1e12, 1)
        except Exception as error:
            row["failed"] = reason(error)
        rows.append(row)
        print(json.dumps(row), flush=True)
        free_memory(args)
    return rows


@torch.no_grad()
def attention_section(args):
    """The last scale's attention, keys and values being views of a cache as in generation."""
    pipe, rows = load(args), []
    config, heads = pipe.transformer.config, pipe.transformer.config.num_attention_heads
    head_dim = config.attention_head_dim
    backends = {
        "torch's choice": None,
        "cuDNN": SDPBackend.CUDNN_ATTENTION,
        "flash": SDPBackend.FLASH_ATTENTION,
        "memory-efficient": SDPBackend.EFFICIENT_ATTENTION,
    }
    for size in args.sizes:
        scales = pipe.scheduler.scales(size // pipe.vae_scale_factor)
        for batch_size in args.batch_sizes:
            queries = scales[-1] ** 2
            keys = config.caption_length + sum(side * side for side in scales[1:])

            def random(tokens, cached=0, batch_size=batch_size):
                shape = (2 * batch_size, tokens + cached, heads, head_dim)
                tensor = torch.randn(shape, device=args.device, dtype=args.dtype)
                return tensor[:, cached:].transpose(1, 2)

            query, key, value = random(queries), random(keys, 1000), random(keys, 1000)

            def attend(backend, query=query, key=key, value=value):
                if backend is None:
                    return F.scaled_dot_product_attention(query, key, value, scale=1 / head_dim)
                with sdpa_kernel(backend):
                    return F.scaled_dot_product_attention(query, key, value, scale=1 / head_dim)

            work = 4 * 2 * batch_size * queries * keys * heads * head_dim
            kinds = {name: partial(attend, backend) for name, backend in backends.items()}
            rows += compare(args, f"attention, {size} px, batch {batch_size}", kinds, work)
    return rows


@torch.no_grad()
def decoder_section(args):
    pipe, rows = load(args), []
    plain = pipe.vae.decoder
    last = copy.deepcopy(plain).to(memory_format=torch.channels_last)
    for size in args.sizes:
        side = size // pipe.vae_scale_factor
        for batch_size in args.batch_sizes:
            shape = (batch_size, plain.conv_in.in_channels, side, side)
            latents = torch.randn(shape, device=args.device).to(args.dtype)
            latents_last = latents.contiguous(memory_format=torch.channels_last)

            def searched(decoder, latents=latents_last):
                with measured_convolutions():
                    return decoder(latents)

            def one_by_one(decoder, latents=latents_last):
                return [decoder(latent) for latent in latents.split(1)]

            torch.compiler.reset()
            compiled, compiled_last, compiled_single = (
                torch.compile(decoder, dynamic=False, backend=args.backend) for decoder in (plain, last, last)
            )
            kinds = {
                "eager": partial(plain, latents),
                "eager, channels last": partial(last, latents_last),
                "compiled": partial(compiled, latents),
                "compiled, channels last": partial(compiled_last, latents_last),
                "compiled, channels last, cudnn.benchmark": partial(searched, compiled_last),
                "compiled, channels last, one by one": partial(one_by_one, compiled_single),
            }
            if args.backend == "inductor" and is_cuda(args):
                tuned = torch.compile(last, dynamic=False, mode="max-autotune-no-cudagraphs")
                kinds["autotuned, channels last"] = partial(tuned, latents_last)
            rows += compare(args, f"decoder, {size} px, batch {batch_size}", kinds)
    return rows


@torch.no_grad()
def text_section(args):
    if not args.random_weights:
        pipe = HARTPipeline.from_pretrained(args.model, dtype=args.dtype).to(args.device)
        kinds = {str(size): partial(pipe.encode_prompt, ["a red circle"] * size) for size in args.batch_sizes}
        return compare(args, "text encoder, by batch", kinds)
    from transformers import Qwen2Config, Qwen2Model

    # The shape of the published model's text encoder, 300 tokens behind a system prompt of 200.
    shape = {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28}
    shape |= {"num_attention_heads": 12, "num_key_value_heads": 2, "vocab_size": 151936}
    if args.tiny:
        shape |= {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    with torch.device(args.device):
        encoder = Qwen2Model(Qwen2Config(**shape)).to(args.dtype).eval()
    kinds = {}
    for batch_size in args.batch_sizes:
        tokens = torch.randint(1000, (batch_size, 500), device=args.device)
        mask = torch.zeros(batch_size, 1, 500, 500, device=args.device, dtype=args.dtype)
        kinds[str(batch_size)] = partial(encoder, input_ids=tokens, attention_mask=mask, use_cache=False)
    return compare(args, "text encoder, by batch", kinds)


# 5. Profile and scaling


def profile_section(args, rows=30):
    """The kernels of one call, largest first, and the share of its time in which the device ran none."""
    from torch.profiler import ProfilerActivity, profile

    mode, size, batch_size = args.modes[0], args.sizes[-1], args.batch_sizes[0]
    pipe = load(args)
    MODES[mode](args, pipe, (size,), (batch_size,))
    wall = median_seconds(args, lambda: draw(args, pipe, size, batch_size))
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if is_cuda(args) else [])
    with profile(activities=activities) as profiler:
        draw(args, pipe, size, batch_size)
        synchronize(args)
    events = profiler.key_averages()
    if is_cuda(args):
        events = [event for event in events if event.device_type == torch.autograd.DeviceType.CUDA]
        cost = {event.key: (event.self_device_time_total, event.count) for event in events}
    else:
        cost = {event.key: (event.self_cpu_time_total, event.count) for event in events}
    busy = sum(microseconds for microseconds, _ in cost.values()) / 1e6
    largest = sorted(cost.items(), key=lambda item: -item[1][0])[:rows]
    result = {
        "mode": mode,
        "size": size,
        "batch_size": batch_size,
        "seconds": round(wall, 5),
        "busy_seconds": round(busy, 5),
        "idle_percent": round(100 * max(0.0, 1 - busy / wall), 1),
        "launches": sum(count for _, count in cost.values()),
        "kernels": [
            {"name": name[:150], "milliseconds": round(microseconds / 1e3, 3), "count": count}
            for name, (microseconds, count) in largest
        ],
    }
    print(json.dumps({name: value for name, value in result.items() if name != "kernels"}), flush=True)
    return result


def scaling_section(args, ceilings):
    rows, mode = [], args.modes[0]
    for size in args.sizes:
        for batch_size in args.scaling_batch_sizes:
            row = {"mode": mode, "size": size, "batch_size": batch_size}
            try:
                torch.compiler.reset()
                free_memory(args)
                pipe = load(args)
                MODES[mode](args, pipe, (size,), (batch_size,))
                row |= measure(args, pipe, size, batch_size, ceilings)
            except Exception as error:
                row["failed"] = reason(error)
            pipe = None
            rows.append(row)
            print(json.dumps(row), flush=True)
            if "failed" in row:
                break
    return rows


def plot_scaling(rows, path):
    try:
        import matplotlib
    except ImportError:
        print("No plot: matplotlib is not installed.")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in rows if "failed" not in row]
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.5))
    for size in sorted({row["size"] for row in rows}):
        of_size = [row for row in rows if row["size"] == size]
        batches = [row["batch_size"] for row in of_size]
        axes[0].plot(batches, [row["images_per_second"] for row in of_size], marker="o", label=f"{size} px")
        axes[1].plot(batches, [row.get("peak_gib", 0) for row in of_size], marker="o", label=f"{size} px")
    for axis, label in zip(axes, ("images a second", "peak memory, GiB")):
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter("{x:.0f}")
        axis.set(xlabel="batch", ylabel=label, ylim=0)
        axis.grid(alpha=0.3)
        axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=150)


# 6. Output


def markdown(results):
    lines = [
        f"{results['device']}, torch {results['torch']}, {results['dtype']}; copies "
        f"{results['ceilings']['copy_terabytes_per_second']} TB/s, matrix products "
        f"{results['ceilings']['product_teraflops']} TFLOP/s.",
        "",
    ]
    for title in ("rows", "scaling"):
        if not results.get(title):
            continue
        lines += [
            "| mode | size | batch | seconds | images/s | peak | of the product ceiling | scales | residual | decode "
            "| first image |",
            "|---|---|---|---|---|---|---|---|---|---|---|",
        ]
        for row in results[title]:
            head = f"| {row['mode']} | {row.get('size', '-')} px | {row.get('batch_size', '-')} |"
            if "failed" in row:
                lines.append(f"{head} failed: {row['failed'].replace('|', '/')} | | | | | | | |")
                continue
            parts, memory = row["parts"], f"{row['peak_gib']} GiB" if "peak_gib" in row else "-"
            share = f"{row['percent_of_product_ceiling']} %" if "percent_of_product_ceiling" in row else "-"
            lines.append(
                f"{head} {row['seconds']:.4f} | {row['images_per_second']:.2f} | {memory} | {share} "
                f"| {parts['scales_total']:.4f} | {parts['residual']:.4f} | {parts['decode']:.4f} "
                f"| {row.get('first_image_seconds', '-')} s |"
            )
        lines.append("")
    if results.get("parts"):
        lines += ["| what | kind | seconds | TFLOP/s |", "|---|---|---|---|"]
        for row in results["parts"]:
            figures = f"failed: {row['failed']} |" if "failed" in row else f"{row['seconds']:.5f} |"
            lines.append(f"| {row['what']} | {row['kind']} | {figures} {row.get('teraflops', '-')} |")
        lines.append("")
    if results.get("profile"):
        profile = results["profile"]
        lines += [
            f"One call in mode `{profile['mode']}`, {profile['size']} px, batch {profile['batch_size']}: "
            f"{profile['seconds']:.4f} s, {profile['launches']} launches, idle {profile['idle_percent']} %.",
            "",
            "| kernel | ms | launches |",
            "|---|---|---|",
        ]
        lines += [
            f"| `{kernel['name'].replace('|', '/')}` | {kernel['milliseconds']} | {kernel['count']} |"
            for kernel in profile["kernels"]
        ]
    return "\n".join(lines) + "\n"


def save(args, results):
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(results, indent=1) + "\n")
        args.output.with_suffix(".md").write_text(markdown(results))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default=None, help="bfloat16 by default, on a CPU float32")
    parser.add_argument("--model", type=Path, help="folder of a pipeline, instead of random weights")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, to try this script")
    parser.add_argument("--sizes", type=int, nargs="+", help="512 and 1024 by default, or all that the model draws")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--modes", nargs="+", choices=[*MODES, "all"], default=list(DEFAULT_MODES))
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=["table"])
    parser.add_argument("--scaling_batch_sizes", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64, 128])
    parser.add_argument("--backend", default="inductor", help="of torch.compile")
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--isolate", action=argparse.BooleanOptionalAction, help="each mode in a process of its own")
    parser.add_argument("--random_weights", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, help="JSON file; a Markdown file is written beside it")
    args = parser.parse_args()
    args.dtype = getattr(torch, args.dtype or ("bfloat16" if is_cuda(args) else "float32"))
    args.modes = list(MODES) if "all" in args.modes else args.modes

    with tempfile.TemporaryDirectory() as folder:
        if args.model is None:
            args.model, args.random_weights = Path(folder), True
            save_random_pipeline(args, folder)
        if args.sizes is None:
            pipe = load(args)
            sizes = [schedule[-1] * pipe.vae_scale_factor for schedule in pipe.scheduler.config.schedules]
            args.sizes = [size for size in sizes if size != 256] if args.random_weights else sizes
            del pipe
        results = {
            "device": torch.cuda.get_device_name() if is_cuda(args) else f"CPU, {torch.get_num_threads()} thread(s)",
            "torch": torch.__version__,
            "dtype": str(args.dtype).removeprefix("torch."),
            "ceilings": measure_ceilings(args),
        }
        print(json.dumps(results), flush=True)
        sections = {
            "attention": ("parts", partial(attention_section, args)),
            "decoder": ("parts", partial(decoder_section, args)),
            "text": ("parts", partial(text_section, args)),
            "profile": ("profile", partial(profile_section, args)),
            "scaling": ("scaling", partial(scaling_section, args, results["ceilings"])),
        }
        for section in args.sections:
            free_memory(args)
            if section == "table":
                for mode in args.modes:
                    mode_rows = run_isolated(args, mode) if args.isolate else run_mode(args, mode, results["ceilings"])
                    results["rows"] = results.get("rows", []) + mode_rows
                    save(args, results)
                continue
            key, run = sections[section]
            try:
                found = run()
            except Exception as error:
                print(f"{section} failed: {reason(error)}", flush=True)
                continue
            results[key] = results.get(key, []) + found if key == "parts" else found
            save(args, results)
        if "scaling" in results and args.output:
            plot_scaling(results["scaling"], args.output.with_suffix(".png"))
    print(markdown(results))


if __name__ == "__main__":
    main()
