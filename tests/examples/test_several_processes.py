# SPDX-License-Identifier: Apache-2.0
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import load_file

from diffusers_hart import HARTScheduler
from diffusers_hart.random_pipeline import random_pipeline


EXAMPLES = Path(__file__).parents[2] / "examples"
PROMPTS = ["a red circle", "a house", "a blue square", "a very green field", "a boat"]


def load_script(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def launch(config, *arguments):
    """Two processes of `accelerate launch`, by one of the configurations of examples/accelerate."""
    source = str(Path(__file__).parents[2] / "src")
    environment = os.environ | {
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, [source, os.environ.get("PYTHONPATH")])),
    }
    options = f"--config_file {EXAMPLES}/accelerate/{config}.yaml --mixed_precision no --main_process_port 0".split()
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", *options, *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process, seconds=120):
    """What a launch printed, after it ended; one that hangs is ended."""
    try:
        return process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.terminate()  # which the launcher passes on
        raise


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
    pipe = random_pipeline()
    pipe.register_modules(scheduler=HARTScheduler(schedules=((1, 2, 3, 4, 6, 8), (1, 2, 3, 4))))
    pipe.save_pretrained(folder)
    return folder


def losses(folder):
    with open(folder / "metrics.jsonl") as file:
        return {line["step"]: line["loss"] for line in map(json.loads, file)}


def assert_same_weights(first, second, atol=0.0):
    for model in ("transformer", "residual_mlp"):
        a, b = (load_file(folder / model / "diffusion_pytorch_model.safetensors") for folder in (first, second))
        torch.testing.assert_close(a, b, rtol=0, atol=atol)


def test_sharded_and_whole_runs_go_on_with_each_others_checkpoints(tiny_pipeline, tmp_path):
    """FSDP 2, DDP and one process with the same global batch give one run, wherever it is interrupted."""
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for i in range(6):
        patches = np.random.default_rng(i).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        PIL.Image.fromarray(patches).resize((128, 128), PIL.Image.Resampling.NEAREST).save(pictures / f"{i}.png")
    lines = [json.dumps({"file_name": f"{i}.png", "text": f"picture {i}"}) for i in range(6)]
    (pictures / "metadata.jsonl").write_text("\n".join(lines))

    def arguments(name, batch_size, options=""):
        data = (
            f"--pretrained_model_name_or_path {tiny_pipeline} --train_data_dir {pictures} --cache_dir {tmp_path}/cache"
        )
        run = f"--max_train_steps 4 --checkpointing_steps 2 --use_ema --logging_steps 1 --output_dir {tmp_path}/{name}"
        return f"{data} {run} --train_batch_size {batch_size} {options}".split()

    def resumed(name, source):
        return arguments(name, 2, f"--resume_from_checkpoint {tmp_path}/{source}/checkpoint-2")

    runs = [
        (True, arguments("sharded", 2)),
        (True, resumed("sharded_of_sharded", "sharded")),
        (False, resumed("whole_of_sharded", "sharded")),
        (False, arguments("whole", 2)),
        (True, resumed("sharded_of_whole", "whole")),
        (True, arguments("half", 2, "--mixed_precision bf16")),
    ]
    script = EXAMPLES / "train_text_to_image.py"
    process = launch("fsdp2", Path(__file__).with_name("runs_in_one_launch.py"), script, tmp_path, json.dumps(runs))
    _, errors = finish(process)
    assert process.returncode == 0, errors[-4000:]
    train = load_script("train_text_to_image").main
    one = train(arguments("one", 4))
    resumed_by_one = train(arguments("one_of_sharded", 2, "--gradient_accumulation_steps 2"
                                     f" --resume_from_checkpoint {tmp_path}/sharded/checkpoint-2"))  # fmt: skip
    AcceleratorState._reset_state(reset_partial_state=True)
    half = train(arguments("half_by_one", 4, "--mixed_precision bf16"))

    expected = losses(one)
    for name in ("sharded", "whole"):
        assert losses(tmp_path / name) == pytest.approx(expected, rel=1e-5)
        assert_same_weights(tmp_path / name, one, atol=1e-5)
    for folder in (
        *(tmp_path / f"{a}_of_{b}" for a, b in (("whole", "sharded"), ("sharded", "whole"))),
        resumed_by_one,
    ):
        assert losses(folder) == pytest.approx({step: expected[step] for step in (3, 4)}, rel=1e-5)
        assert_same_weights(folder, one, atol=1e-5)
    sharded = losses(tmp_path / "sharded")
    assert losses(tmp_path / "sharded_of_sharded") == {step: sharded[step] for step in (3, 4)}
    assert_same_weights(tmp_path / "sharded_of_sharded", tmp_path / "sharded")
    assert losses(tmp_path / "half") == pytest.approx(losses(half), rel=2e-3)
    assert losses(half) != pytest.approx(expected, rel=1e-4)

    files = [{path.name for path in (tmp_path / name / "checkpoint-2").iterdir()} for name in ("sharded", "whole")]
    assert files[0] == files[1]


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prompts")
    (folder / "first.txt").write_text("\n\n".join(PROMPTS[:2]))
    (folder / "second.jsonl").write_text("\n".join(json.dumps({"text": prompt}) for prompt in PROMPTS[2:]))
    return [str(folder / "first.txt"), str(folder / "second.jsonl")]


