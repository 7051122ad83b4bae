# SPDX-License-Identifier: Apache-2.0
"""Train the network that reads pictures of the procedural data set, on true renderings."""

import argparse
from pathlib import Path
from typing import Any

import torch

from diffusers_hart.shapes import ShapesChecker, ShapesCheckerTrainingModule, ShapesDataset
from diffusers_hart.shapes.checker_training import soil_images
from diffusers_hart.shapes.scenes import IMAGE_SIZE
from diffusers_hart.training.arguments import add_training_arguments
from diffusers_hart.training.data_sources import image_preparer, load_image_source
from diffusers_hart.training.random_draws import seeded_generator
from diffusers_hart.training.train_loop import create_accelerator, mean_figures, train
from diffusers_hart.training.weight_updates import WeightUpdates


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pretrained_model_name_or_path", help="checker to start from, instead of a new one")
    parser.add_argument(
        "--train_iterable",
        default="diffusers_hart.shapes.dataset:every_combination",
        help="file.py:name or module:name of a ShapesDataset; one of an extended vocabulary extends the checker",
    )
    parser.add_argument("--train_heads_only", action="store_true", help="keep the features as they are")
    parser.add_argument("--num_validation_images", type=int, default=500)
    parser.add_argument("--dataloader_num_workers", type=int, default=0)
    add_training_arguments(parser)
    args = parser.parse_args(argv)
    args.on_bad_image, args.resolution = "error", IMAGE_SIZE
    return args


def load_checker(args: argparse.Namespace, dataset: ShapesDataset) -> ShapesChecker:
    vocabulary = dataset.vocabulary
    if args.pretrained_model_name_or_path is not None:
        return ShapesChecker.from_pretrained(args.pretrained_model_name_or_path).extended(vocabulary)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(args.seed)
        return ShapesChecker(
            tuple(vocabulary.shapes),
            tuple(vocabulary.colors),
            tuple(vocabulary.surfaces),
            tuple(vocabulary.sizes),
            tuple(vocabulary.backgrounds),
        )


def main(argv: list[str] | None = None) -> Path:
    args = parse_args(argv)
    accelerator = create_accelerator(args)

    # 1. The data and the network
    dataset = load_image_source(train_iterable=args.train_iterable)
    if not isinstance(dataset, ShapesDataset):
        raise ValueError(f"--train_iterable {args.train_iterable} is no ShapesDataset: only these say what they show.")
    checker = load_checker(args, dataset).train()
    if args.train_heads_only:
        checker.requires_grad_(False)
        for part in (checker.heads, checker.background):
            part.requires_grad_(True)
    weights = WeightUpdates(args, accelerator, ShapesCheckerTrainingModule(checker))

    # 2. One step
    def training_step(micro_batches: list[dict[str, Any]], step: int) -> dict[str, torch.Tensor]:
        figures = []
        for i, batch in enumerate(micro_batches):
            key = (args.seed, "soil", step, i, accelerator.process_index)
            images = soil_images(batch["pixel_values"], seeded_generator(accelerator.device, *key))
            with accelerator.accumulate(weights.module):
                losses = weights.module(images, batch["scene"])
                figures.append(losses | weights.update(losses["loss"]))
        return mean_figures(figures)

    # 3. How many other pictures are read right
    test = ShapesDataset(args.seed + 1, "any", vocabulary=dataset.vocabulary)

    def validate(step: int) -> None:
        with weights.for_inference() as models:
            for model in models.values():
                right = 0
                for start in range(0, args.num_validation_images, 100):
                    places = range(start, min(start + 100, args.num_validation_images))
                    scenes = torch.stack([test[place]["scene"] for place in places])
                    images = test.finish_batch({"scene": scenes}, accelerator.device)["pixel_values"]
                    right += sum(model.accepts(images, [test.statement(place) for place in places]))
                accelerator.log({"validation_accuracy": right / args.num_validation_images}, step=step)

    prepare = image_preparer(IMAGE_SIZE, caption_column=None, source=dataset)
    train(args, accelerator, dataset, prepare, training_step, validate)
    with weights.for_inference() as models:
        for model in models.values():
            model.eval().save_pretrained(args.output_dir)
    accelerator.end_training()
    return Path(args.output_dir)


if __name__ == "__main__":
    main()
