# SPDX-License-Identifier: Apache-2.0
"""
The published configuration with random weights: time, peak memory and agreement of the low precisions with float32.

The text encoder is left out: prompts are random embeddings. For the agreement the codes that float32 drew are forced
upon the other precisions, so that the pictures are comparable.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch

from diffusers_hart import (
    HARTPipeline,
    HARTResidualScheduler,
    HARTScheduler,
    HARTTransformer2DModel,
    HybridTokenizer,
    ResidualDiffusionMLP,
)
from diffusers_hart.schedulers import HARTSchedulerOutput


class RecordingScheduler(HARTScheduler):
    """Writes down the codes it draws, or, once told to replay, repeats them."""

    def __init__(self, **config):
        super().__init__(**config)
        self.codes = []
        self.replay = False

    def step(self, logits, scale_index, *args, **kwargs):
        output = super().step(logits, scale_index, *args, **kwargs)
        if self.replay:  # having drawn all the same, so that the residual gets the same noise
            return HARTSchedulerOutput(codes=self.codes[scale_index])
        self.codes.append(output.codes)
        return output


def save_random_pipeline(folder, device, seed):
    torch.manual_seed(seed)
    with torch.device(device):
        pipe = HARTPipeline(
            tokenizer=None,
            text_encoder=None,
            transformer=HARTTransformer2DModel(),
            vae=HybridTokenizer(),
            scheduler=HARTScheduler(),
            residual_mlp=ResidualDiffusionMLP(),
            residual_scheduler=HARTResidualScheduler(),
        )
    # Sharp enough for codes to be drawn with some certainty, as by a trained model.
    pipe.transformer.proj_out.weight.data.mul_(8)
    pipe.save_pretrained(folder)


def load(folder, device, dtype):
    pipe = HARTPipeline.from_pretrained(folder, tokenizer=None, text_encoder=None, dtype=dtype).to(device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def arguments(pipe, size, batch_size, device, seed):
    generator = torch.Generator("cpu").manual_seed(seed)
    config = pipe.transformer.config
    embeds = torch.randn(batch_size, config.caption_length, config.caption_channels, generator=generator)
    mask = torch.ones(batch_size, config.caption_length, dtype=torch.long)
    mask[:, config.caption_length // 3 :] = 0
    return {
        "prompt_embeds": embeds.to(device),
        "prompt_attention_mask": mask.to(device),
        "height": size,
        "generator": torch.Generator(device).manual_seed(seed),
    }


def synchronize(device):
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


def psnr(image, reference):
    return (-10 * (image - reference).square().mean().log10()).item()


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--sizes", type=int, nargs="+", default=[512, 1024])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float16"])
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="JSON file for the rows of the table")
    args = parser.parse_args()

    rows, references = [], {}
    with tempfile.TemporaryDirectory() as folder:
        save_random_pipeline(folder, args.device, args.seed)
        for name in ["float32", *args.dtypes]:
            pipe = load(folder, args.device, getattr(torch, name))
            scheduler = pipe.scheduler
            for size in args.sizes:

                def draw(pipe=pipe, size=size, **options):
                    inputs = arguments(pipe, size, args.batch_size, args.device, args.seed)
                    return pipe(**inputs, **options, output_type="pt").images

                row = {"dtype": name, "size": size, "batch_size": args.batch_size}
                pipe.scheduler = RecordingScheduler()
                if name == "float32":
                    references[size] = (draw(smooth=False).cpu(), pipe.scheduler.codes)
                else:
                    pipe.scheduler.replay, pipe.scheduler.codes = True, references[size][1]
                    row["psnr_to_float32_db"] = round(psnr(draw(smooth=False).float().cpu(), references[size][0]), 2)
                pipe.scheduler = scheduler

                for _ in range(args.warmup):
                    draw()
                synchronize(args.device)
                if torch.device(args.device).type == "cuda":
                    torch.cuda.empty_cache()
                    torch.cuda.reset_peak_memory_stats()
                times = []
                for _ in range(args.repeats):
                    start = time.perf_counter()
                    image = draw()
                    synchronize(args.device)
                    times.append(time.perf_counter() - start)
                row["seconds"] = round(statistics.median(times), 4)
                if torch.device(args.device).type == "cuda":
                    row["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
                row["finite"] = bool(image.isfinite().all())
                row["image_std"] = round(image.float().std().item(), 4)
                rows.append(row)
                print(row, flush=True)
            del pipe, draw

    if args.output:
        device_name = torch.cuda.get_device_name() if torch.device(args.device).type == "cuda" else "CPU"
        args.output.write_text(
            json.dumps({"device": device_name, "torch": torch.__version__, "rows": rows}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
