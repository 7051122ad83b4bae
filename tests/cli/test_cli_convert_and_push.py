# SPDX-License-Identifier: Apache-2.0
import contextlib
import io
import json
import shutil

import pytest
from command_line import fails
from huggingface_hub import ModelCard

from diffusers_hart import HARTPipeline
from diffusers_hart.cli import main
from diffusers_hart.random_pipeline import random_pipeline


@pytest.fixture
def text_encoder(golden, tmp_path):
    folder = tmp_path / "text"
    shutil.copytree(golden / "t2i_tiny" / "text_encoder", folder)
    shutil.copytree(golden / "t2i_tiny" / "text_tokenizer", folder, dirs_exist_ok=True)
    return folder


def run(*commands):
    """What the command line prints as JSON, a value for each command."""
    results = []
    for command in commands:
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            assert main([*command, "--json"]) == 0
        results.append(json.loads(output.getvalue()))
    return results


def test_convert(golden, text_encoder, capsys, tmp_path):
    original = golden / "t2i_tiny" / "original"
    command = ["convert", str(original), "out", "--text-encoder", str(text_encoder), "--system-prompt", "Draw:"]
    assert main([*command, "--license", "mit", "--self-contained", "--dtype", "bf16"]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'out'}\n"
    assert HARTPipeline.from_pretrained("out").config.system_prompt == "Draw:"
    assert ModelCard.load("out/README.md").data.license == "mit"
    assert (tmp_path / "out" / "pipeline_hart.py").is_file()
    assert "out is not empty" in fails(capsys, *command)

    command[2] = "again"
    capsys.readouterr()
    assert main([*command, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["folder"] == str(tmp_path / "again")
    assert result["bytes"] == sum(path.stat().st_size for path in (tmp_path / "again").rglob("*") if path.is_file())


def test_convert_what_is_not_there(capsys, tmp_path):
    line = fails(capsys, "convert", "missing", "out", "--text-encoder", "text")
    assert "There is no folder missing" in line
    assert list(tmp_path.iterdir()) == []


def test_push(hub, tmp_path):
    folder = tmp_path / "model"
    random_pipeline().save_pretrained(folder)
    (folder / ".cache").mkdir()
    (folder / ".cache" / "secret").write_text("")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    push = ["push", str(folder)]
    options = ["--self-contained", "--license", "mit", "--training-data", "Nothing.", "--message", "First"]
    info = ["info", "me/own"]
    plain, own, described = hub.call(run, [*push, "me/plain"], [*push, "me/own", *options], info)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before

    repository = hub.repositories["me/plain"]
    assert plain == {"repository": "me/plain", "commit": f"{hub.url}/me/plain/commit/{repository.head}"}
    uploaded = {path.relative_to(folder).as_posix(): content for path, content in before.items()}
    del uploaded[".cache/secret"]
    card = repository.files.pop("README.md").decode()
    assert repository.files == uploaded
    assert 'from_pretrained("me/plain"' in card and "No licence was stated" in card

    files = hub.repositories["me/own"].files
    assert json.loads(files["model_index.json"])["_class_name"] == ["pipeline_hart", "HARTPipeline"]
    assert {"pipeline_hart.py", "vae/autoencoder_hybrid.py"} <= files.keys()
    card = ModelCard(files["README.md"].decode())
    assert card.data.license == "mit" and "Nothing." in card.text and "trust_remote_code=True" in card.text
    assert described["pipeline"] == "HARTPipeline"


def test_a_card_of_the_folder_goes_along(hub, tmp_path):
    folder = tmp_path / "model"
    random_pipeline().save_pretrained(folder, self_contained=True)
    (folder / "README.md").write_text("My own card.")
    hub.call(run, ["push", str(folder), "me/carded"])
    assert hub.repositories["me/carded"].files["README.md"] == b"My own card."
    assert "pipeline_hart.py" in hub.repositories["me/carded"].files


def test_push_what_is_no_pipeline(capsys, tmp_path):
    assert "There is no folder missing to upload" in fails(capsys, "push", "missing", "me/missing")
    assert "has no model_index.json" in fails(capsys, "push", tmp_path, "me/missing")
