# SPDX-License-Identifier: Apache-2.0
"""Whether an adapter of DreamBooth draws the subject of subject.py, and still draws others of its class."""

import argparse
from pathlib import Path

from diffusers.image_processor import VaeImageProcessor
from measure_new_thing import draw, report
from subject import LOOK

from diffusers_hart import HARTPipeline, shapes_model_path
from diffusers_hart.evaluation.confidence import estimated_share
from diffusers_hart.shapes import Scene, ShapesDataset, load_shapes_checker


CLASS = {name: LOOK[name] for name in ("shape", "color")}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=shapes_model_path(), help="pipeline; by default the package's own")
    parser.add_argument("--lora", required=True, help="folder or file of the adapter")
    parser.add_argument("--instance_prompt", default="a sks cyan star")
    parser.add_argument("--class_prompt", default="a cyan star")
    parser.add_argument("--num_images", type=int, default=100, help="of each prompt, and of prompts of other things")
    parser.add_argument("--batch_size", type=int, default=25)
    parser.add_argument("--num_shown", type=int, default=8)
    parser.add_argument("--output_dir", type=Path, required=True)
    return parser.parse_args(argv)


def shows_only(scene: Scene, look: dict[str, str]) -> bool:
    """Whether there is one object and it has all of these attributes."""
    return len(scene.objects) == 1 and all(getattr(scene.objects[0], name) == look[name] for name in look)


def main(argv: list[str] | None = None) -> dict[str, dict[str, float | int]]:
    args = parse_args(argv)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    pipe = HARTPipeline.from_pretrained(args.model)
    pipe.set_progress_bar_config(disable=True)
    pipe.load_lora_weights(args.lora)
    checker = load_shapes_checker()
    others = ShapesDataset(seed=100, split="test")
    statements = [others.statement(i) for i in range(args.num_images)]
    prompts = {
        "subject": [args.instance_prompt] * args.num_images,
        "class": [args.class_prompt] * args.num_images,
        "others": [others[i]["caption"] for i in range(args.num_images)],
    }
    shares, shown = {}, []
    for adapter in ("without", "with"):
        pipe.disable_lora() if adapter == "without" else pipe.enable_lora()
        scenes = {}
        for kind, texts in prompts.items():
            images = draw(pipe, texts, args.batch_size)
            scenes[kind] = [scene for batch in images.split(50) for scene in checker.read(batch)]
            pictures = VaeImageProcessor().postprocess(images[: args.num_shown], output_type="pil")
            shown.append((pictures, [f"{adapter}: {text}" for text in texts[: args.num_shown]]))
        outcomes = {
            "subject drawn": [shows_only(scene, LOOK) for scene in scenes["subject"]],
            "class right in shape and colour": [shows_only(scene, CLASS) for scene in scenes["class"]],
            "class drawn as the subject": [shows_only(scene, LOOK) for scene in scenes["class"]],
            "others right in all": [said.holds(scene) for said, scene in zip(statements, scenes["others"])],
        }
        shares |= {f"{name}, {adapter} the adapter": estimated_share(values) for name, values in outcomes.items()}
    report(shares, shown, args.output_dir, "subject")
    return shares


if __name__ == "__main__":
    main()
