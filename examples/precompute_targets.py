# SPDX-License-Identifier: Apache-2.0
"""Encode pictures and captions once, for train_text_to_image.py and train_class_conditional.py to train from."""

import argparse
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from diffusers_hart import HARTPipeline, HARTScheduler, HARTTransformer2DModel, HybridTokenizer
from diffusers_hart.training.arguments import add_data_arguments, positive_int
from diffusers_hart.training.caption_encoder import CaptionEncoder
from diffusers_hart.training.data import collate, finish_batch
from diffusers_hart.training.data_sources import image_preparer, load_image_source
from diffusers_hart.training.new_models import new_scheduler
from diffusers_hart.training.precomputed_targets import describe_targets, write_precomputed_targets
from diffusers_hart.training.training_data import training_scales


DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pretrained_model_name_or_path", help="pipeline whose tokenizers and text encoder to use")
    parser.add_argument("--revision", help="branch, tag or commit of it on the Hub")
    parser.add_argument("--variant", help="variant of its files, such as fp16")
    parser.add_argument("--vae_path", help="tokenizer, instead of a pipeline")
    parser.add_argument("--vae_subfolder", help="where the tokenizer is in --vae_path, such as vae in a pipeline")
    parser.add_argument("--output_dir", required=True, help="new folder")
    parser.add_argument("--label_column", help="column of classes, to be stored instead of captions")
    parser.add_argument("--encode_prompts", action="store_true", help="store embeddings of the captions as well")
    parser.add_argument("--batch_size", type=positive_int, default=16, help="pictures that are encoded at once")
    parser.add_argument(
        "--examples_per_shard", type=positive_int, default=512, help="what an interrupted run loses at most"
    )
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="what the models compute in")
    parser.add_argument("--latents_dtype", choices=("fp16", "fp32"), default="fp16", help="what latents are stored in")
    add_data_arguments(parser)
    args = parser.parse_args(argv)
    if (args.pretrained_model_name_or_path is None) == (args.vae_path is None):
        parser.error("either --pretrained_model_name_or_path or --vae_path is needed")
    if args.encode_prompts and (args.label_column is not None or args.vae_path is not None):
        parser.error("--encode_prompts needs captions and, for its text encoder, --pretrained_model_name_or_path")
    if args.random_crop or args.random_flip:
        parser.error("--random_crop and --random_flip differ each time a picture is seen; what is stored cannot")
    return args


def main(argv: list[str] | None = None) -> Path:
    import datasets

    args = parse_args(argv)
    state = PartialState()

    # 1. The tokenizer, the scales and the text encoder
    stored = {"revision": args.revision, "variant": args.variant}
    if args.vae_path is not None:
        vae = HybridTokenizer.from_pretrained(args.vae_path, subfolder=args.vae_subfolder, dtype=DTYPES[args.dtype])
        scheduler, sample_size = new_scheduler(vae), vae.config.scales[-1]
    else:
        pretrained = args.pretrained_model_name_or_path
        vae = HybridTokenizer.from_pretrained(pretrained, subfolder="vae", dtype=DTYPES[args.dtype], **stored)
        scheduler = HARTScheduler.from_pretrained(pretrained, subfolder="scheduler", revision=args.revision)
        config = HARTTransformer2DModel.load_config(pretrained, subfolder="transformer", revision=args.revision)
        sample_size = config["sample_size"]
    vae.requires_grad_(False).to(state.device)
    scales = training_scales(scheduler, vae, args.resolution, sample_size)
    if args.encode_prompts:
        frozen = {"vae": vae, "transformer": None, "residual_mlp": None}
        pipe = HARTPipeline.from_pretrained(pretrained, dtype=DTYPES[args.dtype], **stored, **frozen)
        pipe.text_encoder.requires_grad_(False).to(state.device)
        encode_captions = CaptionEncoder(pipe, config["caption_length"])

    # 2. The pictures
    with state.main_process_first():
        source = load_image_source(
            args.dataset_name,
            args.dataset_config_name,
            args.train_data_dir,
            args.train_shards,
            args.train_iterable,
            args.image_column,
            args.label_column or args.caption_column,
            args.cache_dir,
        )
    label_feature = (getattr(source, "features", None) or {}).get(args.label_column, datasets.Value("int64"))
    num_classes = None
    if args.label_column is not None:
        num_classes = getattr(label_feature, "num_classes", 2**31)
    prepare = image_preparer(
        scales[-1] * vae.spatial_factor,
        args.image_column,
        args.label_column or args.caption_column,
        num_classes=num_classes,
        source=source,
    )

    # 3. What is stored of them
    latent_shape = (vae.config.latent_channels, scales[-1], scales[-1])
    num_codes = sum(side * side for side in scales)
    features = {
        "codes": datasets.List(datasets.Value("int32"), length=num_codes),
        "latents": datasets.Array3D(latent_shape, {"fp16": "float16", "fp32": "float32"}[args.latents_dtype]),
    }
    features |= {"caption": datasets.Value("string")} if num_classes is None else {"label": label_feature}
    if args.encode_prompts:
        embeds_shape = (config["caption_length"], config["caption_channels"])
        features["prompt_embeds"] = datasets.Array2D(embeds_shape, "float16")
        features["prompt_attention_mask"] = datasets.List(datasets.Value("int8"), length=embeds_shape[0])

    @torch.no_grad()
    def encode(examples: list[dict[str, Any]]) -> dict[str, Any]:
        images = finish_batch(source, collate(examples), state.device)["pixel_values"]
        encoded = vae.encode(images.to(state.device, vae.dtype), scales)
        columns = {
            "codes": encoded.codes.cpu().numpy(),
            "latents": encoded.latents.to(DTYPES[args.latents_dtype]).cpu().numpy(),
        }
        condition = "caption" if num_classes is None else "label"
        columns[condition] = [example[condition] for example in examples]
        if args.encode_prompts:
            text = encode_captions(columns["caption"])
            columns["prompt_embeds"] = text["prompt_embeds"].half().cpu().numpy()
            columns["prompt_attention_mask"] = text["prompt_attention_mask"].cpu().numpy()
        return columns

    folder = write_precomputed_targets(
        args.output_dir,
        source,
        prepare,
        encode,
        features,
        describe_targets(vae, scales) | {"dtype": args.dtype, "columns": {n: str(f) for n, f in features.items()}},
        args.batch_size,
        args.examples_per_shard,
        args.dataloader_num_workers,
        args.on_bad_image,
    )
    state.destroy_process_group()
    return folder


if __name__ == "__main__":
    main()