@pytest.fixture
def draw_arguments(tiny_pipeline, prompts):
    def arguments(output_dir, options="--batch_size 1"):
        names = f"--model {tiny_pipeline} --output_dir {output_dir} --num_inference_steps 2 --seed 7 {options}"
        return [*names.split(), "--prompts", *prompts]

    return arguments


@pytest.fixture
def draw(draw_arguments):
    script = load_script("generate_distributed")
    return lambda *arguments: script.main(draw_arguments(*arguments))


def pixels(folder):
    return [np.array(PIL.Image.open(path)).astype(int) for path in sorted(folder.glob("*.png"))]


def test_one_process_fails_and_another_run_goes_on(draw, draw_arguments, tmp_path, capsys):
    """The last prompt is of the second process, whose file cannot be written."""
    blocked = tmp_path / "two" / "000004.png.unfinished"
    blocked.mkdir(parents=True)
    process = launch("ddp", EXAMPLES / "generate_distributed.py", *draw_arguments(tmp_path / "two"), "--json")
    output, errors = finish(process)
    assert process.returncode == 1
    assert "process 1 of 2 failed while drawing 000004.png ('a boat'), it will exit with code 1: IsADir" in errors
    summary = json.loads(output[output.index("{") :])
    assert (summary["pictures"], summary["drawn"], summary["processes"]) == (5, 4, 2)
    (failure,) = summary["failures"]
    assert (failure["process"], failure["at"], failure["exit_code"]) == (1, "drawing 000004.png ('a boat')", 1)

    # The others are there; the same command, by one process now, draws what is missing and nothing else.
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "two").glob("*.png")}
    assert sorted(path.name for path in written) == [f"00000{i}.png" for i in range(4)]
    blocked.rmdir()
    summary = draw(tmp_path / "two")
    assert (summary["already_there"], summary["drawn"], summary["failures"]) == (4, 1, [])
    assert {path: path.stat().st_mtime_ns for path in written} == written
    assert "1 pictures drawn by 1 processes" in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == [
        *(f"00000{i}.png" for i in range(5)),
        "metadata.jsonl",
    ]

    # All in the order of the prompts, and as one process draws them.
    with open(tmp_path / "two" / "metadata.jsonl") as file:
        assert [*map(json.loads, file)] == [
            {"file_name": f"00000{i}.png", "text": prompt, "seed": 7 + i} for i, prompt in enumerate(PROMPTS)
        ]
    draw(tmp_path / "one", "--batch_size 5 --warmup_batches 1")
    drawn, expected = pixels(tmp_path / "two"), pixels(tmp_path / "one")
    assert len(drawn) == len(expected) == 5
    errors = np.array([[np.abs(a - b).mean() for b in expected] for a in drawn])
    assert errors.diagonal().max() < 0.5 and (errors + 100 * np.eye(5)).min() > 1


def test_a_killed_process_is_named(draw_arguments, tmp_path):
    arguments = draw_arguments(tmp_path / "two", "--batch_size 1 --num_images_per_prompt 40")
    process = launch("ddp", EXAMPLES / "generate_distributed.py", *arguments)
    note = tmp_path / "two" / "process-1.at-work"
    for _ in range(1200):
        if note.exists() and (text := note.read_text()):
            break
        assert process.poll() is None
        time.sleep(0.05)
    os.kill(json.loads(text)["pid"], signal.SIGKILL)
    _, errors = finish(process, 60)
    assert process.returncode != 0
    assert f"process 1 was killed while drawing {json.loads(note.read_text())['drawing']}; process 0 stops" in errors
    assert "exitcode  : -9" in errors and "rank      : 1" in errors
    assert len(list((tmp_path / "two").glob("*.png"))) < 200


def test_pictures_of_other_settings_are_not_taken_for_these(draw, tmp_path):
    assert draw(tmp_path / "out")["drawn"] == 5
    before = pixels(tmp_path / "out")
    for options, reason in (("--top_k 5", "top_k None, not 5"), ("--seed 3", "seed 7, not 3")):
        with pytest.raises(FileExistsError, match=f"000000.png was drawn with {reason}: choose another --output_dir"):
            draw(tmp_path / "out", options)
    assert all(np.array_equal(a, b) for a, b in zip(before, pixels(tmp_path / "out"), strict=True))


def test_a_checkpoint_of_shards_of_another_kind(tmp_path):
    from accelerate import Accelerator

    from diffusers_hart.training.checkpoints import resume_from_checkpoint

    (tmp_path / "checkpoint-1" / "pytorch_model_fsdp_0").mkdir(parents=True)
    (tmp_path / "checkpoint-1" / "progress.json").write_text('{"step": 1}')
    with pytest.raises(ValueError, match="holds pytorch_model_fsdp_0, shards as FSDP 1 saves them"):
        resume_from_checkpoint(Accelerator(), tmp_path, "latest")
