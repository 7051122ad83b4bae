# SPDX-License-Identifier: Apache-2.0
"""
Residual schedulers by number of steps, on the model in the box: PSNR of test pictures whose codes are given and whose
residual is drawn, between that of no residual and that of the true one. No guidance; the same noise for all.
"""

import argparse

import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

from diffusers_hart import HARTPipeline, HARTResidualScheduler, shapes_model_path
from diffusers_hart.evaluation.reconstruction import psnr
from diffusers_hart.shapes import ShapesDataset
from diffusers_hart.training.teacher_forcing import teacher_forcing_targets


SCHEDULERS = (HARTResidualScheduler, DDIMScheduler, DPMSolverMultistepScheduler)


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=shapes_model_path())
    parser.add_argument("--num_images", type=int, default=100)
    parser.add_argument("--steps", type=int, nargs="+", default=[2, 4, 8, 16, 32])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


@torch.no_grad()
def main():
    args = parse_args()
    pipe = HARTPipeline.from_pretrained(args.model).to(args.device)
    vae, transformer = pipe.vae, pipe.transformer
    scales = pipe.scheduler.scales(transformer.config.sample_size)
    side = scales[-1]

    # 1. Pictures, their codes, and what the transformer makes of these in the last scale
    dataset = ShapesDataset(seed=args.seed, split="test")
    examples = [dataset[i] for i in range(args.num_images)]
    scenes = torch.stack([example["scene"] for example in examples])
    images = dataset.finish_batch({"scene": scenes}, args.device)["pixel_values"]
    targets = teacher_forcing_targets(vae, scales, images=images)
    captions = [example["caption"] for example in examples]
    embeds, mask, _, _ = pipe.encode_prompt(captions, do_classifier_free_guidance=False)
    hidden_states = transformer(targets.scale_inputs, scales, embeds, mask).hidden_states[:, -(side**2) :]
    code_embeds = vae.embed(targets.codes[:, -(side**2) :])
    condition = transformer.residual_condition(hidden_states, code_embeds)
    residual = (targets.last_scale - code_embeds).transpose(1, 2).unflatten(2, (side, side))
    discrete = targets.latents - residual

    # 2. The residual, true and drawn
    def mean_psnr(latents):
        return psnr(vae.decode(latents).sample, images).mean().item()

    print(f"no residual {mean_psnr(discrete):.2f} dB, the true one {mean_psnr(targets.latents):.2f} dB", flush=True)
    generator = torch.Generator(args.device).manual_seed(args.seed)
    noise = torch.randn(discrete.shape, generator=generator, device=args.device)
    config = pipe.residual_scheduler.config
    print(f"\n| steps | {' | '.join(map(str, args.steps))} |\n|---|{'---|' * len(args.steps)}")
    for scheduler in SCHEDULERS:
        pipe.residual_scheduler = scheduler.from_config(config)
        row = []
        for steps in args.steps:
            generator.manual_seed(args.seed + 1)
            drawn = pipe.sample_residual(condition, noise, 0.0, steps, 1.0, generator)
            row.append(f"{mean_psnr(discrete + drawn):.2f}")
        print(f"| {scheduler.__name__} | {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
