# SPDX-License-Identifier: Apache-2.0
"""Every script reads a source that has no end and makes its pictures batch by batch."""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState

from diffusers_hart import HARTClassConditionalPipeline, HARTPipeline, HybridTokenizer
from diffusers_hart.random_pipeline import random_pipeline


EXAMPLES = Path(__file__).parents[2] / "examples"
SOURCE = """
import torch


class Colours:
    '''Pictures of one colour each.'''

    resolution = 128

    def __getitem__(self, index):
        colour = torch.rand(3, generator=torch.Generator().manual_seed(index)) * 2 - 1
        label = int(colour.argmax())
        return {"caption": ("red", "green", "blue")[label], "label": label, "colour": colour}

    def finish_batch(self, batch, device):
        size = (-1, -1, self.resolution, self.resolution)
        return {**batch, "pixel_values": batch["colour"].to(device)[..., None, None].expand(size)}


class Small(Colours):
    resolution = 16


class Few(Colours):
    def __len__(self):
        return 5


class Unfinished(Colours):
    def finish_batch(self, batch, device):
        return batch
"""
SIZES = {"num_layers": 1, "num_attention_heads": 4, "attention_head_dim": 16}


def load_script(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def metrics(folder, name="loss"):
    with open(folder / "metrics.jsonl") as file:
        return {line["step"]: line[name] for line in map(json.loads, file) if name in line}


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
def pipeline(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline")
    random_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture
def run(tmp_path, pipeline):
    """Runs a script on one of the sources, into a folder of the given name."""
    (tmp_path / "colours_of_a_test.py").write_text(SOURCE)
    (tmp_path / "residual_sizes.json").write_text('{"hidden_size": 32, "num_layers": 1}')
    starts = {
        "train_text_to_image": f"--pretrained_model_name_or_path {pipeline}",
        "train_class_conditional": f"--vae_path {pipeline} --vae_subfolder vae"
        f" --residual_mlp_config {tmp_path}/residual_sizes.json",
        "precompute_targets": f"--pretrained_model_name_or_path {pipeline}",
        "train_hybrid_tokenizer": "--phases discrete:4 --latent_channels 8 --block_out_channels 16,16,32"
        " --layers_per_block 1 --norm_num_groups 8 --codebook_size 64 --scales 1,2,4 --adversarial_weight 0",
    }

    def run_script(script, name, options="", source="Colours"):
        data = f"--train_iterable {tmp_path}/colours_of_a_test.py:{source} --output_dir {tmp_path}/{name}"
        common = "" if script == "precompute_targets" else "--train_batch_size 3 --logging_steps 1"
        return load_script(script).main(f"{starts[script]} {data} {common} {options}".split())

    return run_script


def test_text_to_image(run, tmp_path):
    """Neither workers, which finish nothing, nor resuming change what is seen."""
    plain = run("train_text_to_image", "plain", "--max_train_steps 4 --checkpointing_steps 2")
    workers = run("train_text_to_image", "workers", "--max_train_steps 4 --dataloader_num_workers 2")
    assert list(metrics(plain)) == [1, 2, 3, 4] and metrics(workers) == metrics(plain)
    assert len(set(metrics(plain).values())) == 4
    shutil.copytree(plain / "checkpoint-2", tmp_path / "resumed" / "checkpoint-2")
    resumed = run("train_text_to_image", "resumed", "--max_train_steps 4 --resume_from_checkpoint latest")
    assert metrics(resumed) == {step: metrics(plain)[step] for step in (3, 4)}
    assert isinstance(HARTPipeline.from_pretrained(resumed), HARTPipeline)


def test_class_conditional(run, tmp_path):
    (tmp_path / "sizes.json").write_text(json.dumps(SIZES | {"num_classes": 3}))
    folder = run("train_class_conditional", "run", f"--max_train_steps 2 --transformer_config {tmp_path}/sizes.json")
    assert HARTClassConditionalPipeline.from_pretrained(folder).transformer.config.num_classes == 3
    (tmp_path / "sizes.json").write_text(json.dumps(SIZES | {"num_classes": 1}))
    with pytest.raises(ValueError, match=r"must be an integer in \[0, 1\), not"):
        run("train_class_conditional", "bad", f"--max_train_steps 2 --transformer_config {tmp_path}/sizes.json")


def test_the_tokenizer(run):
    options = "--max_train_steps 2 --num_validation_images 2"
    folder = run("train_hybrid_tokenizer", "run", options, source="Small")
    assert list(metrics(folder)) == [1, 2]
    assert HybridTokenizer.from_pretrained(folder).config.scales == [1, 2, 4]
    assert (folder / "validation" / "step-000002.png").exists()
    with pytest.raises(ValueError, match=r"\(batch_size, 3, 16, 16\), not \[4, 3, 128, 128\]"):
        run("train_hybrid_tokenizer", "large")


def test_targets_before_the_training(run, pipeline, tmp_path):
    folder = run("precompute_targets", "targets", "--batch_size 2 --latents_dtype fp32", source="Few")
    plain = run("train_text_to_image", "plain", "--max_train_steps 2", source="Few")
    stored = load_script("train_text_to_image").main(
        f"--pretrained_model_name_or_path {pipeline} --precomputed_data_dir {folder} --train_batch_size 3"
        f" --logging_steps 1 --max_train_steps 2 --output_dir {tmp_path}/stored".split()
    )
    assert metrics(stored) == pytest.approx(metrics(plain), rel=1e-5)
    with pytest.raises(ValueError, match="Colours has items but no length: an endless source cannot be encoded"):
        run("precompute_targets", "endless")


def test_pictures_that_are_missing(run):
    with pytest.raises(ValueError, match="`finish_batch` of Unfinished must add `pixel_values`"):
        run("train_text_to_image", "run", source="Unfinished")
    with pytest.raises(ValueError, match="Colours makes its pictures itself"):
        run("train_text_to_image", "flipped", "--random_flip")
