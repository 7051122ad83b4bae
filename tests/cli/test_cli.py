# SPDX-License-Identifier: Apache-2.0
import io
import json
import shutil
import signal
import subprocess
import sys

import numpy as np
import PIL.Image
import pytest
import torch
from command_line import fails
from safetensors.torch import load_file

from diffusers_hart import HARTClassConditionalPipeline, HARTPipeline, HARTTransformer2DModel, __version__
from diffusers_hart.cli import main
from diffusers_hart.random_pipeline import random_pipeline


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with other weights than those that are drawn with by default."""
    folder = tmp_path_factory.mktemp("saved")
    pipe = random_pipeline(seed=1)
    HARTPipeline(**pipe.components, system_prompt="Draw:\nwell").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def classes(tmp_path_factory):
    """A class-conditional pipeline in half precision and its variant, without residual."""
    folder = tmp_path_factory.mktemp("classes")
    source = random_pipeline()
    transformer = HARTTransformer2DModel(
        in_channels=8,
        codebook_size=512,
        num_layers=1,
        num_attention_heads=1,
        attention_head_dim=16,
        caption_channels=None,
        num_classes=3,
        sample_size=8,
    )
    pipe = HARTClassConditionalPipeline(transformer, source.vae, source.scheduler)
    pipe.save_pretrained(folder, max_shard_size="500KB")
    half = HARTClassConditionalPipeline.from_pretrained(folder, dtype=torch.float16)
    half.save_pretrained(folder, variant="fp16")
    return folder


def pixels(path):
    with PIL.Image.open(path) as image:
        return np.asarray(image).astype(int)


def metadata(path):
    with PIL.Image.open(path) as image:
        return image.text


def parameters(path):
    return json.loads(metadata(path)["parameters"])


def test_generate_writes_a_picture_and_how_it_was_drawn(capsys, tmp_path):
    prompt = "a \u2b50 in a caf\u00e9"
    assert main(["generate", prompt, "-o", "out.png", "--seed", "5"]) == 0
    captured = capsys.readouterr()
    assert captured.out == "out.png\n"
    assert pixels("out.png").shape == (128, 128, 3)
    assert [path.name for path in tmp_path.iterdir()] == ["out.png"]
    assert metadata("out.png")["prompt"] == prompt
    assert metadata("out.png")["seed"] == "5"
    written = parameters("out.png")
    assert written.pop("versions")["diffusers-hart"] == __version__
    assert written.pop("device") in ("cpu", "cuda", "mps")
    assert written == {
        "prompt": prompt,
        "seed": 5,
        "negative_prompt": None,
        "height": 128,
        "width": 128,
        "guidance_scale": 1.0,
        "num_inference_steps": 8,
        "top_k": None,
        "top_p": None,
        "smooth": True,
        "residual_temperature": 1.0,
        "system_prompt": None,
        "model": "the shapes model of the package",
        "dtype": "float32",
    }


def test_prompt_and_seed_decide_the_picture():
    for name, prompt, seed in (("a", "cat", "0"), ("b", "cat", "0"), ("c", "dog", "0"), ("d", "cat", "1")):
        assert main(["generate", prompt, "-o", f"{name}.png", "--seed", seed, "--device", "cpu"]) == 0
    assert np.array_equal(pixels("a.png"), pixels("b.png"))
    assert not np.array_equal(pixels("a.png"), pixels("c.png"))
    assert not np.array_equal(pixels("a.png"), pixels("d.png"))


def test_without_a_seed_one_is_drawn_told_and_written_down(capsys):
    assert main(["generate", "cat", "-o", "a.png", "--device", "cpu"]) == 0
    seed = metadata("a.png")["seed"]
    assert f"diffusers-hart: seed {seed}\n" in capsys.readouterr().err
    assert main(["generate", "cat", "-o", "b.png", "--seed", seed, "--device", "cpu"]) == 0
    assert np.array_equal(pixels("a.png"), pixels("b.png"))
    assert main(["generate", "cat", "-o", "c.png", "--device", "cpu"]) == 0
    assert metadata("c.png")["seed"] != seed


def test_each_of_several_pictures_can_be_drawn_alone(capsys):
    assert main(["generate", "cat", "-o", "out.png", "--seed", "7", "--num-images", "3", "--device", "cpu"]) == 0
    assert capsys.readouterr().out.split() == ["out-0.png", "out-1.png", "out-2.png"]
    for i in range(3):
        assert metadata(f"out-{i}.png")["seed"] == str(parameters(f"out-{i}.png")["seed"]) == str(7 + i)
        assert main(["generate", "cat", "-o", "alone.png", "--seed", str(7 + i), "--device", "cpu"]) == 0
        # A batch rounds otherwise than a single picture, and smoothing amplifies that: some places may differ.
        assert (np.abs(pixels("alone.png") - pixels(f"out-{i}.png")) > 5).mean() < 0.05
    assert np.abs(pixels("out-0.png") - pixels("out-1.png")).max() > 50


def test_several_prompts_a_file_of_them_and_a_grid(capsys, tmp_path, monkeypatch):
    (tmp_path / "prompts.txt").write_text("a blue dog\n\n  a green bird \n", encoding="utf-8")
    options = ["--seed", "7", "--device", "cpu", "--batch-size", "4", "--num-images", "2", "--grid", "grid.png"]
    assert main(["generate", "a cat", "--prompts", "prompts.txt", "-o", "out.png", *options]) == 0
    names = [f"out-{i}.png" for i in range(6)]
    assert capsys.readouterr().out.split() == [*names, "grid.png"]
    drawn = [(parameters(name)["prompt"], parameters(name)["seed"]) for name in names]
    prompts = ("a cat", "a blue dog", "a green bird")
    assert drawn == [(prompt, seed) for prompt in prompts for seed in (7, 8)]
    grid = pixels("grid.png")
    assert grid.shape == (3 * 128, 2 * 128, 3)
    for i, name in enumerate(names):
        row, column = 128 * (i // 2), 128 * (i % 2)
        assert np.array_equal(grid[row : row + 128, column : column + 128], pixels(name))
    pictures = json.loads(metadata("grid.png")["pictures"])
    assert [picture["path"] for picture in pictures] == names
    # A batch rounds otherwise than a single picture, by some levels of 255; smoothing may turn that into another code,
    # and a small part of the picture with it.
    assert main(["generate", "a blue dog", "-o", "alone.png", "--seed", "8", "--device", "cpu"]) == 0
    differences = [np.abs(pixels("alone.png").astype(int) - pixels(name)) for name in names]
    assert np.argmin([difference.mean() for difference in differences]) == 3
    assert (differences[3] > 5).mean() < 0.05

    monkeypatch.setattr("sys.stdin", io.StringIO("a cat\na dog\na bird\n"))
    assert main(["generate", "--prompts", "-", "--seed", "7", "--device", "cpu", "--grid", "three.png"]) == 0
    assert capsys.readouterr().out.split()[-4:] == ["hart-0.png", "hart-1.png", "hart-2.png", "three.png"]
    grid = pixels("three.png")
    assert grid.shape == (256, 256, 3) and (grid[128:, 128:] == 255).all()


def test_generate_for_scripts(capsys):
    assert main(["generate", "cat", "dog", "--seed", "3", "--device", "cpu", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["grid"] is None
    for picture, prompt, path in zip(result["pictures"], ("cat", "dog"), ("hart-0.png", "hart-1.png"), strict=True):
        assert picture == {"path": path, **parameters(path)}
        assert picture["prompt"] == prompt and picture["seed"] == 3


def test_files_without_prompts(capsys, tmp_path):
    (tmp_path / "empty.txt").write_text("\n \n")
    assert "no prompts in empty.txt" in fails(capsys, "generate", "--prompts", "empty.txt")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe")
    assert "bytes.txt must be UTF-8 text" in fails(capsys, "generate", "--prompts", "bytes.txt")
    assert "No such file" in fails(capsys, "generate", "--prompts", "missing.txt")
    assert "as '.xyz'" in fails(capsys, "generate", "cat", "--grid", "grid.xyz")
    assert not list(tmp_path.glob("*.png"))


def test_an_error_that_nobody_expects_is_one_line_too(capsys, monkeypatch):
    def overflow(self, *arguments, **options):
        raise torch.OutOfMemoryError("out of\nmemory")

    monkeypatch.setattr(HARTPipeline, "__call__", overflow)
    line = fails(capsys, "generate", "cat", "--device", "cpu")
    assert line == "diffusers-hart: error: OutOfMemoryError: out of memory (--debug shows where)"
    with pytest.raises(torch.OutOfMemoryError):
        main(["generate", "cat", "--device", "cpu", "--debug"])


@pytest.mark.parametrize(
    ("option", "name", "value"),
    [
        (["--guidance-scale", "0"], "guidance_scale", 0.0),
        (["--negative-prompt", "blue"], "negative_prompt", "blue"),
        (["--system-prompt", "Draw:"], "system_prompt", "Draw:"),
        (["--steps", "3"], "num_inference_steps", 3),
        (["--top-k", "1"], "top_k", 1),
        (["--top-p", "0.2"], "top_p", 0.2),
        (["--no-smooth"], "smooth", False),
        (["--residual-temperature", "0.5"], "residual_temperature", 0.5),
        (["--dtype", "bfloat16"], "dtype", "bfloat16"),
    ],
)
def test_an_option_changes_the_picture_and_is_written_down(option, name, value):
    command = ["generate", "cat", "--seed", "0", "--device", "cpu"]
    assert main([*command, "-o", "plain.png"]) == 0
    assert main([*command, "-o", "changed.png", *option]) == 0
    plain, changed = parameters("plain.png"), parameters("changed.png")
    assert changed == {**plain, name: value} != plain
    assert not np.array_equal(pixels("plain.png"), pixels("changed.png"))


def test_the_size_may_be_given(capsys):
    assert main(["generate", "cat", "--seed", "0", "--height", "128", "--width", "128"]) == 0
    assert pixels("hart.png").shape == (128, 128, 3)
    assert "squares of 128 pixels" in fails(capsys, "generate", "cat", "--height", "256")


def test_a_model_from_a_folder(saved, capsys):
    command = ["generate", "cat", "--seed", "0", "--device", "cpu"]
    assert main([*command, "-o", "a.png", "--model", str(saved)]) == 0
    assert parameters("a.png")["model"] == str(saved)
    assert parameters("a.png")["system_prompt"] == "Draw:\nwell"
    assert main([*command, "-o", "b.png", "--model", str(saved), "--dtype", "bfloat16"]) == 0
    assert main([*command, "-o", "c.png"]) == 0
    assert not np.array_equal(pixels("a.png"), pixels("b.png"))
    assert not np.array_equal(pixels("a.png"), pixels("c.png"))


def test_other_formats_are_written_without_metadata(capsys):
    assert main(["generate", "cat", "-o", "out.webp", "--seed", "0"]) == 0
    assert ".webp files are written without" in capsys.readouterr().err
    with PIL.Image.open("out.webp") as image:
        assert image.format == "WEBP" and image.size == (128, 128)
        assert "prompt" not in image.info


def test_a_later_picture_that_cannot_be_written_is_found_in_time(capsys, tmp_path):
    (tmp_path / "out-1.png").mkdir()
    line = fails(capsys, "generate", "cat", "-o", "out.png", "--num-images", "2")
    assert "cannot be written to out-1.png: Is a directory" in line
    assert not (tmp_path / "out-0.png").exists()


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("out.xyz", "pictures cannot be written as '.xyz'"),
        ("out.xbm", "pictures cannot be written as '.xbm'"),
        ("out", "pictures cannot be written as ''"),
        ("missing/out.png", "cannot be written to missing: No such file or directory"),
        ("file/out.png", "cannot be written to file: Not a directory"),
        ("folder.png", "cannot be written to folder.png: Is a directory"),
    ],
)
def test_a_place_that_cannot_be_written_is_refused_before_anything_is_drawn(output, message, capsys, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.png").mkdir()
    before = sorted(tmp_path.rglob("*"))
    assert main(["generate", "cat", "-o", output]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("diffusers-hart: error: ") and message in line
    assert sorted(tmp_path.rglob("*")) == before


def test_errors_are_one_line_and_leave_nothing(capsys, tmp_path, saved, classes):
    assert "`guidance_scale` must be 0" in fails(capsys, "generate", "cat", "--guidance-scale", "-1")
    assert "`top_p` must be above 0" in fails(capsys, "generate", "cat", "--top-p", "2")
    assert "nothing/here" in fails(capsys, "generate", "cat", "--model", "./nothing/here")
    assert "model_index.json" in fails(capsys, "generate", "cat", "--model", str(tmp_path))
    assert "HARTPipeline" in fails(capsys, "generate", "cat", "--model", str(classes))
    assert list(tmp_path.iterdir()) == []
    absent = "mps" if torch.cuda.is_available() else "cuda"
    assert f"no {absent} device" in fails(capsys, "generate", "cat", "--device", absent)


def test_debug_shows_where_an_error_comes_from():
    with pytest.raises(ValueError, match="`top_k` must be a positive integer, not 0"):
        main(["generate", "cat", "--top-k", "0", "--debug"])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "required: command"),
        (["draw"], "invalid choice: 'draw'"),
        (["generate"], "required: prompt or --prompts"),
        (["generate", "cat", "--seed", "-1"], "must be an integer from 0 to 2**63 - 1, not -1"),
        (["generate", "cat", "--seed", str(2**63)], "must be an integer from 0 to 2**63 - 1"),
        (["generate", "cat", "--seed", "x"], "must be an integer from 0 to 2**63 - 1, not x"),
        (["generate", "cat", "--num-images", "0"], "must be a positive integer, not 0"),
        (["generate", "cat", "--dtype", "float8"], "invalid choice: 'float8'"),
        (["generate", "cat", "--batch-size", "0"], "must be a positive integer, not 0"),
        (["info"], "required: model"),
        (["reconstruct"], "required: picture"),
        (["reconstruct", "a.png", "--size", "x"], "must be a positive integer, not x"),
        (["convert", "in", "out"], "required: --text-encoder"),
        (["push", "folder"], "required: repository"),
    ],
)
def test_wrong_usage(argv, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_an_interrupt_ends_without_a_picture(tmp_path):
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    try:
        assert main(["generate", "cat", "--steps", "1000", "--num-images", "8"]) == 130
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert list(tmp_path.iterdir()) == []


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"diffusers-hart {__version__}\n"


def test_in_a_pipe_it_says_what_matters_and_nothing_else(saved):
    command = [sys.executable, "-m", "diffusers_hart", "generate", "cat", "--seed", "0", "--model", str(saved)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert (run.returncode, run.stdout, run.stderr) == (0, "hart.png\n", "")


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_is_shown_on_a_terminal_alone(terminal, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    assert main(["generate", "cat", "dog", "--seed", "0", "--device", "cpu", "--batch-size", "1"]) == 0
    captured = capsys.readouterr()
    assert ("2/2" in captured.err) == terminal
    assert captured.out == "hart-0.png\nhart-1.png\n"


def test_info_counts_what_is_in_the_files(saved, capsys):
    assert main(["info", str(saved), "--json"]) == 0
    description = json.loads(capsys.readouterr().out)
    assert description["pipeline"] == "HARTPipeline"
    assert description["bytes"] == sum(path.stat().st_size for path in saved.rglob("*") if path.is_file())
    assert description["schedules"] == [{"pixels": 128, "scales": [1, 2, 3, 4, 6, 8]}]
    assert description["num_classes"] is None
    assert description["defaults"] == {
        "guidance_scale": 4.5,
        "num_inference_steps": 8,
        "max_sequence_length": 128,
        "system_prompt": "Draw:\nwell",
    }
    components = description["components"]
    assert components["transformer"]["class"] == "HARTTransformer2DModel"
    assert components["text_encoder"] | {"weights": [], "bytes": 0} == {
        "library": "transformers",
        "class": "Qwen2Model",
        "weights": [],
        "bytes": 0,
    }
    assert components["scheduler"]["weights"] == components["tokenizer"]["weights"] == []
    for name, component in components.items():
        assert component["bytes"] == sum(path.stat().st_size for path in (saved / name).iterdir())
        for weights in component["weights"]:
            (file,) = (saved / name).glob("*.safetensors")
            count = sum(value.numel() for value in load_file(file).values())
            assert weights == {
                "variant": None,
                "parameters": count,
                "dtypes": {"float32": count},
                "bytes": file.stat().st_size,
            }
    assert sum(bool(component["weights"]) for component in components.values()) == 4


def test_info_knows_variants_shards_classes_and_what_is_left_out(classes, capsys):
    assert main(["info", str(classes), "--json"]) == 0
    description = json.loads(capsys.readouterr().out)
    assert description["pipeline"] == "HARTClassConditionalPipeline"
    assert description["num_classes"] == 3
    assert description["defaults"] == {"guidance_scale": 4.5, "num_inference_steps": 0}
    assert sorted(description["components"]) == ["scheduler", "transformer", "vae"]
    plain, half = description["components"]["vae"]["weights"]
    assert (plain["variant"], half["variant"]) == (None, "fp16")
    assert plain["parameters"] == half["parameters"] == sum(plain["dtypes"].values())
    assert list(plain["dtypes"]) == ["float32"] and sorted(half["dtypes"]) == ["float16", "float32"]
    assert len(list((classes / "vae").glob("*-of-*.safetensors"))) > 1


def test_info_for_people(saved, classes, capsys):
    assert main(["info", str(saved)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"HARTPipeline in {saved}"
    (row,) = [line.split() for line in lines if line.startswith("residual_mlp")]
    assert row == ["residual_mlp", "ResidualDiffusionMLP", "76,560", "float32", "0.3", "MB"]
    assert "128 px in 6 scales: 1 2 3 4 6 8" in lines
    assert "guidance_scale: 4.5" in lines
    assert 'system_prompt: "Draw:\\nwell"' in lines
    assert main(["info", str(classes)]) == 0
    output = capsys.readouterr().out
    assert "3 classes" in output and "vae (fp16)" in output


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_class_name": "SanaPipeline"}, "is a SanaPipeline, not one of HARTPipeline, HARTClassConditionalPipeline"),
        ({"vae": [None, None]}, "has no vae"),
        (
            {"vae": ["diffusers_hart", "NewTokenizer"]},
            "`vae` is a NewTokenizer, which this diffusers_hart does not have",
        ),
    ],
)
def test_info_of_what_is_not_ours(change, message, saved, tmp_path, capsys):
    for path in saved.iterdir():
        (tmp_path / path.name).symlink_to(path)
    index = json.loads((saved / "model_index.json").read_text())
    (tmp_path / "model_index.json").unlink()
    (tmp_path / "model_index.json").write_text(json.dumps({**index, **change}))
    assert message in fails(capsys, "info", str(tmp_path))


def test_info_of_broken_folders(saved, tmp_path, capsys):
    assert "has no model_index.json" in fails(capsys, "info", str(tmp_path))
    (tmp_path / "model_index.json").write_text("{")
    assert "line 1 column" in fails(capsys, "info", str(tmp_path))
    (tmp_path / "model_index.json").write_text((saved / "model_index.json").read_text())
    (tmp_path / "vae").mkdir()
    whole = (saved / "vae" / "diffusion_pytorch_model.safetensors").read_bytes()
    (tmp_path / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(whole[:100])
    assert "truncated" in fails(capsys, "info", str(tmp_path))
    assert "nothing/at/all" in fails(capsys, "info", "nothing/at/all")


@pytest.mark.parametrize("component", ["text_encoder", "transformer"])
def test_truncated_weights_are_one_line(saved, tmp_path, capsys, component):
    folder = tmp_path / "cut"
    shutil.copytree(saved, folder)
    (weights,) = (folder / component).glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    assert main(["generate", "cat", "--model", str(folder)]) == 1
    last_line = capsys.readouterr().err.strip().splitlines()[-1]
    assert last_line.startswith("diffusers-hart: error: ")
