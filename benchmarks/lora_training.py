# SPDX-License-Identifier: Apache-2.0
"""
Training steps of LoRA adapters on the published configuration (random weights): steps per second and peak memory, with
the text encoder on the card, which then reads the captions in each step, and with embeddings computed beforehand.

The frozen models are kept in bfloat16, the adapters in float32; the arithmetic is bfloat16 by autocast, with gradient
checkpointing. A step encodes its pictures, goes forward and backward, clips the gradient and makes an AdamW update; peak
memory is that of steps and includes everything on the card, the optimizer's state too.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
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
from diffusers_hart.training import drop_fraction, teacher_forcing_targets
from diffusers_hart.training.lora import TRANSFORMER_LAYERS, add_lora_adapter, lora_tensors
from diffusers_hart.training.lora_module import LoraTrainingModule
from diffusers_hart.training.token_drop import num_kept_tokens


# The text encoder of the published pipeline, by its configuration; and sizes for trying the script on a CPU.
TEXT_ENCODER = {
    "vocab_size": 151936,
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
}
TINY_TEXT_ENCODER = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
CAPTION = "a lighthouse at dusk, waves breaking on the rocks, painted in oil, wide view"
# The tokenizer makes a token of each letter. The published system prompt is not ours to ship; this stands in for it.
SYSTEM_PROMPT = "x" * 100


def build_pipeline(args):
    """Random weights in bfloat16, except for what is always kept in float32."""
    tiny = random_pipeline(args.seed)
    torch.manual_seed(args.seed)
    with torch.device(args.device):
        text_encoder = Qwen2Model(Qwen2Config(**(TINY_TEXT_ENCODER if args.tiny else TEXT_ENCODER)))
        pipe = HARTPipeline(
            tokenizer=None,
            text_encoder=None,
            transformer=tiny.transformer if args.tiny else HARTTransformer2DModel(),
            vae=tiny.vae if args.tiny else HybridTokenizer(),
            scheduler=tiny.scheduler if args.tiny else HARTScheduler(),
            residual_mlp=tiny.residual_mlp if args.tiny else ResidualDiffusionMLP(),
            residual_scheduler=HARTResidualScheduler(),
            system_prompt=SYSTEM_PROMPT,
        )
    for parameter in text_encoder.requires_grad_(False).eval().parameters():  # not its rotary frequencies
        parameter.data = parameter.data.to(torch.bfloat16)
    with tempfile.TemporaryDirectory() as folder:
        pipe.save_pretrained(folder)
        del pipe
        components = {"tokenizer": tiny.tokenizer, "text_encoder": text_encoder}
        pipe = HARTPipeline.from_pretrained(folder, **components, dtype=torch.bfloat16)
    for model in (pipe.residual_mlp, pipe.vae):
        model.requires_grad_(False)
    return pipe.to(args.device)


def measure(args, pipe, module, batch_size, token_drop, text_encoder_on_card):
    device_type = torch.device(args.device).type
    module.token_drop = token_drop
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=device_type == "cuda")
    side = module.scales[-1] * pipe.vae.spatial_factor
    generator = torch.Generator("cpu").manual_seed(args.seed)
    images = torch.rand(batch_size, 3, side, side, generator=generator).to(args.device, torch.bfloat16) * 2 - 1
    pipe.text_encoder.to(args.device)

    @torch.no_grad()
    def encode_captions():
        embeds, mask, _, _ = pipe.encode_prompt(
            [CAPTION] * batch_size, device=args.device, do_classifier_free_guidance=False
        )
        return {"prompt_embeds": embeds, "prompt_attention_mask": mask}

    text = encode_captions()
    if not text_encoder_on_card:
        pipe.text_encoder.to("cpu")

    def step(index):
        positions = list(range(index * batch_size, (index + 1) * batch_size))
        targets = teacher_forcing_targets(pipe.vae, module.scales, images=images)
        condition = encode_captions() if text_encoder_on_card else text
        with torch.autocast(device_type, torch.bfloat16):
            losses = module(targets, index, positions, **condition)
        losses["loss"].backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return losses["loss"].detach()

    # Attention kernels are planned anew for each number of kept tokens: all that occur are met before the clock runs.
    seen = set()
    for index in range(args.warmup + args.repeats):
        kept = num_kept_tokens(module.scales[-1] ** 2, drop_fraction(module.seed, index)) if token_drop else None
        if index < args.warmup or kept not in seen:
            step(index)
        seen.add(kept)
    if device_type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    times = []
    for index in range(args.warmup, args.warmup + args.repeats):
        start = time.perf_counter()
        loss = step(index)
        if device_type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    row = {
        "size": side,
        "batch_size": batch_size,
        "rank": args.rank,
        "token_drop": token_drop,
        "text_encoder_on_card": text_encoder_on_card,
        "seconds_per_step": round(statistics.mean(times), 4),
        "median_seconds": round(statistics.median(times), 4),
        "steps_per_second": round(len(times) / sum(times), 3),
        "final_loss": round(loss.item(), 3),
    }
    if device_type == "cuda":
        row["peak_allocated_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        row["peak_reserved_gib"] = round(torch.cuda.max_memory_reserved() / 2**30, 2)
    return row


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small models of 128 px, to try this script on a CPU")
    parser.add_argument("--size", type=int, default=1024)
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--no_gradient_checkpointing", action="store_true")
    parser.add_argument("--compile", action="store_true", help="compile the repeated blocks, with dynamic shapes")
    parser.add_argument("--warmup", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="JSON file for the rows of the table")
    args = parser.parse_args()

    pipe = build_pipeline(args)
    size = pipe.scheduler.config.schedules[-1][-1] * pipe.vae.spatial_factor if args.tiny else args.size
    add_lora_adapter(pipe.transformer, TRANSFORMER_LAYERS, args.rank, seed=args.seed)
    if not args.no_gradient_checkpointing:
        pipe.transformer.enable_gradient_checkpointing()
        pipe.residual_mlp.enable_gradient_checkpointing()
    if args.compile:
        pipe.transformer.compile_repeated_blocks(dynamic=True)
        pipe.residual_mlp.compile_repeated_blocks(dynamic=True)
    module = LoraTrainingModule(
        pipe.transformer,
        pipe.residual_mlp,
        pipe.vae,
        pipe.scheduler,
        pipe.residual_scheduler,
        pipe.scheduler.scales(size // pipe.vae.spatial_factor),
        args.seed,
    ).to(args.device)
    module.train()

    common = {
        "gradient_checkpointing": not args.no_gradient_checkpointing,
        "compile": args.compile,
        "adapter_megabytes": round(
            sum(tensor.numel() * 4 for tensor in lora_tensors(pipe.transformer).values()) / 1e6, 1
        ),
    }
    device_name = torch.cuda.get_device_name() if torch.device(args.device).type == "cuda" else "CPU"
    rows = []
    for batch_size in args.batch_sizes:
        for token_drop in (True, False):
            for text_encoder_on_card in (True, False):
                setting = (batch_size, token_drop, text_encoder_on_card)
                try:
                    row = measure(args, pipe, module, *setting)
                except torch.OutOfMemoryError:
                    names = ("batch_size", "token_drop", "text_encoder_on_card")
                    row = {**dict(zip(names, setting)), "out_of_memory": True}
                module.zero_grad(set_to_none=True)
                rows.append(common | row)
                print(rows[-1], flush=True)
                if args.output:
                    found = {"device": device_name, "torch": torch.__version__, "rows": rows}
                    args.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
