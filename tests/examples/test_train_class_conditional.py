# SPDX-License-Identifier: Apache-2.0
import importlib.util
import json
from pathlib import Path

import datasets
import numpy as np
import PIL.Image
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from diffusers import DiffusionPipeline

from diffusers_hart import HARTClassConditionalPipeline
from diffusers_hart.random_pipeline import random_pipeline


EXAMPLES = Path(__file__).parents[2] / "examples"
SIZES = {"num_layers": 2, "num_attention_heads": 4, "attention_head_dim": 16}


def load_script(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def picture(seed):
    patches = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return PIL.Image.fromarray(patches).resize((128, 128), PIL.Image.Resampling.NEAREST)


def metrics(folder, name="loss"):
    with open(folder / "metrics.jsonl") as file:
        return {line["step"]: line[name] for line in map(json.loads, file)}


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
def vae(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vae")
    random_pipeline().vae.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder for each of three classes, with two pictures each."""
    folder = tmp_path_factory.mktemp("pictures")
    for i, name in enumerate(("bird", "cat", "dog")):
        (folder / name).mkdir()
        for j in range(2):
            picture(2 * i + j).save(folder / name / f"{j}.png")
    return folder


@pytest.fixture(scope="module")
def script():
    return load_script("train_class_conditional")


@pytest.fixture
def train(script, vae, tmp_path):
    """Runs the script into a folder of the given name, from scratch unless a pipeline is named."""

    def run(name, data, options="", start=None, sizes=SIZES):
        (tmp_path / "sizes.json").write_text(json.dumps(sizes))
        (tmp_path / "residual_sizes.json").write_text('{"hidden_size": 64, "num_layers": 2}')
        sizes = f"--transformer_config {tmp_path}/sizes.json --residual_mlp_config {tmp_path}/residual_sizes.json"
        start = f"--vae_path {vae} {sizes}" if start is None else start
        common = f"--cache_dir {tmp_path}/cache --logging_steps 1 --train_batch_size 3 --output_dir {tmp_path}/{name}"
        return script.main(f"{start} {common} {data} {options}".split())

    return run


def iterable(tmp_path, name, body):
    (tmp_path / f"{name}.py").write_text(
        "import numpy as np\nimport PIL.Image\n\n\ndef picture(seed):\n"
        "    patches = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)\n"
        "    return PIL.Image.fromarray(patches).resize((128, 128), PIL.Image.Resampling.NEAREST)\n\n\n"
        f"examples = {body}\n"
    )
    return f"--train_iterable {tmp_path}/{name}.py:examples"


def test_one_batch_is_learnt(train, tmp_path):
    """The floor of the code loss is 0: each class has one picture."""
    data = iterable(tmp_path, "one_batch", "[(picture(i), i) for i in range(3)]")
    options = (
        "--label_dropout 0 --learning_rate 3e-3 --lr_scheduler cosine --max_train_steps 180 --checkpointing_steps 1000"
    )
    folder = train("run", data, options, sizes=SIZES | {"num_classes": 3})
    code_loss, residual_mse = metrics(folder, "code_loss"), metrics(folder, "residual_mse")
    assert code_loss[1] == pytest.approx(np.log(512), abs=0.1)
    assert np.mean([code_loss[step] for step in range(171, 181)]) < 0.2
    assert np.mean([residual_mse[step] for step in range(171, 181)]) < 0.6 * residual_mse[1]

    # What was learnt is what generation draws, from labels alone.
    pipe = HARTClassConditionalPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    pixels = torch.stack([torch.from_numpy(np.array(picture(i))).permute(2, 0, 1) / 127.5 - 1 for i in range(3)])
    with torch.no_grad():
        expected = pipe.vae.encode(pixels).partial_latents[-1]
    drawn = pipe([0, 1, 2], guidance_scale=0.0, top_k=1, smooth=False, num_inference_steps=0, output_type="latent")
    errors = torch.tensor([[(latents - other).square().mean() for other in expected] for latents in drawn.images])
    assert errors.argmin(1).tolist() == [0, 1, 2]
    assert errors.diag().max() < 0.3 * errors[~torch.eye(3, dtype=torch.bool)].min()


def test_folders_are_classes_with_names(train, pictures, vae, tmp_path):
    data = f"--train_data_dir {pictures}"
    folder = train("first", data, "--max_train_steps 2 --use_ema --validation_label 0 2 --num_validation_images 2")
    assert PIL.Image.open(folder / "validation" / "step-000002.png").size == (256, 256)
    name = "diffusion_pytorch_model.safetensors"
    assert (folder / "vae" / name).read_bytes() == (vae / name).read_bytes()
    pipe = DiffusionPipeline.from_pretrained(folder)
    assert isinstance(pipe, HARTClassConditionalPipeline)
    assert pipe.labels == {"bird": 0, "cat": 1, "dog": 2} and pipe.transformer.config.num_classes == 3
    assert pipe(pipe.get_label_ids(["dog"])).images[0].size == (128, 128)

    start = f"--pretrained_model_name_or_path {folder}"
    tuned = train("second", data, "--max_train_steps 1", start=start)
    again = HARTClassConditionalPipeline.from_pretrained(tuned)
    assert again.labels == pipe.labels
    before, after = pipe.transformer.state_dict(), again.transformer.state_dict()
    assert all(not torch.equal(before[name], after[name]) for name in before)
    # Tuning starts from what was saved, not from a new model, unless it is told to.
    torch.testing.assert_close(after["proj_out.weight"], before["proj_out.weight"], rtol=0, atol=1e-3)
    new = train("third", data, "--max_train_steps 1 --from_scratch --seed 5", start=start)
    other = HARTClassConditionalPipeline.from_pretrained(new).transformer
    assert other.config.num_layers == 2 and (other.proj_out.weight - after["proj_out.weight"]).abs().max() > 2e-3


def test_two_runs_of_one_seed_are_one_run(train, pictures):
    data, options = f"--train_data_dir {pictures}", "--max_train_steps 3 --label_dropout 0.5"
    first = metrics(train("first", data, options))
    torch.manual_seed(7)
    assert metrics(train("second", data, options)) == first
    assert metrics(train("third", data, f"{options} --seed 1")) != first


def test_targets_that_were_computed_before(train, pictures, vae, tmp_path):
    folder = load_script("precompute_targets").main(
        f"--vae_path {vae} --train_data_dir {pictures} --label_column label --latents_dtype fp32 --batch_size 4"
        f" --examples_per_shard 5 --cache_dir {tmp_path}/cache --output_dir {tmp_path}/targets".split()
    )
    plain = train("plain", f"--train_data_dir {pictures}", "--max_train_steps 3")
    stored = train("stored", f"--precomputed_data_dir {folder}", "--max_train_steps 3")
    assert metrics(stored) == pytest.approx(metrics(plain), rel=1e-5)
    assert HARTClassConditionalPipeline.from_pretrained(stored).labels == {"bird": 0, "cat": 1, "dog": 2}


def test_labels_of_a_saved_data_set(train, tmp_path):
    columns = {"image": [picture(i) for i in range(3)], "kind": [0, 1, 1]}
    features = datasets.Features({"image": datasets.Image(), "kind": datasets.Value("int32")})
    datasets.Dataset.from_dict(columns, features=features).save_to_disk(str(tmp_path / "saved"))
    data = f"--dataset_name {tmp_path}/saved --label_column kind --max_train_steps 1"
    with pytest.raises(ValueError, match="do not say how many classes there are: give `num_classes`"):
        train("run", data)
    folder = train("run", data, sizes=SIZES | {"num_classes": 2})
    assert HARTClassConditionalPipeline.from_pretrained(folder).labels == {}


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (3, r"The label of a picture without a name must be an integer in \[0, 3\), not 3"),
        ('"cat"', r"not 'cat'. Names of classes can be made labels"),
    ],
)
def test_labels_that_are_none(label, message, train, tmp_path):
    data = iterable(tmp_path, "bad_labels", f"[(picture(i), {label}) for i in range(3)]")
    with pytest.raises(ValueError, match=message):
        train("run", data, sizes=SIZES | {"num_classes": 3})


def test_numbers_of_classes_that_differ(train, pictures):
    data = f"--train_data_dir {pictures}"
    with pytest.raises(ValueError, match="The data set has 3 classes, the transformer 5"):
        train("run", data, sizes=SIZES | {"num_classes": 5})
    with pytest.raises(ValueError, match=r"--validation_label must be in \[0, 3\), not \[3, -1\]"):
        train("run", data, "--validation_label 0 3 -1")


def test_the_published_widths(script, vae):
    args = script.parse_args(f"--vae_path {vae} --output_dir run --depth 24".split())
    config = script.new_transformer_config(args, script.load_pipeline(args), 1000)
    assert config == {
        "in_channels": 8,
        "codebook_size": 512,
        "num_layers": 24,
        "num_attention_heads": 24,
        "caption_channels": None,
        "num_classes": 1000,
    }


def test_a_tokenizer_or_a_pipeline_is_needed(script, vae, capsys):
    for options in ([], ["--vae_path", str(vae), "--pretrained_model_name_or_path", "me/pipeline"]):
        with pytest.raises(SystemExit):
            script.main(["--output_dir", "run", *options])
        assert "either --pretrained_model_name_or_path or" in capsys.readouterr().err
