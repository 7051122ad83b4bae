# SPDX-License-Identifier: Apache-2.0
import importlib.util
import json
import os
import shutil
import socket
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from hub_server import Repository
from huggingface_hub import ModelCard
from safetensors.torch import load, load_file

from diffusers_hart import HARTPipeline
from diffusers_hart.random_pipeline import random_pipeline
from diffusers_hart.training.data import UnreadableImage
from diffusers_hart.training.random_draws import seeded_generator


EXAMPLES = Path(__file__).parents[2] / "examples"
CAPTIONS = ["red", "green, and a longer caption than the others", "blue", "white"]
WEIGHTS = "pytorch_lora_weights.safetensors"


def load_script(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_pictures(folder, count=4):
    folder.mkdir()
    lines = []
    for i in range(count):
        patches = np.random.default_rng(i).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        PIL.Image.fromarray(patches).resize((128, 128), PIL.Image.Resampling.NEAREST).save(folder / f"{i}.png")
        lines.append(json.dumps({"file_name": f"{i}.png", "text": CAPTIONS[i]}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
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
def pictures(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("data") / "pictures")


@pytest.fixture(scope="module")
def script():
    return load_script("train_text_to_image_lora")


@pytest.fixture
def train(script, tiny_pipeline, pictures, tmp_path):
    def run(name, options="", *more, data=None):
        data = f"--train_data_dir {pictures}" if data is None else data
        common = f"--pretrained_model_name_or_path {tiny_pipeline} --cache_dir {tmp_path}/cache --logging_steps 1"
        arguments = f"{common} --output_dir {tmp_path}/{name} --train_batch_size 2 {data} {options}".split()
        return script.main([*arguments, *more])

    return run


def adapted_pipeline(tiny_pipeline, folder):
    pipe = HARTPipeline.from_pretrained(tiny_pipeline)
    pipe.set_progress_bar_config(disable=True)
    pipe.load_lora_weights(folder)
    return pipe


def test_captions_are_learnt(train, tiny_pipeline, tmp_path):
    """Adapters alone bring the codes of two pictures close to their floor, and generation draws them from captions."""
    data = f"--train_data_dir {write_pictures(tmp_path / 'two', 2)}"
    options = (
        "--rank 16 --caption_dropout 0 --learning_rate 1e-2 --lr_scheduler cosine --max_train_steps 250"
        " --checkpointing_steps 1000"
    )
    folder = train("run", options, data=data)
    code_loss = metrics(folder, "code_loss")
    assert code_loss[1] > 10 and np.mean([code_loss[step] for step in range(241, 251)]) < 0.5

    pipe = adapted_pipeline(tiny_pipeline, folder)
    images = [PIL.Image.open(tmp_path / "two" / f"{i}.png") for i in range(2)]
    pixels = torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) / 127.5 - 1 for image in images])
    with torch.no_grad():
        expected = pipe.vae.encode(pixels).partial_latents[-1]
    options = {"guidance_scale": 0.0, "top_k": 1, "smooth": False, "num_inference_steps": 0, "output_type": "latent"}
    drawn = pipe(CAPTIONS[:2], **options).images
    errors = [[(latents - other).square().mean().item() for other in expected] for latents in drawn]
    assert errors[0][0] < 0.3 * errors[0][1] and errors[1][1] < 0.3 * errors[1][0]


def test_resuming_continues_exactly(train):
    """From a checkpoint that holds the adapters and nothing of the frozen weights."""
    options = (
        "--max_train_steps 4 --checkpointing_steps 2 --gradient_accumulation_steps 2 --use_ema --learning_rate 1e-2"
        " --lr_scheduler cosine --lr_warmup_steps 1 --train_residual_mlp --train_text_encoder --lora_dropout 0.1"
    )
    whole = train("whole", options)
    checkpoint = whole / "checkpoint-2"
    assert sum(path.stat().st_size for path in checkpoint.iterdir()) < 1e6
    assert not (checkpoint / "model.safetensors").exists()
    shutil.copytree(checkpoint, whole.parent / "resumed" / "checkpoint-2")
    resumed = train("resumed", f"{options} --resume_from_checkpoint latest")
    for name in ("loss", "residual_mse", "grad_norm", "learning_rate"):
        expected = metrics(whole, name)
        assert metrics(resumed, name) == {3: expected[3], 4: expected[4]}
    first, second = load_file(whole / WEIGHTS), load_file(resumed / WEIGHTS)
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    with pytest.raises(ValueError, match="other layers or another rank"):
        train("resumed", f"{options} --rank 3 --resume_from_checkpoint checkpoint-2")


