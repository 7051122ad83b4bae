# SPDX-License-Identifier: Apache-2.0
import importlib.util
import subprocess
import sys
from pathlib import Path

import torch

from diffusers_hart import HARTPipeline
from diffusers_hart.conversion import convert_hart_to_diffusers
from diffusers_hart.conversion.comparison import compare


SCRIPTS = Path(__file__).parents[2] / "conversion"
# The interface of the original on our models: what is tested is the script, agreement is what golden tensors show.
ORIGINAL_CODE = Path(__file__).parent / "original_code"


def run(script: str, *arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, SCRIPTS / script, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def load(script: str):
    spec = importlib.util.spec_from_file_location(script.removesuffix(".py"), SCRIPTS / script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_there_and_back(golden, text_encoder, tmp_path, assert_same_tensors):
    original = golden / "t2i_tiny" / "original"
    there = run(
        "convert_hart_to_diffusers.py",
        *("--checkpoint_path", original),
        *("--text_encoder_path", text_encoder("t2i_tiny")),
        *("--dump_path", tmp_path / "there"),
        *("--system_prompt", ORIGINAL_CODE),
        *("--license", "mit"),
        "--self_contained",
    )
    assert there.returncode == 0, there.stderr
    assert there.stdout.strip() == f"Wrote {tmp_path / 'there'}"
    pipe = HARTPipeline.from_pretrained(tmp_path / "there")
    assert pipe.config.system_prompt == 'Describe the "picture".\nPrompt:\n'
    card = (tmp_path / "there" / "README.md").read_text()
    assert "license: mit" in card and "trust_remote_code=True" in card
    assert (tmp_path / "there" / "pipeline_hart.py").is_file()
    assert (tmp_path / "there" / "vae" / "autoencoder_hybrid.py").is_file()

    back = run("convert_diffusers_to_hart.py", "--model_path", tmp_path / "there", "--dump_path", tmp_path / "back")
    assert back.returncode == 0, back.stderr
    assert_same_tensors(
        torch.load(tmp_path / "back" / "llm" / "ema_model.bin"), torch.load(original / "llm" / "ema_model.bin")
    )


def test_options_and_errors(golden, text_encoder, checkpoint, tmp_path, capsys):
    main = load("convert_hart_to_diffusers.py").main
    weights = torch.load(checkpoint / "llm" / "ema_model.bin")
    torch.save(weights | {"surprise": torch.zeros(1)}, checkpoint / "llm" / "ema_model.bin")
    arguments = ["--checkpoint_path", checkpoint, "--text_encoder_path", text_encoder("t2i_tiny")]
    arguments += ["--dump_path", tmp_path / "out", "--dtype", "bf16", "--system_prompt", "Draw:"]
    arguments = [str(argument) for argument in arguments]

    assert main(arguments) == 1
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "1 unknown: surprise" in error
    assert not (tmp_path / "out").exists()

    assert main([*arguments, "--allow_extra_keys"]) == 0
    pipe = HARTPipeline.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    assert pipe.config.system_prompt == "Draw:"

    assert main([*arguments, "--allow_extra_keys"]) == 1
    assert "is not empty" in capsys.readouterr().err


def test_errors_on_the_way_back(tmp_path, capsys):
    main = load("convert_diffusers_to_hart.py").main
    assert main(["--model_path", str(tmp_path), "--dump_path", str(tmp_path / "back")]) == 1
    assert capsys.readouterr().err == f"error: There is no {tmp_path / 'transformer' / 'config.json'}.\n"


def test_verification(golden, text_encoder, tmp_path, capsys):
    original = golden / "t2i_tiny" / "original"
    folder = convert_hart_to_diffusers(original, text_encoder("t2i_tiny"), tmp_path / "converted")
    arguments = ["--original_code", ORIGINAL_CODE, "--checkpoint_path", original, "--model_path", folder]
    arguments += ["--text_encoder_path", text_encoder("t2i_tiny"), "--device", "cpu"]
    arguments += ["--prompt", "a red circle", "two cats"]
    status = load("verify_conversion.py").main([str(argument) for argument in arguments])
    table = capsys.readouterr().out
    assert status == 0, table
    stages = [line.split()[0] for line in table.splitlines()[1:]]
    assert len(stages) == 13 and stages[0] == "text.embeds" and stages[-1] == "picture.image"
    assert all(line.endswith("pass") for line in table.splitlines()[1:])


def test_verification_fails_if_a_stage_does(capsys):
    rows = compare({"a": torch.zeros(1), "b": torch.zeros(1)}, {"a": torch.zeros(1), "b": torch.ones(1)})
    assert load("verify_conversion.py").report(rows) == 1
    assert [line.split()[-1] for line in capsys.readouterr().out.splitlines()] == ["verdict", "pass", "FAIL"]


def test_verification_without_an_original(tmp_path, capsys):
    arguments = ["--original_code", tmp_path, "--checkpoint_path", tmp_path, "--text_encoder_path", tmp_path]
    arguments += ["--model_path", tmp_path]
    assert load("verify_conversion.py").main([str(argument) for argument in arguments]) == 1
    assert "pass a checkout of the original code" in capsys.readouterr().err
