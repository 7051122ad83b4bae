# SPDX-License-Identifier: Apache-2.0
"""Measure a HART pipeline: reconstruction, codebook, generation and prompt following, with margins."""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

from diffusers_hart import HybridTokenizer
from diffusers_hart.evaluation.examples import ExampleGroup, pictures_group, shapes_group
from diffusers_hart.evaluation.generation import measure_generation
from diffusers_hart.evaluation.instruments import CHECKER_SIDE, load_instruments
from diffusers_hart.evaluation.picture_grid import captioned_grid, labelled_rows, stacked
from diffusers_hart.evaluation.reconstruction import measure_reconstruction
from diffusers_hart.evaluation.report import markdown_report, versions_and_hardware
from diffusers_hart.evaluation.residual_scheduler import scheduler_name, with_residual_scheduler
from diffusers_hart.evaluation.tokenizer_swap import swap_tokenizer
from diffusers_hart.evaluation.variations import SETTINGS, boolean, parse_variations
from diffusers_hart.pipelines.hart.generation import HARTGenerationMixin
from diffusers_hart.prompt_files import read_prompts
from diffusers_hart.shapes import ShapesDataset, load_shapes_checker, shapes_model_path
from diffusers_hart.training.arguments import positive_int
from diffusers_hart.training.data_sources import image_preparer, load_image_source
from diffusers_hart.training.training_data import training_scales


DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
SPLITS = {
    "one_object": ("one object", {"split": "test", "num_objects": 1}),
    "test": ("whole mix", {"split": "test"}),
    "held_out": ("held-out combinations", {"split": "held_out"}),
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="pipeline, a folder or an id on the Hub; by default the package's own")
    parser.add_argument("--revision", help="branch, tag or commit of it on the Hub")
    parser.add_argument("--variant", help="variant of its files, such as fp16")
    parser.add_argument("--vae_path", help="tokenizer instead of the pipeline's, such as one with another decoder")
    parser.add_argument("--vae_subfolder", help="where the tokenizer is in --vae_path, such as vae in a pipeline")
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--num_images", type=positive_int, default=500, help="of each group, and as many references")
    parser.add_argument("--batch_size", type=positive_int, default=50)
    parser.add_argument("--resolution", type=positive_int, help="by default the pipeline's own")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", help="by default a GPU where there is one")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="what the pipeline computes in")
    parser.add_argument("--bootstrap", type=int, default=20, help="resamples for margins of distances, 0 for none")
    parser.add_argument("--num_shown", type=positive_int, default=16, help="pictures of each group to show")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON instead of tables")

    group = parser.add_argument_group("settings, by default the pipeline's own")
    group.add_argument("--guidance_scale", type=float)
    group.add_argument("--num_inference_steps", type=int, help="of the residual diffusion, 0 for none")
    group.add_argument("--top_k", type=int)
    group.add_argument("--top_p", type=float)
    group.add_argument("--smooth", type=boolean, default=True, metavar="{true,false}")
    group.add_argument("--residual_temperature", type=float, default=1.0)
    group.add_argument(
        "--residual_scheduler",
        type=scheduler_name,
        metavar="CLASS",
        help="class of this package or of diffusers, made from the configuration of the pipeline's own",
    )
    group.add_argument(
        "--vary",
        action="append",
        default=[],
        metavar="NAME=VALUE,...",
        help="compare other values of a setting, such as guidance_scale=0,1,4.5, or of several in every "
        "combination, joined by ' x '; can be given several times",
    )

    group = parser.add_argument_group("data, by default pictures of shapes")
    group.add_argument("--splits", nargs="+", choices=SPLITS, default=list(SPLITS), help="of the shapes")
    group.add_argument("--prompts", help="file of prompts, one a line, or .jsonl")
    group.add_argument("--reference_data_dir", help="folder of pictures; for prompts with a table of captions")
    group.add_argument("--reference_dataset_name", help="data set on the Hub, or a folder of Dataset.save_to_disk")
    group.add_argument("--reference_shards", help="pattern of webdataset tar files")
    group.add_argument("--reference_iterable", help="file.py:name or module:name of an iterable of pictures")
    group.add_argument("--dataset_config_name")
    group.add_argument("--image_column", default="image")
    group.add_argument("--caption_column", default="text")
    group.add_argument("--label_column", help="classes of the pictures; by default all are drawn equally often")
    group.add_argument("--cache_dir")

    group = parser.add_argument_group("weights from elsewhere; what needs those that are not there is left out")
    group.add_argument("--clip_model", default="openai/clip-vit-base-patch16", help="folder or id on the Hub")
    group.add_argument("--inception_weights", help="file of torch-fidelity's weights for FID and KID")
    group.add_argument("--no_downloads", action="store_true")
    args = parser.parse_args(argv)
    if args.num_images < 2:
        parser.error("--num_images must be two or more: distances are of sets of pictures")
    if args.bootstrap < 0 or args.bootstrap == 1:
        parser.error("--bootstrap must be 0 or at least two resamples")
    if args.device is None:
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    return args


