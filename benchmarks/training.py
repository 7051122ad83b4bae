# SPDX-License-Identifier: Apache-2.0
"""
Training steps of the published configuration (random weights, codes and text computed beforehand): steps per second,
peak memory and model FLOP utilisation, with and without token drop, and the share that encoding the pictures would add.

Weights are float32, the arithmetic bfloat16 by autocast, the optimizer fused AdamW. FLOPs are those of the matrix
products of forward and backward pass, attention counted as block-causal as it is, recomputation not counted.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch

from diffusers_hart import (
    HARTResidualScheduler,
    HARTScheduler,
    HARTTransformer2DModel,
    HybridTokenizer,
    ResidualDiffusionMLP,
)
from diffusers_hart.training import HARTTrainingModule, TeacherForcingTargets, drop_fraction, teacher_forcing_targets
from diffusers_hart.training.token_drop import num_kept_tokens


def step_flops(module, text_tokens, kept_last):
    """FLOPs of forward and backward pass for one sample of which `kept_last` tokens of the last scale are left."""
    transformer, mlp = module.transformer, module.residual_mlp
    segments = [text_tokens, *(side * side for side in module.scales[1:-1]), kept_last]
    tokens = sum(segments)
    block_weights = sum(p.numel() for p in transformer.transformer_blocks.parameters() if p.ndim == 2)
    forward = 2 * block_weights * tokens
    forward += 2 * transformer.proj_out.weight.numel() * (tokens - text_tokens + 1)
    keys = 0
    for segment in segments:
        keys += segment
        forward += 4 * transformer.inner_dim * segment * keys * len(transformer.transformer_blocks)
    forward += (
        2 * sum(p.numel() for p in mlp.parameters() if p.ndim == 2) * kept_last * module.residual_batch_multiplier
    )
    return 3 * forward


def random_batch(args, module, batch_size):
    generator = torch.Generator(args.device).manual_seed(args.seed)
    config, side = module.transformer.config, module.scales[-1]
    tokens = sum(side * side for side in module.scales)

    def normal(*shape):
        return torch.randn(shape, generator=generator, device=args.device)

    targets = TeacherForcingTargets(
        scale_inputs=normal(batch_size, tokens - 1, config.in_channels),
        codes=torch.randint(config.codebook_size, (batch_size, tokens), generator=generator, device=args.device),
        last_scale=normal(batch_size, side * side, config.in_channels),
    )
    mask = torch.zeros(batch_size, config.caption_length, dtype=torch.long, device=args.device)
    mask[:, :80] = 1
    return targets, normal(batch_size, config.caption_length, config.caption_channels), mask


def measure(args, module, size, batch_size, token_drop, checkpointing):
    module.scales = HARTScheduler().scales(size // 16)
    module.token_drop = token_drop
    if checkpointing:
        module.transformer.enable_gradient_checkpointing()
    else:
        module.transformer.disable_gradient_checkpointing()
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-5, betas=(0.9, 0.95), fused=args.device == "cuda")
    targets, embeds, mask = random_batch(args, module, batch_size)
    device_type = torch.device(args.device).type

    def step(index):
        positions = list(range(index * batch_size, (index + 1) * batch_size))
        with torch.autocast(device_type, torch.bfloat16):
            losses = module(targets, index, positions, embeds, mask)
        losses["loss"].backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return losses["loss"].detach()

    # Attention kernels are planned anew for each number of kept tokens: all that occur are met before the clock runs.
    start, seen = time.perf_counter(), set()
    for index in range(args.warmup + args.repeats):
        kept = num_kept_tokens(module.scales[-1] ** 2, drop_fraction(module.seed, index)) if token_drop else None
        if index < args.warmup or kept not in seen:
            step(index)
        seen.add(kept)
    warmup_seconds = time.perf_counter() - start
    if device_type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    times, flops, fractions = [], [], []
    for index in range(args.warmup, args.warmup + args.repeats):
        start = time.perf_counter()
        loss = step(index)
        if device_type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
        fraction = drop_fraction(module.seed, index) if token_drop else 0.0
        kept = num_kept_tokens(module.scales[-1] ** 2, fraction)
        flops.append(batch_size * step_flops(module, embeds.shape[1], kept))
        fractions.append(fraction)
    row = {
        "size": size,
        "batch_size": batch_size,
        "token_drop": token_drop,
        "mean_drop_fraction": round(statistics.mean(fractions), 3),
        "gradient_checkpointing": checkpointing,
        "warmup_seconds": round(warmup_seconds, 1),
        "seconds_per_step": round(statistics.mean(times), 4),
        "median_seconds": round(statistics.median(times), 4),
        "samples_per_second": round(batch_size * len(times) / sum(times), 3),
        "tflops_per_second": round(sum(flops) / sum(times) / 1e12, 1),
        "mfu_percent": round(100 * sum(flops) / sum(times) / (args.peak_tflops * 1e12), 1),
        "final_loss": round(loss.item(), 3),
    }
    if device_type == "cuda":
        row["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 1)
    return row


def measure_encoding(args, vae, size, batch_size):
    scales = HARTScheduler().scales(size // 16)
    images = torch.rand(batch_size, 3, size, size, device=args.device, dtype=torch.bfloat16) * 2 - 1
    times = []
    for index in range(args.warmup + args.repeats):
        start = time.perf_counter()
        teacher_forcing_targets(vae, scales, images=images)
        if torch.device(args.device).type == "cuda":
            torch.cuda.synchronize()
        if index >= args.warmup:
            times.append(time.perf_counter() - start)
    return {"size": size, "batch_size": batch_size, "encoding_seconds": round(statistics.median(times), 4)}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument(
        "--runs", nargs="+", default=["512:16", "1024:4"], help="size:batch, with :gc for checkpointing"
    )
    parser.add_argument("--warmup", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=12)
    parser.add_argument("--compile", action="store_true", help="compile the repeated blocks, with dynamic shapes")
    parser.add_argument("--attention_backend", help="a backend of diffusers, such as _native_cudnn")
    parser.add_argument("--peak_tflops", type=float, default=790.0, help="what the chip reaches in bf16 products")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()

    with torch.device(args.device):
        vae = HybridTokenizer().to(torch.bfloat16).requires_grad_(False).eval()
        transformer, residual_mlp = HARTTransformer2DModel(), ResidualDiffusionMLP()
    if args.attention_backend:
        transformer.set_attention_backend(args.attention_backend)
    if args.compile:
        transformer.compile_repeated_blocks(dynamic=True)
        residual_mlp.compile_repeated_blocks(dynamic=True)
    scheduler = HARTScheduler()
    module = HARTTrainingModule(
        transformer, residual_mlp, vae, scheduler, HARTResidualScheduler(), scheduler.scales(64), args.seed
    ).to(args.device)
    module.train()

    rows = []
    for run in args.runs:
        size, batch_size, *flags = run.split(":")
        for token_drop in (False, True):
            try:
                row = measure(args, module, int(size), int(batch_size), token_drop, "gc" in flags)
            except torch.OutOfMemoryError:
                row = {
                    "size": int(size),
                    "batch_size": int(batch_size),
                    "token_drop": token_drop,
                    "out_of_memory": True,
                }
            module.zero_grad(set_to_none=True)
            rows.append({"compile": args.compile, "attention_backend": args.attention_backend, **row})
            print(rows[-1], flush=True)
        rows.append(measure_encoding(args, vae, int(size), int(batch_size)))
        print(rows[-1], flush=True)
    if args.output:
        args.output.write_text(json.dumps({"torch": torch.__version__, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
