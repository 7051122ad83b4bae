# SPDX-License-Identifier: Apache-2.0
import importlib.util
import json
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from diffusers_hart import HARTPipeline
from diffusers_hart.random_pipeline import random_pipeline


EXAMPLES = Path(__file__).parents[2] / "examples"
WEIGHTS = "pytorch_lora_weights.safetensors"
SUBJECT, CLASS = "a photo of sks thing", "a photo of a thing"


def load_script(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_pictures(folder, count, seed=0):
    folder.mkdir()
    for i in range(count):
        patches = np.random.default_rng(seed + i).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        PIL.Image.fromarray(patches).resize((128, 128), PIL.Image.Resampling.NEAREST).save(folder / f"{i}.png")
    return folder


def metrics(folder, name="loss"):
    with open(folder / "metrics.jsonl") as file:
        return {line["step"]: line[name] for line in map(json.loads, file)}


@pytest.fixture(autouse=True)
def fresh_accelerators(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture(scope="module")
def tiny_pipeline(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    random_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def script():
    return load_script("train_dreambooth_lora")


@pytest.fixture
def train(script, tiny_pipeline, tmp_path):
    subject = write_pictures(tmp_path / "subject", 2)

    def run(name, options="", *more):
        arguments = (
            f"--pretrained_model_name_or_path {tiny_pipeline} --instance_data_dir {subject}"
            f" --output_dir {tmp_path}/{name} --logging_steps 1 {options}"
        )
        return script.main([*arguments.split(), "--instance_prompt", SUBJECT, *more])

    return run


def errors_of_drawing(pipe, prompt, pictures):
    """How far what is drawn of a prompt is from each of these pictures, as latents."""
    images = [PIL.Image.open(path) for path in pictures]
    pixels = torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) / 127.5 - 1 for image in images])
    with torch.no_grad():
        expected = pipe.vae.encode(pixels).partial_latents[-1]
    options = {"guidance_scale": 0.0, "top_k": 1, "smooth": False, "num_inference_steps": 0, "output_type": "latent"}
    drawn = pipe(prompt, **options).images
    return [(drawn[0] - latents).square().mean().item() for latents in expected]


def test_a_subject_and_its_class_are_learnt(train, tiny_pipeline, tmp_path):
    """What the prompt of the subject draws is the subject; that of the class draws what the folder of the class has."""
    (tmp_path / "subject" / "1.png").unlink()
    others = write_pictures(tmp_path / "class", 1, seed=7)
    options = (
        "--with_prior_preservation --num_class_images 1 --rank 16 --learning_rate 1e-2 --lr_scheduler cosine"
        " --max_train_steps 220"
        f" --checkpointing_steps 1000 --class_data_dir {others}"
    )
    folder = train("run", options, "--class_prompt", CLASS)
    pipe = HARTPipeline.from_pretrained(tiny_pipeline)
    pipe.set_progress_bar_config(disable=True)
    pipe.load_lora_weights(folder)
    pictures = [tmp_path / "subject" / "0.png", others / "0.png"]
    subject, other = errors_of_drawing(pipe, SUBJECT, pictures), errors_of_drawing(pipe, CLASS, pictures)
    assert subject[0] < 0.3 * subject[1] and other[1] < 0.3 * other[0]
    code_loss, prior_loss = metrics(folder, "code_loss"), metrics(folder, "prior_loss")
    assert code_loss[1] > 10 and np.mean([code_loss[step] for step in range(211, 221)]) < 0.5
    assert np.mean([prior_loss[step] for step in range(211, 221)]) < 0.2 * prior_loss[1]