def load_pipeline(args: argparse.Namespace) -> tuple[DiffusionPipeline, list[str]]:
    """The pipeline on its device, with another tokenizer if one is named, and what to note of it."""
    model = args.model or shapes_model_path()
    dtype = DTYPES[args.dtype]
    pipe = DiffusionPipeline.from_pretrained(model, revision=args.revision, variant=args.variant, dtype=dtype)
    if not isinstance(pipe, HARTGenerationMixin):
        raise ValueError(f"--model {model} is a {type(pipe).__name__}; a pipeline of HART is needed.")
    pipe.to(args.device)
    notes = []
    if args.vae_path is not None:
        vae = HybridTokenizer.from_pretrained(args.vae_path, subfolder=args.vae_subfolder, dtype=dtype)
        notes.append(f"The tokenizer is the one in {args.vae_path}.")
        notes += filter(None, [swap_tokenizer(pipe, vae)])
    return pipe, notes


def open_groups(args: argparse.Namespace, pipe: DiffusionPipeline, side: int) -> list[ExampleGroup]:
    """The examples: of the shapes, of prompts, of pictures, or of prompts and pictures."""
    num_classes = pipe.transformer.config.num_classes
    places = (
        args.reference_dataset_name,
        args.dataset_config_name,
        args.reference_data_dir,
        args.reference_shards,
        args.reference_iterable,
    )
    has_references = any(places)
    if num_classes is not None and (args.prompts is not None or not has_references):
        raise ValueError(
            "A class-conditional pipeline draws no prompts: name pictures of its classes to compare with, by "
            "--reference_data_dir, --reference_dataset_name, --reference_shards or --reference_iterable."
        )
    if args.prompts is None and not has_references:
        shapes = {SPLITS[split][0]: ShapesDataset(seed=args.seed, **SPLITS[split][1]) for split in args.splits}
        return [shapes_group(name, dataset, args.num_images, side) for name, dataset in shapes.items()]

    conditions = captions = None
    if args.prompts is not None:
        conditions = captions = read_prompts(args.prompts, args.caption_column)[: args.num_images]
    elif num_classes is not None and args.label_column is None:
        conditions = [i % num_classes for i in range(args.num_images)]
    if num_classes is not None and conditions is not None:
        names = {int(i): name for i, name in (pipe.config.id2label or {}).items()}
        captions = [names.get(label, f"class {label}") for label in conditions]
    if not has_references:
        return [ExampleGroup("prompts", conditions, captions)]
    column = None
    if conditions is None:
        column = args.caption_column if num_classes is None else args.label_column
    source = load_image_source(*places, args.image_column, column, args.cache_dir)
    prepare = image_preparer(side, args.image_column, column, num_classes=num_classes, source=source)
    return [pictures_group(source, prepare, args.num_images, side, conditions, captions)]


