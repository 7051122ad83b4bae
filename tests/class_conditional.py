# SPDX-License-Identifier: Apache-2.0
import torch

from diffusers_hart import HARTClassConditionalPipeline, HARTTransformer2DModel
from diffusers_hart.random_pipeline import random_pipeline


def class_conditional_pipeline(has_residual=True, **options):
    """A tiny pipeline of two classes, on the frozen parts of the random text-to-image one."""
    source = random_pipeline()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        transformer = HARTTransformer2DModel(
            in_channels=8,
            codebook_size=512,
            num_layers=1,
            num_attention_heads=4,
            attention_head_dim=16,
            caption_channels=None,
            num_classes=2,
            sample_size=8,
        ).eval()
    names = ("vae", "scheduler", *(("residual_mlp", "residual_scheduler") if has_residual else ()))
    return HARTClassConditionalPipeline(transformer, **{name: source.components[name] for name in names}, **options)
