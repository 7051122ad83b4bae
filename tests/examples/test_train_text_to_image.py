# SPDX-License-Identifier: Apache-2.0
import importlib.util
import json
import os
import shutil
import socket
from pathlib import Path

import datasets
import numpy as np
import PIL.Image
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from diffusers import DiffusionPipeline
from hub_server import Repository
from huggingface_hub import ModelCard
from safetensors.torch import load, load_file
from transformers import Qwen2Config, Qwen2Model

from diffusers_hart import HARTPipeline, HARTScheduler
from diffusers_hart.random_pipeline import random_pipeline
from diffusers_hart.training.checkpoints import list_checkpoints
from diffusers_hart.training.data import UnreadableImage
from diffusers_hart.training.random_draws import seeded_generator
from diffusers_hart.training.train_loop import NonFiniteLoss


EXAMPLES = Path(__file__).parents[2] / "examples"
CAPTIONS = ["red", "green, and a longer caption than the others", "blue", "white", "grey", ""]


def load_script(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_pictures(folder, count=6, size=(128, 128)):
    """Pictures of large coloured patches, with a table of captions."""
    folder.mkdir()
    lines = []
    for i in range(count):
        patches = np.random.default_rng(i).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        PIL.Image.fromarray(patches).resize(size, PIL.Image.Resampling.NEAREST).save(folder / f"{i}.png")
        lines.append(json.dumps({"file_name": f"{i}.png", "text": CAPTIONS[i]}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def metrics(folder, name="loss"):
    """A figure by step; of steps that were made twice, the last."""
    with open(folder / "metrics.jsonl") as file:
        return {line["step"]: line[name] for line in map(json.loads, file)}


def weights(folder, model):
    return load_file(folder / model / "diffusion_pytorch_model.safetensors")


def assert_same_weights(first, second, models=("transformer", "residual_mlp"), **tolerance):
    for model in models:
        for (name, a), b in zip(weights(first, model).items(), weights(second, model).values()):
            torch.testing.assert_close(a, b, **(tolerance or {"rtol": 0, "atol": 0}), msg=f"{model}.{name}")


@pytest.fixture(autouse=True)
def fresh_accelerators(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # models this small gain nothing by more, and lose much where test processes share cores
    yield
    torch.set_num_threads(threads)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture(scope="module")
def tiny_pipeline(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    pipe = random_pipeline()
    pipe.register_modules(scheduler=HARTScheduler(schedules=((1, 2, 3, 4, 6, 8), (1, 2, 3, 4))))
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("data") / "pictures")


@pytest.fixture(scope="module")
def script():
    return load_script("train_text_to_image")


@pytest.fixture
def train(script, tiny_pipeline, pictures, tmp_path, request):
    """Runs the script into a folder of the given name, on the pictures unless other data are named."""

    def run(name, options="", *more, data=None):
        data = f"--train_data_dir {pictures}" if data is None else data
        common = f"--pretrained_model_name_or_path {tiny_pipeline} --cache_dir {tmp_path}/cache --logging_steps 1"
        arguments = f"{common} --output_dir {tmp_path}/{name} --train_batch_size 2 {data} {options}".split()
        return script.main([*arguments, *more])

    return run


def test_one_batch_is_learnt(train, tmp_path):
    """The floor of the code loss is 0: the codes follow from the picture, and the picture from its caption."""
    data = f"--train_data_dir {write_pictures(tmp_path / 'two', 2)}"
    options = (
        "--from_scratch --caption_dropout 0 --learning_rate 3e-3 --lr_scheduler cosine --max_train_steps 180"
        " --checkpointing_steps 1000"
    )
    folder = train("run", options, data=data)
    code_loss, residual_mse = metrics(folder, "code_loss"), metrics(folder, "residual_mse")
    assert code_loss[1] == pytest.approx(np.log(512), abs=0.1)
    assert np.mean([code_loss[step] for step in range(171, 181)]) < 0.25
    assert np.mean([residual_mse[step] for step in range(171, 181)]) < 0.5 * residual_mse[1]

    # What was learnt is what generation draws, from captions alone.
    pipe = HARTPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    images = [PIL.Image.open(tmp_path / "two" / f"{i}.png") for i in range(2)]
    pixels = torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) / 127.5 - 1 for image in images])
    with torch.no_grad():
        expected = pipe.vae.encode(pixels).partial_latents[-1]
    drawn = pipe(CAPTIONS[:2], guidance_scale=0.0, top_k=1, smooth=False, num_inference_steps=0, output_type="latent")
    errors = [[(latents - other).square().mean().item() for other in expected] for latents in drawn.images]
    assert errors[0][0] < 0.3 * errors[0][1] and errors[1][1] < 0.3 * errors[1][0]


def test_resuming_continues_exactly(train, tmp_path):
    options = (
        "--max_train_steps 4 --checkpointing_steps 2 --gradient_accumulation_steps 2 --use_ema --random_flip"
        " --lr_scheduler cosine --lr_warmup_steps 1"
    )
    whole = train("whole", options)
    shutil.copytree(whole / "checkpoint-2", tmp_path / "resumed" / "checkpoint-2")
    resumed = train("resumed", f"{options} --resume_from_checkpoint latest")
    for name in ("loss", "residual_mse", "grad_norm", "learning_rate"):
        expected = metrics(whole, name)
        assert metrics(resumed, name) == {3: expected[3], 4: expected[4]}
    assert_same_weights(whole, resumed)


def run_as_one_of_two(rank, arguments):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
    load_script("train_text_to_image").main(arguments)


def test_two_processes_are_one(train, tiny_pipeline, pictures, tmp_path, hub, monkeypatch):
    """
    Two processes of gloo, one process with their batch and one that accumulates it give the same run; the two take the
    pipeline from the Hub and push what becomes of it.
    """
    files = {str(path.relative_to(tiny_pipeline)): path.read_bytes() for path in tiny_pipeline.rglob("*.*")}
    hub.repositories["me/tiny"] = Repository()
    hub.repositories["me/tiny"].commit(files, "A pipeline")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    options = "--max_train_steps 3 --checkpointing_steps 2 --use_ema"
    arguments = (
        f"--pretrained_model_name_or_path me/tiny --train_data_dir {pictures} --train_batch_size 2 {options}"
        f" --cache_dir {tmp_path}/cache --logging_steps 1 --output_dir {tmp_path}/two --push_to_hub"
    )
    with monkeypatch.context() as environment:
        for name, value in {**hub.environment(), **world}.items():
            environment.setenv(name, value)
        torch.multiprocessing.spawn(run_as_one_of_two, (arguments.split(),), nprocs=2)

    two = tmp_path / "two"
    one = train("one", f"{options} --train_batch_size 4")
    accumulated = train("accumulated", f"{options} --gradient_accumulation_steps 2")
    for name in ("loss", "code_loss", "residual_mse", "residual_variational", "grad_norm"):
        assert metrics(two, name) == pytest.approx(metrics(one, name), rel=1e-5)
        assert metrics(accumulated, name) == pytest.approx(metrics(one, name), rel=1e-5)
    assert_same_weights(two, one, rtol=0, atol=1e-5)
    resumed = train("two", f"{options} --train_batch_size 4 --resume_from_checkpoint checkpoint-2")
    assert metrics(resumed) == pytest.approx(metrics(one), rel=1e-5)

    pushed = hub.repositories["me/two"].files
    folders = {path.name for path in tiny_pipeline.iterdir() if path.is_dir()}
    assert {path.split("/")[0] for path in pushed if "/" in path} == folders
    for model in ("transformer", "residual_mlp"):
        values = load(pushed[f"{model}/diffusion_pytorch_model.safetensors"])
        torch.testing.assert_close(values, weights(one, model), rtol=0, atol=1e-5)
    card = pushed["README.md"].decode()
    assert "base_model: me/tiny" in card and 'HARTPipeline.from_pretrained("me/two")' in card


def test_what_is_saved(train, tiny_pipeline, tmp_path):
    folder = train("run", "--max_train_steps 2 --learning_rate 1e-3 --license mit")
    for name in (
        "vae/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors",
        "tokenizer/tokenizer.json",
    ):
        assert (folder / name).read_bytes() == (tiny_pipeline / name).read_bytes()
    for model in ("transformer", "residual_mlp"):
        before, after = weights(tiny_pipeline, model), weights(folder, model)
        assert before.keys() == after.keys()
        assert all(not torch.equal(before[name], after[name]) for name in before)
    checkpoint = load_file(folder / "checkpoint-2" / "model.safetensors")
    assert all(torch.equal(checkpoint[f"transformer.{name}"], w) for name, w in weights(folder, "transformer").items())
    card = ModelCard.load(folder / "README.md")
    assert card.data.library_name == "diffusers" and card.data.license == "mit"
    assert card.data.pipeline_tag == "text-to-image" and card.data.base_model is None
    assert {"hart", "autoregressive"} < set(card.data.tags)
    assert "| Steps | 2 |" in card.text and str(tmp_path) not in card.text
    assert isinstance(DiffusionPipeline.from_pretrained(folder), HARTPipeline)


def test_averaged_weights(train):
    """With a decay of 0.5 the averages of the first weights are known, and the run itself is what it is without."""
    options = "--max_train_steps 3 --checkpointing_steps 1 --learning_rate 1e-3"
    plain = train("plain", options)
    averaged = train("averaged", f"{options} --use_ema --ema_decay 0.15")
    assert metrics(averaged) == metrics(plain)
    steps = [load_file(plain / f"checkpoint-{step}" / "model.safetensors") for step in (1, 2, 3)]
    for name, value in weights(averaged, "transformer").items():
        first, second, third = (step[f"transformer.{name}"] for step in steps)
        expected = 0.15 * (0.15 * first + 0.85 * second) + 0.85 * third
        torch.testing.assert_close(value, expected, rtol=0, atol=1e-6)


def test_validation_pictures(train, script):
    """The last grid is what the saved pipeline, with its averaged weights, draws of the prompts."""
    folder = train(
        "run",
        "--max_train_steps 3 --validation_steps 2 --num_validation_images 2 --use_ema --validation_guidance_scale 2",
        "--validation_prompt",
        "a red circle",
        "a house",
    )
    assert sorted(path.name for path in (folder / "validation").iterdir()) == ["step-000002.png", "step-000003.png"]
    grid = np.array(PIL.Image.open(folder / "validation" / "step-000003.png"))
    assert grid.shape == (256, 256, 3)
    pipe = HARTPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    rows = []
    for prompt in ("a red circle", "a house"):
        generators = [seeded_generator("cpu", 0, "validation", place) for place in range(2)]
        images = pipe(prompt, num_images_per_prompt=2, guidance_scale=2.0, generator=generators).images
        rows.append(np.concatenate([np.array(image) for image in images], axis=1))
    assert np.abs(np.concatenate(rows).astype(int) - grid).max() <= 1
    assert not np.array_equal(grid, np.array(PIL.Image.open(folder / "validation" / "step-000002.png")))


def test_mixed_precision_and_gradient_checkpointing(train):
    options = "--max_train_steps 2 --max_grad_norm 0.5"
    plain = train("plain", options)
    checkpointed = train("checkpointed", f"{options} --gradient_checkpointing")
    assert metrics(checkpointed) == pytest.approx(metrics(plain), rel=1e-5)
    AcceleratorState._reset_state(reset_partial_state=True)
    half = train("half", f"{options} --mixed_precision bf16")
    assert metrics(half) == pytest.approx(metrics(plain), rel=0.02)
    assert metrics(half) != metrics(plain)
    assert all(value.dtype == torch.float32 for value in weights(half, "transformer").values())


@pytest.mark.slow
def test_compiled_blocks_give_the_same_losses(train):
    """Over numbers of kept tokens that differ from step to step; the picture at the end is drawn without compiling."""
    options = "--max_train_steps 4 --num_validation_images 1"
    losses = [
        metrics(train(name, f"{options} {flag}", "--validation_prompt", "a red circle"), "loss")
        for name, flag in (("plain", ""), ("compiled", "--compile"))
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_new_models_of_other_sizes(train, tmp_path):
    (tmp_path / "transformer.json").write_text('{"num_layers": 1, "num_attention_heads": 2, "caption_length": 40}')
    (tmp_path / "residual_mlp.json").write_text('{"hidden_size": 32, "num_layers": 1}')
    options = (
        f"--from_scratch --transformer_config {tmp_path}/transformer.json"
        f" --residual_mlp_config {tmp_path}/residual_mlp.json --max_train_steps 2"
    )
    torch.manual_seed(1)
    first = train("first", options)
    torch.manual_seed(2)
    second = train("second", options)
    assert_same_weights(first, second)
    pipe = HARTPipeline.from_pretrained(first)
    config = pipe.transformer.config
    assert (config.num_layers, pipe.transformer.inner_dim, config.caption_channels) == (1, 32, 64)
    assert pipe.residual_mlp.config.condition_dim == pipe.residual_mlp.config.hidden_size == 32
    assert pipe.encode_prompt("a")[0].shape == (1, 40, 64)


def test_a_new_pipeline_of_a_tokenizer_and_a_text_encoder(script, tiny_pipeline, pictures, tmp_path):
    (tmp_path / "transformer.json").write_text(
        '{"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8, "caption_length": 40}'
    )
    (tmp_path / "residual_mlp.json").write_text('{"hidden_size": 32, "num_layers": 1}')
    (tmp_path / "scheduler.json").write_text('{"guidance_scale": 2.0, "schedules": [[1, 2, 4, 8], [1, 4]]}')
    common = (
        f"--vae_path {tiny_pipeline} --vae_subfolder vae --text_encoder_path {tiny_pipeline} --train_data_dir {pictures}"
        f" --transformer_config {tmp_path}/transformer.json --residual_mlp_config {tmp_path}/residual_mlp.json"
        f" --train_batch_size 2 --max_train_steps 2 --cache_dir {tmp_path}/cache --logging_steps 1"
    )
    options = f"--output_dir {tmp_path}/first --num_validation_images 1 --validation_prompt red"
    pipe = HARTPipeline.from_pretrained(script.main(f"{common} {options}".split()))
    assert (tmp_path / "first" / "validation" / "step-000002.png").exists()
    config = pipe.transformer.config
    assert (config.in_channels, config.codebook_size, config.caption_channels) == (8, 512, 64)
    assert (config.num_layers, config.sample_size, pipe.default_max_sequence_length) == (1, 8, 40)
    assert pipe.scheduler.scales(8) == (1, 2, 3, 4, 6, 8)  # the tokenizer's own beside the published
    for name in ("vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"):
        assert (tmp_path / "first" / name).read_bytes() == (tiny_pipeline / name).read_bytes()
    assert pipe("red", generator=torch.Generator().manual_seed(0)).images[0].size == (128, 128)

    options = f"--output_dir {tmp_path}/second --scheduler_config {tmp_path}/scheduler.json --resolution 64"
    pipe = HARTPipeline.from_pretrained(script.main(f"{common} {options}".split()))
    assert pipe.scheduler.config.guidance_scale == 2.0 and pipe.transformer.config.sample_size == 4
    assert pipe.scheduler.scales(4) == (1, 4)
    (tmp_path / "scheduler.json").write_text('{"scales": [1, 4]}')
    with pytest.raises(ValueError, match=r"HARTScheduler has no \['scales'\]; it has \['schedules'"):
        script.main(f"{common} {options}".split())


def test_one_warning_of_captions_that_are_cut(train, tmp_path, caplog):
    (tmp_path / "short.json").write_text('{"caption_length": 8}')
    train("run", f"--max_train_steps 6 --from_scratch --transformer_config {tmp_path}/short.json")
    messages = [record.getMessage() for record in caplog.records if "cut" in record.getMessage()]
    assert len(messages) == 1 and messages[0].startswith("Captions of more than 8 tokens are cut")


def test_a_learning_rate_that_decays_at_the_end(train):
    folder = train(
        "run", "--max_train_steps 4 --lr_scheduler warmup_stable_decay --lr_warmup_steps 1 --lr_decay_steps 2"
    )
    assert list(metrics(folder, "learning_rate").values()) == pytest.approx([0, 1e-4, 1e-4, 5e-5])


def test_another_resolution(train):
    folder = train("run", "--resolution 64 --max_train_steps 2 --no_token_drop")
    assert json.loads((folder / "transformer" / "config.json").read_text())["sample_size"] == 4
    pipe = HARTPipeline.from_pretrained(folder)
    assert pipe("a", generator=torch.Generator().manual_seed(0)).images[0].size == (64, 64)


def test_a_text_encoder_keeps_its_precision(script, tiny_pipeline, pictures, tmp_path):
    shutil.copytree(tiny_pipeline, tmp_path / "half")
    Qwen2Model.from_pretrained(tiny_pipeline / "text_encoder", dtype=torch.bfloat16).save_pretrained(
        tmp_path / "half" / "text_encoder"
    )
    options = f"--train_data_dir {pictures} --train_batch_size 2 --max_train_steps 1 --cache_dir {tmp_path}/cache"
    folder = script.main(
        f"--pretrained_model_name_or_path {tmp_path}/half --output_dir {tmp_path}/run {options}".split()
    )
    before, after = (load_file(path / "text_encoder" / "model.safetensors") for path in (tmp_path / "half", folder))
    assert all(torch.equal(before[name], after[name]) and after[name].dtype == torch.bfloat16 for name in before)


def test_a_pipeline_without_a_residual_mlp_gets_one(script, tiny_pipeline, pictures, tmp_path):
    pipe = HARTPipeline.from_pretrained(tiny_pipeline, residual_mlp=None, residual_scheduler=None)
    pipe.save_pretrained(tmp_path / "discrete")
    (tmp_path / "sizes.json").write_text('{"hidden_size": 48}')
    options = (
        f"--train_data_dir {pictures} --train_batch_size 2 --max_train_steps 1 --cache_dir {tmp_path}/cache"
        f" --residual_mlp_config {tmp_path}/sizes.json"
    )
    arguments = f"--pretrained_model_name_or_path {tmp_path}/discrete --output_dir {tmp_path}/run {options}"
    trained = HARTPipeline.from_pretrained(script.main(arguments.split()))
    config = trained.residual_mlp.config
    assert (config.in_channels, config.condition_dim, config.hidden_size) == (8, 64, 48)
    assert trained.residual_scheduler is not None


def test_any_iterable_of_pairs(train, pictures, tmp_path):
    (tmp_path / "pairs_for_the_script.py").write_text(
        "import PIL.Image\n"
        "def pairs():\n"
        "    for i in range(6):\n"
        f"        yield PIL.Image.open(f'{pictures}/{{i}}.png'), f'picture {{i}}'\n"
    )
    folder = train(
        "run",
        "--max_train_steps 4 --dataloader_num_workers 1",
        data=f"--train_iterable {tmp_path}/pairs_for_the_script.py:pairs",
    )
    assert list(metrics(folder)) == [1, 2, 3, 4]


@pytest.mark.parametrize("encode_prompts", [False, True], ids=["pictures", "pictures and captions"])
def test_targets_that_were_computed_before(encode_prompts, train, tiny_pipeline, pictures, tmp_path):
    options = f"--latents_dtype {'fp16' if encode_prompts else 'fp32'} {'--encode_prompts' if encode_prompts else ''}"
    folder = precompute(tiny_pipeline, pictures, tmp_path, options)
    plain = train("plain", "--max_train_steps 3")
    stored = train("stored", "--max_train_steps 3", data=f"--precomputed_data_dir {folder}")
    assert metrics(stored) == pytest.approx(metrics(plain), rel=5e-3 if encode_prompts else 1e-5)


def precompute(tiny_pipeline, pictures, tmp_path, options=""):
    arguments = (
        f"--pretrained_model_name_or_path {tiny_pipeline} --train_data_dir {pictures} --output_dir {tmp_path}/targets"
        f" --cache_dir {tmp_path}/cache --examples_per_shard 2 --batch_size 2 {options}"
    )
    return load_script("precompute_targets").main(arguments.split())


def test_computing_targets_goes_on_after_an_interruption(tiny_pipeline, tmp_path):
    pictures = write_pictures(tmp_path / "pictures")
    whole = (pictures / "5.png").read_bytes()
    (pictures / "5.png").write_bytes(whole[:100])
    with pytest.raises(UnreadableImage, match="5.png is not a readable picture"):
        precompute(tiny_pipeline, pictures, tmp_path)
    unfinished = tmp_path / "targets.unfinished"
    assert not (tmp_path / "targets").exists()
    finished = {path: path.stat().st_mtime_ns for path in unfinished.glob("shard-*/*.arrow")}
    assert len(finished) == 2
    with pytest.raises(FileExistsError, match="was begun with another tokenizer, resolution or settings"):
        precompute(tiny_pipeline, pictures, tmp_path, "--latents_dtype fp32")

    (pictures / "5.png").write_bytes(whole)
    folder = precompute(tiny_pipeline, pictures, tmp_path)
    assert not unfinished.exists()
    for path, written in finished.items():
        assert (folder / path.relative_to(unfinished)).stat().st_mtime_ns == written
    assert sorted(path.name for path in folder.iterdir()) == [*(f"shard-00000{i}" for i in range(3)), "targets.json"]
    assert sum(len(datasets.load_from_disk(str(shard))) for shard in folder.glob("shard-*")) == 6
    with pytest.raises(FileExistsError, match="exists already"):
        precompute(tiny_pipeline, pictures, tmp_path)


def test_bad_pictures_have_no_targets(tiny_pipeline, tmp_path, train):
    pictures = write_pictures(tmp_path / "pictures")
    for i in (2, 3, 4):
        (pictures / f"{i}.png").write_bytes(b"")
    folder = precompute(tiny_pipeline, pictures, tmp_path, "--on_bad_image skip")
    assert json.loads((folder / "targets.json").read_text())["num_examples"] == 3
    train("run", "--max_train_steps 3", data=f"--precomputed_data_dir {folder}")
    with pytest.raises(ValueError, match="has 3 examples, too few for one batch of 4"):
        train("small", "--train_batch_size 4", data=f"--precomputed_data_dir {folder}")


def test_targets_that_do_not_fit(train, tiny_pipeline, pictures, tmp_path):
    folder = precompute(tiny_pipeline, pictures, tmp_path, "--resolution 64")
    data = f"--precomputed_data_dir {folder}"
    with pytest.raises(ValueError, match=r"their scales is \[1, 2, 3, 4\], not \[1, 2, 3, 4, 6, 8\]"):
        train("run", data=data)
    assert metrics(train("run", "--resolution 64 --max_train_steps 1", data=data))
    with pytest.raises(ValueError, match="neither cropped nor flipped"):
        train("run", "--resolution 64 --random_flip", data=data)
    with pytest.raises(ValueError, match="name no other source"):
        train("run", f"--resolution 64 --train_data_dir {pictures}", data=data)
    with pytest.raises(ValueError, match="holds no pre-computed targets"):
        train("run", data=f"--precomputed_data_dir {pictures}")
    description = json.loads((folder / "targets.json").read_text())
    (folder / "targets.json").write_text(json.dumps(description | {"codebook": "0" * 32}))
    with pytest.raises(ValueError, match="their codebook is 0000"):
        train("run", "--resolution 64", data=data)


def test_captions_that_were_embedded_by_another_encoder(train, tiny_pipeline, pictures, tmp_path):
    folder = precompute(tiny_pipeline, pictures, tmp_path, "--encode_prompts")
    shutil.copytree(tiny_pipeline, tmp_path / "narrow")
    narrow = Qwen2Config.from_pretrained(tiny_pipeline / "text_encoder", hidden_size=32)
    Qwen2Model(narrow).save_pretrained(tmp_path / "narrow" / "text_encoder")
    (tmp_path / "narrow.json").write_text('{"caption_channels": 32}')
    start = f"--pretrained_model_name_or_path {tmp_path}/narrow --from_scratch"
    with pytest.raises(ValueError, match="are embedded in 64 channels, but the transformer reads 32"):
        train("run", f"{start} --transformer_config {tmp_path}/narrow.json", data=f"--precomputed_data_dir {folder}")


def test_a_loss_that_is_no_number_keeps_the_last_checkpoint(train, tmp_path):
    with pytest.raises(NonFiniteLoss, match="of step 2 is not finite"):
        train("run", "--learning_rate 1e30 --max_train_steps 4 --checkpointing_steps 1")
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["checkpoint-1"]
    assert not (tmp_path / "run" / "model_index.json").exists()
    saved = load_file(tmp_path / "run" / "checkpoint-1" / "model.safetensors")
    assert all(value.isfinite().all() for value in saved.values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--resolution 100", "--resolution 100 has no schedule of scales; this model has some for 64, 128 pixels"),
        ("--caption_column prompt", "no column 'prompt'"),
        ("--residual_mlp_config sizes.json", "add --from_scratch"),
        ("--num_scales 6", "--num_scales must be from 2 to 5, not 6"),
        ("--num_scales 3 --self_correction 0.5", "goes without --self_correction"),
        ("--train_batch_size 7", "has 6 examples, too few for one batch of 7"),
        ("--train_shards a.tar", "Name one source of training data"),
    ],
)
def test_contradictions(options, message, train, tmp_path):
    with pytest.raises(ValueError, match=message):
        train("run", options)
    assert not (tmp_path / "run" / "model_index.json").exists()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"depth": 3}, r"HARTTransformer2DModel has no \['depth'\]; it has \['in_channels'"),
        ({"caption_channels": 32}, "`caption_channels` is 32, but the text encoder's width is 64"),
        ({"codebook_size": 64}, "`codebook_size` is 64, but the codebook_size of the tokenizer is 512"),
        ({"num_levels": 3}, "embeddings of 3 levels, too few for the 6 scales"),
    ],
)
def test_new_models_that_do_not_fit(config, message, train, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        train("run", f"--from_scratch --transformer_config {tmp_path}/config.json")


def test_first_scales_alone(train, tiny_pipeline, tmp_path):
    """They are learnt, the run is saved and resumed, and what the residual alone uses stays as it was."""
    options = "--num_scales 3 --learning_rate 1e-3 --use_ema --checkpointing_steps 20"
    whole = train("whole", f"{options} --max_train_steps 40")
    assert metrics(whole, "code_loss")[40] < metrics(whole, "code_loss")[1]
    assert "1 2 3\n" in ModelCard.load(whole / "README.md").text.replace(" |", "\n")
    assert_same_weights(whole, tiny_pipeline, ["residual_mlp"])
    assert not torch.equal(*(weights(f, "transformer")["proj_out.weight"] for f in (whole, tiny_pipeline)))
    shutil.copytree(whole / "checkpoint-20", tmp_path / "again" / "checkpoint-20")
    again = train("again", f"{options} --max_train_steps 40 --resume_from_checkpoint latest")
    assert_same_weights(again, whole)


def test_unreadable_pictures(train, tmp_path):
    pictures = write_pictures(tmp_path / "pictures")
    whole = (pictures / "3.png").read_bytes()
    (pictures / "3.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UnreadableImage, match="3.png is not a readable picture"):
        train("error", "--max_train_steps 3", data=f"--train_data_dir {pictures}")
    folder = train("skip", "--max_train_steps 3 --on_bad_image skip", data=f"--train_data_dir {pictures}")
    assert metrics(folder, "skipped_images")[3] == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("", "either --pretrained_model_name_or_path or, for a new pipeline, --vae_path and --text_encoder_path are"),
        ("--vae_path a", "--vae_path and --text_encoder_path are needed"),
        ("--pretrained_model_name_or_path a --text_encoder_path a", "--vae_path and --text_encoder_path are needed"),
        ("--pretrained_model_name_or_path a --scheduler_config a", "--scheduler_config is of a new pipeline"),
        ("--caption_dropout 1.5", "--caption_dropout: must be from 0 to 1, not 1.5"),
        ("--ema_decay x", "--ema_decay: must be from 0 to 1, not x"),
        ("--train_batch_size 0", "--train_batch_size: must be a whole number from 1, not 0"),
        ("--checkpointing_steps -1", "--checkpointing_steps: must be a whole number from 1, not -1"),
    ],
)
def test_arguments_out_of_range(options, message, script, tmp_path, capsys):
    with pytest.raises(SystemExit):
        script.main(["--output_dir", str(tmp_path), *options.split()])
    assert message in capsys.readouterr().err