def save_pictures(
    output_dir: Path,
    groups: list[ExampleGroup],
    generated: dict[str, dict[str, list]],
    reconstructed: dict[str, dict[str, list]],
) -> None:
    """The first pictures of each group: with their captions, under all settings, and reconstructed."""
    samples = {
        group.name: captioned_grid(
            generated[group.name]["base"], group.captions[: len(generated[group.name]["base"])], columns=8
        )
        for group in groups
    }
    stacked(samples).save(output_dir / "samples.png")
    if len(generated[groups[0].name]) > 1:
        variations = {name: labelled_rows({k: v[:8] for k, v in rows.items()}) for name, rows in generated.items()}
        stacked(variations).save(output_dir / "variations.png")
    if reconstructed:
        rows = {name: labelled_rows({k: v[:8] for k, v in rows.items()}) for name, rows in reconstructed.items()}
        stacked(rows).save(output_dir / "reconstruction.png")


def main(argv: list[str] | None = None) -> dict[str, Any]:
    args = parse_args(argv)

    # 1. The pipeline and the settings to compare, checked before anything is computed
    pipe, notes = load_pipeline(args)
    scales = training_scales(pipe.scheduler, pipe.vae, args.resolution, pipe.transformer.config.sample_size)
    side = scales[-1] * pipe.vae_scale_factor
    base = {name: getattr(args, name) for name in SETTINGS}
    _, _, base["guidance_scale"], base["num_inference_steps"] = pipe.generation_defaults(
        side, side, args.guidance_scale, args.num_inference_steps
    )
    if base["residual_scheduler"] is None and pipe.residual_scheduler is not None:
        base["residual_scheduler"] = type(pipe.residual_scheduler).__name__
    variations = parse_variations(base, args.vary)
    for settings in variations.values():
        checked = {name: value for name, value in settings.items() if name != "smooth"}
        with with_residual_scheduler(pipe, checked) as arguments:
            pipe.check_generation_inputs(
                side, side, **arguments, output_type="pt", callback_on_step_end_tensor_inputs=[]
            )

    # 2. The examples, and what to measure with
    groups = open_groups(args, pipe, side)
    draws_classes = pipe.transformer.config.num_classes is not None
    instruments = load_instruments(
        load_shapes_checker(),
        pipe.device,
        None if draws_classes else args.clip_model,
        args.inception_weights,
        not args.no_downloads,
    )
    not_measured = instruments.not_measured
    if draws_classes:
        not_measured["CLIP score"] = "classes have no captions"
    if groups[0].statements is None:
        not_measured["Prompt following"] = "the checker knows the statements of the shapes alone"
    if groups[0].load_images is None:
        not_measured["Reconstruction, codebook and distances"] = (
            "there are no reference pictures; --reference_data_dir names a folder of some"
        )
    else:
        notes.append(
            "Fréchet and kernel distances are of the frozen features of the checker of the shapes, of pictures of "
            f"{CHECKER_SIDE} px{'' if side == CHECKER_SIDE else ', to which these were resized'}; they cannot be "
            "compared with FID and KID."
        )
        notes.append(
            "The discrete path is the sum of the codes as generation decodes it, without phi at the last scale."
        )

    # 3. The figures
    figures, generated, reconstructed = {}, {}, {}
    for group in groups:
        reconstruction = originals = None
        if group.load_images is not None:
            reconstruction, originals, reconstructed[group.name] = measure_reconstruction(
                pipe.vae, scales, group, instruments, args.batch_size, args.num_shown
            )
        generation, generated[group.name] = measure_generation(
            pipe,
            side,
            group,
            variations,
            instruments,
            args.batch_size,
            args.seed,
            originals,
            args.bootstrap,
            args.num_shown,
        )
        figures[group.name] = {"reconstruction": reconstruction, "generation": generation}

    # 4. What is left of it
    report = {
        "model": str(args.model or "diffusers_hart.shapes"),
        "vae": args.vae_path,
        "resolution": side,
        "dtype": args.dtype,
        "seed": args.seed,
        "num_images": args.num_images,
        "batch_size": args.batch_size,
        **versions_and_hardware(pipe.device),
        "settings": base,
        "groups": figures,
        "not_measured": not_measured,
        "notes": notes,
    }
    output_dir = Path(args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    text, tables = json.dumps(report, indent=2), markdown_report(report)
    (output_dir / "evaluation.json").write_text(text)
    (output_dir / "evaluation.md").write_text(tables, encoding="utf-8")
    save_pictures(output_dir, groups, generated, reconstructed)
    print(text if args.json else tables)
    return report


if __name__ == "__main__":
    main()
