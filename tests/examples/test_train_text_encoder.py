# SPDX-License-Identifier: Apache-2.0
import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer, Qwen2Model

from diffusers_hart import HARTPipeline
from diffusers_hart.random_pipeline import random_pipeline


EXAMPLES = Path(__file__).parents[2] / "examples"
SOURCE = """
import torch


class Shapes:
    '''Captions of 5 * 4 * 5 * 4 kinds, whose second half is the first one mirrored.'''

    def __getitem__(self, index):
        draw = torch.Generator().manual_seed(index)
        color, shape = (int(torch.randint(n, (), generator=draw)) for n in (5, 4))
        color = ("red", "green", "blue", "white", "grey")[color]
        shape = ("circle", "square", "triangle", "star")[shape]
        return {"caption": f"a {color} {shape} beside another {shape} in {color}", "scene": torch.zeros(1)}

    def finish_batch(self, batch, device):
        return {"pixel_values": torch.zeros(len(batch["caption"]), 3, 128, 128)}


class NoPictures(Shapes):
    def finish_batch(self, batch, device):
        raise AssertionError("pictures are not needed")
"""
SIZES = "--vocab_size 300 --hidden_size 32 --num_hidden_layers 1 --num_attention_heads 2 --tokenizer_captions 200"


def load_script(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def metrics(folder, name="loss"):
    with open(folder / "metrics.jsonl") as file:
        return {line["step"]: line[name] for line in map(json.loads, file)}


def weights(folder):
    return load_file(folder / "text_encoder" / "model.safetensors")


@pytest.fixture(autouse=True)
def fresh_accelerators(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture
def train(tmp_path):
    """Runs the script into a folder of the given name, on the endless source unless other data are named."""
    (tmp_path / "shapes_of_a_test.py").write_text(SOURCE)

    def run(name, options="", data=f"--train_iterable {tmp_path}/shapes_of_a_test.py:NoPictures"):
        common = f"--output_dir {tmp_path}/{name} --logging_steps 1 --train_batch_size 8 --cache_dir {tmp_path}/cache"
        return load_script("train_text_encoder").main(f"{SIZES} {common} {data} {options}".split())

    return run


def test_captions_are_learnt(train, tmp_path):
    """What cannot be known are the first colour and shape, less than a nat a token each; all else follows."""
    folder = train("run", "--max_train_steps 150 --learning_rate 1e-2 --checkpointing_steps 1000 --license mit")
    losses, accuracies = metrics(folder, "next_token_loss"), metrics(folder, "token_accuracy")
    tokenizer = AutoTokenizer.from_pretrained(folder, subfolder="tokenizer")
    assert losses[1] == pytest.approx(torch.tensor(float(len(tokenizer))).log().item(), abs=0.3)
    assert sum(losses[step] for step in range(141, 151)) / 10 < 0.5
    assert sum(accuracies[step] for step in range(141, 151)) / 10 > 0.75

    text_encoder = AutoModel.from_pretrained(folder, subfolder="text_encoder")
    assert isinstance(text_encoder, Qwen2Model) and text_encoder.config.vocab_size == len(tokenizer)
    assert text_encoder.config.pad_token_id == tokenizer.pad_token_id
    checkpoint = load_file(folder / "checkpoint-150" / "model.safetensors")
    assert all(torch.equal(checkpoint[f"text_encoder.{name}"], value) for name, value in weights(folder).items())
    card = ModelCard.load(folder / "README.md")
    assert card.data.license == "mit" and 'subfolder="text_encoder")' in card.text and "| Steps | 150 |" in card.text

    # It takes its place in the training of a pipeline.
    random_pipeline().vae.save_pretrained(tmp_path / "vae")
    (tmp_path / "sizes.json").write_text(
        '{"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8, "caption_length": 16}'
    )
    (tmp_path / "residual_sizes.json").write_text('{"hidden_size": 32, "num_layers": 1}')
    trained = load_script("train_text_to_image").main(
        f"--vae_path {tmp_path}/vae --text_encoder_path {folder} --transformer_config {tmp_path}/sizes.json"
        f" --residual_mlp_config {tmp_path}/residual_sizes.json --train_batch_size 2 --max_train_steps 1"
        f" --train_iterable {tmp_path}/shapes_of_a_test.py:Shapes --output_dir {tmp_path}/pipeline".split()
    )
    pipe = HARTPipeline.from_pretrained(trained)
    assert pipe.transformer.config.caption_channels == 32
    assert pipe("a red star", generator=torch.Generator().manual_seed(0)).images[0].size == (128, 128)


def test_resuming_continues_exactly(train, tmp_path):
    options = "--max_train_steps 4 --checkpointing_steps 2 --use_ema --lr_scheduler cosine --gradient_checkpointing"
    whole = train("whole", options)
    (tmp_path / "resumed").mkdir()
    for part in ("checkpoint-2", "tokenizer"):
        shutil.copytree(whole / part, tmp_path / "resumed" / part)
    resumed = train("resumed", f"{options} --resume_from_checkpoint latest")
    assert metrics(resumed) == {step: metrics(whole)[step] for step in (3, 4)}
    for (name, a), b in zip(weights(whole).items(), weights(resumed).values()):
        assert torch.equal(a, b), name
    assert len({metrics(whole)[step] for step in (1, 2, 3, 4)}) == 4


def test_batches_and_their_parts_are_one_run(train):
    whole = train("whole", "--max_train_steps 3")
    parts = train("parts", "--max_train_steps 3 --train_batch_size 4 --gradient_accumulation_steps 2")
    assert metrics(parts) == pytest.approx(metrics(whole), rel=1e-5)
    assert metrics(train("again", "--max_train_steps 3")) == metrics(whole)
    assert metrics(train("other", "--max_train_steps 3 --seed 1")) != metrics(whole)


def test_captions_of_a_folder_of_pictures(train, tmp_path):
    """The pictures are not even readable."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    lines = []
    for i, caption in enumerate(("a red circle", "a blue square", "a green star")):
        (folder / f"{i}.png").write_bytes(b"no picture")
        lines.append(json.dumps({"file_name": f"{i}.png", "prompt": caption}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    data = f"--train_data_dir {folder} --caption_column prompt --train_batch_size 3"
    trained = train("run", "--max_train_steps 2", data)
    tokenizer = AutoTokenizer.from_pretrained(trained / "tokenizer")
    assert len(tokenizer("a blue square").input_ids) < len(tokenizer("a lime octagon").input_ids)
    assert list(metrics(trained)) == [1, 2]


def test_sizes(train, tmp_path):
    (tmp_path / "sizes.json").write_text(
        '{"hidden_size": 48, "num_key_value_heads": 1, "max_position_embeddings": 64}'
    )
    folder = train("run", f"--max_train_steps 1 --text_encoder_config {tmp_path}/sizes.json --intermediate_size 40")
    config = json.loads((folder / "text_encoder" / "config.json").read_text())
    assert (config["hidden_size"], config["intermediate_size"], config["num_key_value_heads"]) == (32, 40, 1)
    assert (
        config["max_position_embeddings"] == 64 and config["tie_word_embeddings"] and config["num_hidden_layers"] == 1
    )
    with pytest.raises(ValueError, match="A vocabulary of 100 is too small"):
        train("small", "--vocab_size 100")