def test_what_is_saved(train, tiny_pipeline, tmp_path):
    options = (
        "--max_train_steps 2 --learning_rate 1e-2 --rank 3 --lora_alpha 6 --license mit --lora_layers to_q,to_out.0"
    )
    folder = train("run", options)
    assert {path.name for path in folder.iterdir()} == {WEIGHTS, "README.md", "metrics.jsonl", "checkpoint-2"}
    tensors = load_file(folder / WEIGHTS)
    layers = {name.split(".attn.")[1].split(".lora")[0] for name in tensors}
    assert layers == {"to_q", "to_out.0"} and len(tensors) == 2 * 2 * 2
    assert all(name.startswith("transformer.transformer_blocks.") for name in tensors)
    assert all(3 in tensor.shape and tensor.dtype == torch.float32 for tensor in tensors.values())
    pipe = adapted_pipeline(tiny_pipeline, folder)
    assert pipe.transformer.transformer_blocks[0].attn.to_q.scaling == {"default_0": 2.0}
    pipe.unload_lora_weights()
    pipe.load_lora_weights(folder / "checkpoint-2")

    card = ModelCard.load(folder / "README.md")
    assert card.data.library_name == "diffusers" and card.data.license == "mit"
    assert card.data.pipeline_tag == "text-to-image" and card.data.base_model is None
    assert {"hart", "lora"} < set(card.data.tags)
    assert "| Rank | 3 |" in card.text and "| Alpha | 6 |" in card.text and str(tmp_path) not in card.text


def test_validation_pictures(train, tiny_pipeline):
    """The last grid is what the pipeline draws with the saved adapters, of the text encoder too."""
    options = (
        "--max_train_steps 3 --validation_steps 2 --num_validation_images 2 --validation_guidance_scale 2"
        " --learning_rate 1e-2 --train_text_encoder --train_residual_mlp --lora_dropout 0.5"
    )
    folder = train("run", options, "--validation_prompt", "a red circle", "a house")
    assert sorted(path.name for path in (folder / "validation").iterdir()) == ["step-000002.png", "step-000003.png"]
    grid = np.array(PIL.Image.open(folder / "validation" / "step-000003.png"))
    assert np.array_equal(np.array(PIL.Image.open(folder / "validation.png")), grid)
    pipe = adapted_pipeline(tiny_pipeline, folder)
    rows = []
    for prompt in ("a red circle", "a house"):
        generators = [seeded_generator("cpu", 0, "validation", place) for place in range(2)]
        images = pipe(prompt, num_images_per_prompt=2, guidance_scale=2.0, generator=generators).images
        rows.append(np.concatenate([np.array(image) for image in images], axis=1))
    assert np.abs(np.concatenate(rows).astype(int) - grid).max() <= 1
    assert not np.array_equal(grid, np.array(PIL.Image.open(folder / "validation" / "step-000002.png")))
    card = (folder / "README.md").read_text()
    assert "![Validation pictures](validation.png)" in card and "2. a house" in card


def test_caching_changes_nothing(train):
    options = "--max_train_steps 3 --learning_rate 1e-2"
    cached = train("cached", f"{options} --cache_latents")
    assert metrics(train("default", options)) == metrics(cached)
    assert metrics(train("read", f"{options} --no-cache_latents")) == pytest.approx(metrics(cached), rel=1e-4)
    flipped = train("flipped", f"{options} --random_flip")
    assert metrics(flipped) != pytest.approx(metrics(cached), rel=1e-4)
    with pytest.raises(ValueError, match="--cache_latents needs pictures .* --random_crop and --random_flip"):
        train("both", f"{options} --random_flip --cache_latents")


def test_precision_and_gradient_checkpointing(train):
    options = "--max_train_steps 2 --learning_rate 1e-3 --train_text_encoder --train_residual_mlp"
    plain = train("plain", options)
    checkpointed = train("checkpointed", f"{options} --gradient_checkpointing")
    assert metrics(checkpointed) == pytest.approx(metrics(plain), rel=1e-5)
    AcceleratorState._reset_state(reset_partial_state=True)
    half = train("half", f"{options} --mixed_precision bf16")
    assert metrics(half) == pytest.approx(metrics(plain), rel=0.1)
    assert all(value.dtype == torch.float32 for value in load_file(half / WEIGHTS).values())


def test_targets_computed_before(train, tiny_pipeline, pictures, tmp_path):
    load_script("precompute_targets").main(
        f"--pretrained_model_name_or_path {tiny_pipeline} --train_data_dir {pictures} --resolution 128"
        f" --encode_prompts --latents_dtype fp32 --cache_dir {tmp_path}/cache --output_dir {tmp_path}/targets".split()
    )
    AcceleratorState._reset_state(reset_partial_state=True)
    options = "--max_train_steps 2 --learning_rate 1e-3"
    plain = train("plain", options)
    for flag in ("--cache_latents", "--no-cache_latents", "--train_text_encoder"):
        folder = train(f"run{flag}", f"{options} {flag}", data=f"--precomputed_data_dir {tmp_path}/targets")
        assert metrics(folder)[1] == pytest.approx(metrics(plain)[1], rel=1e-3)