def test_pictures_of_the_class_are_drawn_by_the_model_as_it_was(train, tiny_pipeline, tmp_path):
    options = (
        "--with_prior_preservation --num_class_images 3 --sample_batch_size 2 --max_train_steps 2 --learning_rate 1e-2"
        f" --class_data_dir {tmp_path}/class"
    )
    folder = train("run", options, "--class_prompt", CLASS)
    pictures = {path.name: path.read_bytes() for path in (tmp_path / "class").iterdir()}
    assert sorted(pictures) == [f"class-{place:05d}.png" for place in range(3)]
    again = train("again", options, "--class_prompt", CLASS)
    assert {path.name: path.read_bytes() for path in (tmp_path / "class").iterdir()} == pictures
    assert metrics(again) == metrics(folder)
    (tmp_path / "class" / "class-00001.png").unlink()
    train("again", options, "--class_prompt", CLASS)
    assert {path.name: path.read_bytes() for path in (tmp_path / "class").iterdir()}.keys() == pictures.keys()

    losses = [metrics(folder, name)[1] for name in ("loss", "code_loss", "residual_mse", "residual_variational")]
    prior_loss = metrics(folder, "prior_loss")[1]
    assert losses[0] == pytest.approx(sum(losses[1:]) + prior_loss, rel=1e-5)
    half = train("half", f"{options} --prior_loss_weight 0.5", "--class_prompt", CLASS)
    assert metrics(half)[1] == pytest.approx(sum(losses[1:]) + 0.5 * prior_loss, rel=1e-5)


def test_without_a_class(train, tmp_path):
    """More pictures a step than there are of the subject are no obstacle, and the card tells how to use the result."""
    folder = train("run", "--max_train_steps 2 --train_batch_size 3 --gradient_accumulation_steps 2 --license mit")
    with open(folder / "metrics.jsonl") as file:
        assert all("prior_loss" not in json.loads(line) for line in file)
    card = ModelCard.load(folder / "README.md")
    assert card.data.instance_prompt == SUBJECT and card.data.license == "mit"
    assert {"lora", "dreambooth", "hart"} < set(card.data.tags)
    assert f"pipe({SUBJECT!r})" in card.text and "| Pictures of the subject | 2 |" in card.text
    assert str(tmp_path) not in card.text


def test_every_model(train, tmp_path):
    """With pictures that are not cached and a text encoder that is trained with them."""
    options = (
        "--with_prior_preservation --num_class_images 2 --train_text_encoder --train_residual_mlp --random_flip"
        " --gradient_checkpointing --mixed_precision bf16 --max_train_steps 2 --learning_rate 1e-2"
        f" --num_validation_images 1 --class_data_dir {tmp_path}/class"
    )
    folder = train("run", options, "--class_prompt", CLASS, "--validation_prompt", SUBJECT)
    tensors = load_file(folder / WEIGHTS)
    assert {name.split(".")[0] for name in tensors} == {"transformer", "residual_mlp", "text_encoder"}
    assert all(tensor.any() for tensor in tensors.values())
    assert (folder / "validation.png").exists()


def test_resuming_continues_exactly(train, tmp_path):
    options = (
        "--with_prior_preservation --num_class_images 3 --max_train_steps 4 --checkpointing_steps 2"
        f" --learning_rate 1e-2 --class_data_dir {tmp_path}/class"
    )
    whole = train("whole", options, "--class_prompt", CLASS)
    (tmp_path / "resumed").mkdir()
    (whole / "checkpoint-2").rename(tmp_path / "resumed" / "checkpoint-2")
    resumed = train("resumed", f"{options} --resume_from_checkpoint latest", "--class_prompt", CLASS)
    for name in ("loss", "prior_loss"):
        expected = metrics(whole, name)
        assert metrics(resumed, name) == {3: expected[3], 4: expected[4]}
    first, second = load_file(whole / WEIGHTS), load_file(resumed / WEIGHTS)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--with_prior_preservation --class_prompt x", "needs --class_data_dir and --class_prompt"),
        ("--class_prompt x", "have no effect without --with_prior_preservation"),
        ("--rank 0", "--rank: must be a whole number from 1, not 0"),
        ("--num_class_images 0", "--num_class_images: must be a whole number from 1, not 0"),
    ],
)
def test_arguments_that_contradict(options, message, train, capsys):
    with pytest.raises(SystemExit):
        train("run", options)
    assert message in capsys.readouterr().err


def test_no_pictures(train, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="There are no pictures in .*empty"):
        train("run", f"--instance_data_dir {tmp_path}/empty")
    with pytest.raises(ValueError, match="nowhere is no folder"):
        train("run", f"--instance_data_dir {tmp_path}/nowhere")
