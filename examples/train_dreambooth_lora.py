# SPDX-License-Identifier: Apache-2.0
"""Teach a HART text-to-image pipeline a subject from a few pictures of it, with LoRA adapters."""

import argparse
from pathlib import Path

from diffusers_hart.training.arguments import add_picture_arguments, add_training_arguments, positive_int
from diffusers_hart.training.data_sources import image_preparer
from diffusers_hart.training.dreambooth import DreamBoothExamples, draw_class_pictures, list_pictures, pair_preparer
from diffusers_hart.training.lora_training import LoraTraining, add_lora_arguments
from diffusers_hart.training.publishing import hub_repository
from diffusers_hart.training.train_loop import create_accelerator


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add_lora_arguments(parser, caption_dropout=0.0)
    group = parser.add_argument_group("subject")
    group.add_argument("--instance_data_dir", required=True, help="folder of pictures of the subject")
    group.add_argument("--instance_prompt", required=True, help="such as: a photo of sks dog")
    group.add_argument("--with_prior_preservation", action="store_true", help="train on pictures of the class too")
    group.add_argument("--class_data_dir", help="folder of pictures of the class; what it lacks is drawn into it")
    group.add_argument("--class_prompt", help="such as: a photo of a dog")
    group.add_argument("--num_class_images", type=positive_int, default=100)
    group.add_argument("--prior_loss_weight", type=float, default=1.0)
    group.add_argument("--sample_batch_size", type=positive_int, default=4, help="for drawing pictures of the class")
    add_picture_arguments(parser.add_argument_group("data"))
    add_training_arguments(parser)
    parser.set_defaults(adam_weight_decay=1e-2, train_batch_size=1, max_train_steps=500)
    args = parser.parse_args(argv)
    if args.with_prior_preservation and not (args.class_data_dir and args.class_prompt):
        parser.error("--with_prior_preservation needs --class_data_dir and --class_prompt")
    if not args.with_prior_preservation and (args.class_data_dir or args.class_prompt):
        parser.error("--class_data_dir and --class_prompt have no effect without --with_prior_preservation")
    return args


def main(argv: list[str] | None = None) -> Path:
    args = parse_args(argv)
    pictures = list_pictures(args.instance_data_dir)
    if not pictures:
        raise ValueError(f"There are no pictures in {args.instance_data_dir}.")
    accelerator = create_accelerator(args)
    repo_id = hub_repository(args) if accelerator.is_main_process else None
    training = LoraTraining(args, accelerator)
    resolution = training.scales[-1] * training.vae.spatial_factor

    # The subject and, for prior preservation, its class as the model draws it before it is trained
    prepare = image_preparer(resolution, random_crop=args.random_crop, random_flip=args.random_flip)
    instances, prepare_instance = training.cached([(path, args.instance_prompt) for path in pictures], prepare)
    classes, prepare_class = None, prepare
    if args.with_prior_preservation:
        drawn = draw_class_pictures(
            training.pipe,
            accelerator,
            args.class_data_dir,
            args.class_prompt,
            args.num_class_images,
            args.sample_batch_size,
            args.seed,
            height=resolution,
        )
        examples = [(path, args.class_prompt) for path in drawn[: args.num_class_images]]
        classes, prepare_class = training.cached(examples, prepare)
    source = DreamBoothExamples(instances, classes, minimum=args.train_batch_size * accelerator.num_processes)
    training.run(source, pair_preparer(prepare_instance, prepare_class), args.prior_loss_weight)

    prior = {"Pictures of the class": len(classes)} if classes else {}
    folder = training.publish(
        f"LoRA adapters that teach a HART text-to-image pipeline a subject, by DreamBooth with diffusers-hart: it is "
        f"called `{args.instance_prompt}`.",
        repo_id,
        args.instance_prompt,
        **{"Pictures of the subject": len(instances), **prior},
    )
    accelerator.end_training()
    return folder


if __name__ == "__main__":
    main()