def run_as_one_of_two(rank, arguments):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
    load_script("train_text_to_image_lora").main(arguments)


def test_two_processes_are_one(train, tiny_pipeline, pictures, tmp_path, hub, monkeypatch):
    """Two processes of gloo that push to the Hub give the run that one process with their batch gives."""
    files = {str(path.relative_to(tiny_pipeline)): path.read_bytes() for path in tiny_pipeline.rglob("*.*")}
    hub.repositories["me/tiny"] = Repository()
    hub.repositories["me/tiny"].commit(files, "A pipeline")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    options = "--max_train_steps 3 --checkpointing_steps 2 --learning_rate 1e-3 --train_text_encoder"
    arguments = (
        f"--pretrained_model_name_or_path me/tiny --train_data_dir {pictures} --train_batch_size 2 {options}"
        f" --cache_dir {tmp_path}/cache --logging_steps 1 --output_dir {tmp_path}/two --push_to_hub"
    )
    with monkeypatch.context() as environment:
        for name, value in {**hub.environment(), **world}.items():
            environment.setenv(name, value)
        torch.multiprocessing.spawn(run_as_one_of_two, (arguments.split(),), nprocs=2)

    two, one = tmp_path / "two", train("one", f"{options} --train_batch_size 4")
    for name in ("loss", "code_loss", "grad_norm"):
        assert metrics(two, name) == pytest.approx(metrics(one, name), rel=1e-4)
    pushed = hub.repositories["me/two"].files
    assert set(pushed) - {".gitattributes"} == {WEIGHTS, "README.md", "metrics.jsonl"}
    torch.testing.assert_close(load(pushed[WEIGHTS]), load_file(one / WEIGHTS), rtol=0, atol=1e-4)
    card = pushed["README.md"].decode()
    assert "base_model: me/tiny" in card and 'pipe.load_lora_weights("me/two")' in card


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            "--lora_layers to_q,to_x",
            r"no linear layers \['to_x'\]; it has some that end in .*transformer_blocks.attn.to_q",
        ),
        ("--resolution 96", "--resolution 96 has no schedule of scales"),
    ],
)
def test_settings_that_do_not_fit(options, message, train):
    with pytest.raises(ValueError, match=message):
        train("run", options)


def test_bad_pictures(train, tmp_path):
    pictures = write_pictures(tmp_path / "pictures")
    (pictures / "3.png").write_bytes(b"no picture")
    with pytest.raises(UnreadableImage, match="3.png is not a readable picture"):
        train("error", data=f"--train_data_dir {pictures}")
    train("skip", "--max_train_steps 2 --on_bad_image skip", data=f"--train_data_dir {pictures}")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("", "--pretrained_model_name_or_path"),
        ("--pretrained_model_name_or_path x --rank 0", "--rank: must be a whole number from 1, not 0"),
        ("--pretrained_model_name_or_path x --lora_dropout 2", "--lora_dropout: must be from 0 to 1, not 2"),
    ],
)
def test_arguments_out_of_range(options, message, script, tmp_path, capsys):
    with pytest.raises(SystemExit):
        script.main(["--output_dir", str(tmp_path), *options.split()])
    assert message in capsys.readouterr().err


def test_a_pipeline_without_a_residual_mlp(script, pictures, tmp_path):
    pipe = random_pipeline()
    pipe.register_modules(residual_mlp=None, residual_scheduler=None)
    pipe.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="has no residual MLP: train one with train_text_to_image.py first"):
        script.main(
            f"--pretrained_model_name_or_path {tmp_path}/model --output_dir {tmp_path}/run"
            f" --train_data_dir {pictures}".split()
        )


@pytest.mark.slow
def test_compiled_blocks_give_the_same_losses(train):
    options = "--max_train_steps 3 --num_validation_images 1"
    losses = [
        metrics(train(name, f"{options} {flag}", "--validation_prompt", "a red circle"), "loss")
        for name, flag in (("plain", ""), ("compiled", "--compile"))
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.quantization
def test_an_optimizer_of_eight_bits_learns_alike_and_resumes(train, tmp_path):
    options = "--rank 64 --learning_rate 1e-3 --max_train_steps 6 --checkpointing_steps 3"
    plain = metrics(train("plain", options))
    eight = metrics(train("eight", f"{options} --use_8bit_adam"))
    sizes = [(tmp_path / name / "checkpoint-3" / "optimizer.bin").stat().st_size for name in ("eight", "plain")]
    assert sizes[0] < 0.5 * sizes[1]
    assert eight != plain and all(eight[step] == pytest.approx(plain[step], rel=0.01) for step in plain)

    shutil.copytree(tmp_path / "eight" / "checkpoint-3", tmp_path / "resumed" / "checkpoint-3")
    resumed = metrics(train("resumed", f"{options} --use_8bit_adam --resume_from_checkpoint latest"))
    assert resumed == {step: eight[step] for step in (4, 5, 6)}
