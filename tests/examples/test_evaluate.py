# SPDX-License-Identifier: Apache-2.0
import importlib.util
import json
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel
from shapes_stand_in import ColorChecker, Squares

from diffusers_hart import HARTClassConditionalPipeline, HARTScheduler, HARTTransformer2DModel
from diffusers_hart.random_pipeline import random_pipeline


@pytest.fixture(scope="module")
def tiny_pipeline(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    pipe = random_pipeline()
    pipe.register_modules(scheduler=HARTScheduler(schedules=((1, 2, 3, 4, 6, 8), (1, 2, 3, 4)), num_inference_steps=2))
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Ten pictures of large coloured patches, with a table of captions."""
    folder = tmp_path_factory.mktemp("pictures")
    lines = []
    for i in range(10):
        patches = np.random.default_rng(i).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        PIL.Image.fromarray(patches).resize((140, 130)).save(folder / f"{i}.png")
        lines.append(json.dumps({"file_name": f"{i}.png", "text": f"picture {i}", "label": i % 3}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture
def evaluate(tiny_pipeline, tmp_path):
    """Runs the script on the tiny pipeline and squares, into `tmp_path / "out"`."""
    path = Path(__file__).parents[2] / "examples" / "evaluate.py"
    spec = importlib.util.spec_from_file_location("evaluate", path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    script.ShapesDataset, script.load_shapes_checker = Squares, ColorChecker
    script.shapes_model_path = lambda: tiny_pipeline

    def run(options="", num_images=4, arguments=()):
        common = f"--output_dir {tmp_path}/out --no_downloads --cache_dir {tmp_path}/cache --device cpu --bootstrap 2"
        return script.main([*common.split(), "--num_images", str(num_images), *options.split(), *arguments])

    return run


def test_shapes(evaluate, tmp_path, capsys):
    report = evaluate("--vary guidance_scale=0,4.5 --vary num_inference_steps=0 --vary smooth=false --batch_size 3")
    text = (tmp_path / "out" / "evaluation.json").read_text()
    assert json.loads(text) == json.loads(json.dumps(report))
    groups = report["groups"]
    assert list(groups) == ["one object", "whole mix", "held-out combinations"]
    for group in groups.values():
        generation = group["generation"]
        names = ["base", "guidance_scale=0", "num_inference_steps=0", "smooth=false"]
        assert list(generation) == [*names, "real pictures"]
        assert all(row["num_images"] == row["right"]["count"] == 4 for row in generation.values())
        assert generation["real pictures"]["attributes"]["color"]["value"] == 1
        real, base = (generation[name]["frechet_distance"]["value"] for name in ("real pictures", "base"))
        assert real < base
        assert group["reconstruction"]["num_images"] == 4
        assert [row["side"] for row in group["reconstruction"]["codebook"]] == [1, 2, 3, 4, 6, 8]
        psnr = [group["reconstruction"][path]["psnr"]["value"] for path in ("discrete", "hybrid")]
        assert group["reconstruction"]["psnr_gain"]["value"] == pytest.approx(psnr[1] - psnr[0])
    # Half of the squares that are held out are not of the size that is stated, as far as the stand-in can tell.
    held_out = groups["held-out combinations"]["generation"]["real pictures"]
    assert (held_out["right"]["value"], held_out["attributes"]["size"]["value"]) == (0.5, 0.5)
    assert report["settings"]["guidance_scale"] == 4.5
    assert report["settings"]["num_inference_steps"] == 2
    assert set(report["not_measured"]) == {"FID and KID on Inception features", "CLIP score"}
    assert report["dtype"] == "fp32"
    assert report["versions"]["torch"] == torch.__version__

    tables = (tmp_path / "out" / "evaluation.md").read_text()
    assert capsys.readouterr().out.strip() == tables.strip()
    share = held_out["right"]
    assert f"| real pictures | 4 | 50.0 % ({100 * share['low']:.1f} to {100 * share['high']:.1f})" in tables
    assert "- CLIP score: " in tables and "downloads are not allowed" in tables
    for heading in ("Reconstruction", "Codebook", "Generation: whole mix", "Not measured"):
        assert f"## {heading}" in tables
    widths = {line.count("|") for line in tables.split("## Codebook")[1].split("##")[0].strip().splitlines() if line}
    assert len(widths) == 1
    for name in ("samples", "variations", "reconstruction"):
        assert PIL.Image.open(tmp_path / "out" / f"{name}.png").width >= 4 * 128


def test_figures_do_not_depend_on_the_batch_size(evaluate):
    one, four = (evaluate(f"--splits test --batch_size {size}")["groups"]["whole mix"] for size in (1, 4))
    for name, row in one["generation"].items():
        other = four["generation"][name]
        assert row["frechet_distance"]["value"] == pytest.approx(other["frechet_distance"]["value"], rel=1e-3)
        assert row["right"] == other["right"]
    assert one["reconstruction"]["codebook"] == four["reconstruction"]["codebook"]
    for path in ("discrete", "hybrid"):
        found, other = (group["reconstruction"][path]["psnr"]["value"] for group in (one, four))
        assert found == pytest.approx(other, rel=1e-4)


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_low_precision_and_json(dtype, evaluate, capsys):
    report = evaluate(f"--dtype {dtype} --splits one_object --json --bootstrap 0", num_images=2)
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(report))
    base = report["groups"]["one object"]["generation"]["base"]
    assert list(base["frechet_distance"]) == ["value"]
    assert report["dtype"] == dtype


def test_residual_schedulers(evaluate, tmp_path):
    sweep = (
        "residual_scheduler=HARTResidualScheduler,DDIMScheduler,DPMSolverMultistepScheduler x num_inference_steps=2,3"
    )
    arguments = ["--vary", sweep, "--vary", "residual_scheduler=DDIMScheduler x smooth=false"]
    report = evaluate("--splits test --bootstrap 0", arguments=arguments)
    rows = report["groups"]["whole mix"]["generation"]
    distances = [row["frechet_distance"]["value"] for name, row in rows.items() if name != "real pictures"]
    assert len(distances) == len(set(distances)) == 7
    row = rows["residual_scheduler=DPMSolverMultistepScheduler num_inference_steps=3"]["settings"]
    assert (row["residual_scheduler"], row["num_inference_steps"]) == ("DPMSolverMultistepScheduler", 3)
    assert report["settings"]["residual_scheduler"] == "HARTResidualScheduler"
    again = evaluate("--splits test --bootstrap 0 --residual_scheduler DDIMScheduler")
    base = again["groups"]["whole mix"]["generation"]["base"]["frechet_distance"]["value"]
    same = rows["residual_scheduler=DDIMScheduler num_inference_steps=2"]["frechet_distance"]["value"]
    assert base == pytest.approx(same, rel=1e-4)
    with pytest.raises(ValueError, match="`residual_temperature`=0.5 needs HARTResidualScheduler"):
        evaluate("--residual_scheduler DDIMScheduler --residual_temperature 0.5")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_cuda(dtype, evaluate):
    report = evaluate(f"--device cuda --dtype {dtype} --splits test --vary guidance_scale=0", num_images=6)
    generation = report["groups"]["whole mix"]["generation"]
    assert generation["real pictures"]["right"]["value"] == 1
    assert report["hardware"] == torch.cuda.get_device_name()


def test_pictures_of_ones_own(evaluate, pictures, tmp_path):
    report = evaluate(f"--reference_data_dir {pictures} --resolution 64")
    assert report["resolution"] == 64
    group = report["groups"]["pictures"]
    # Ten pictures are enough for other references than what is reconstructed.
    assert list(group["generation"]) == ["base", "real pictures"]
    assert group["reconstruction"]["num_images"] == 4
    assert "right" not in group["generation"]["base"]
    assert report["not_measured"]["Prompt following"].startswith("the checker knows the statements of the shapes")
    assert any("to which these were resized" in note for note in report["notes"])

    report = evaluate(f"--reference_data_dir {pictures}", num_images=8)
    group = report["groups"]["pictures"]
    assert list(group["generation"]) == ["base"]
    assert group["generation"]["base"]["num_images"] == group["reconstruction"]["num_images"] == 8


def test_prompts(evaluate, pictures, tmp_path):
    (tmp_path / "prompts.txt").write_text("a cat\n\na dog\nan owl\n")
    report = evaluate(f"--prompts {tmp_path}/prompts.txt --vary smooth=false")
    group = report["groups"]["prompts"]
    assert group["reconstruction"] is None
    assert group["generation"]["base"] == {"num_images": 3, "settings": report["settings"]}
    assert "--reference_data_dir names" in report["not_measured"]["Reconstruction, codebook and distances"]
    assert (tmp_path / "out" / "samples.png").exists()

    (tmp_path / "prompts.jsonl").write_text('{"text": "a cat"}\n{"text": "a dog"}\n')
    report = evaluate(f"--prompts {tmp_path}/prompts.jsonl --reference_data_dir {pictures}", num_images=5)
    group = report["groups"]["pictures"]
    assert group["generation"]["base"]["num_images"] == 2
    assert group["generation"]["real pictures"]["num_images"] == group["reconstruction"]["num_images"] == 5


def test_classes(evaluate, pictures, tmp_path):
    pipe = random_pipeline()
    transformer = HARTTransformer2DModel(
        **{**dict(pipe.transformer.config), "caption_channels": None, "num_classes": 3}
    ).eval()
    parts = {name: pipe.components[name] for name in ("vae", "scheduler", "residual_mlp", "residual_scheduler")}
    pipe = HARTClassConditionalPipeline(transformer=transformer, **parts, id2label={0: "cat", 1: "dog", 2: "owl"})
    pipe.save_pretrained(tmp_path / "classes")
    options = f"--model {tmp_path}/classes"
    for more in ("", "--label_column label"):
        report = evaluate(f"{options} --reference_data_dir {pictures} {more}", num_images=3)
        assert report["groups"]["pictures"]["generation"]["base"]["num_images"] == 3
        assert report["not_measured"]["CLIP score"] == "classes have no captions"
    with pytest.raises(ValueError, match="A class-conditional pipeline draws no prompts: name pictures"):
        evaluate(options)


def test_another_decoder(evaluate, tmp_path):
    vae = random_pipeline(seed=0).vae
    own = evaluate("--splits test", num_images=2)["groups"]["whole mix"]
    vae.decoder.conv_out.bias.data.fill_(0.3)
    vae.save_pretrained(tmp_path / "vae")
    report = evaluate(f"--splits test --vae_path {tmp_path}/vae", num_images=2)
    swapped = report["groups"]["whole mix"]
    assert swapped["reconstruction"]["codebook"] == own["reconstruction"]["codebook"]
    assert swapped["reconstruction"]["hybrid"]["psnr"] != own["reconstruction"]["hybrid"]["psnr"]
    distances = [group["generation"]["base"]["frechet_distance"]["value"] for group in (own, swapped)]
    assert distances[0] != distances[1]
    assert not any("mean other pictures" in note for note in report["notes"])

    random_pipeline(seed=1).vae.save_pretrained(tmp_path / "vae")
    report = evaluate(f"--splits test --vae_path {tmp_path}/vae", num_images=2)
    assert any("mean other pictures" in note for note in report["notes"])


def test_a_tokenizer_that_does_not_fit(evaluate, tmp_path):
    vae = random_pipeline().vae
    type(vae)(**{**dict(vae.config), "codebook_size": 64}).save_pretrained(tmp_path / "vae")
    with pytest.raises(ValueError, match="`codebook_size` of the tokenizer must be 512, as in the pipeline's, not 64"):
        evaluate(f"--vae_path {tmp_path}/vae")


def test_a_pipeline_that_is_not_hart(evaluate, tmp_path):
    unet = UNet2DModel(
        8, block_out_channels=(8,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), norm_num_groups=4
    )
    DDIMPipeline(unet, DDIMScheduler()).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="is a DDIMPipeline; a pipeline of HART is needed"):
        evaluate(f"--model {tmp_path}/other")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--vary steps=1", "--vary steps=1: expected name=value"),
        ("--vary guidance_scale=-1", "`guidance_scale` must be 0 .off. or a positive number, not -1.0"),
        ("--vary num_inference_steps=2000", "`num_inference_steps` must be an integer from 0"),
        ("--resolution 100", "--resolution 100 has no schedule of scales; this model has some for 64, 128 pixels"),
        ("--reference_data_dir a --reference_shards b", "Name one source"),
    ],
)
def test_contradictions(options, message, evaluate, tmp_path):
    with pytest.raises(ValueError, match=message):
        evaluate(options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--num_images 1", "--num_images must be two or more"),
        ("--bootstrap 1", "--bootstrap must be 0 or at least two resamples"),
        ("--smooth maybe", "--smooth: invalid boolean value: 'maybe'"),
        ("--splits train", "invalid choice: 'train'"),
    ],
)
def test_arguments_out_of_range(options, message, evaluate, capsys):
    with pytest.raises(SystemExit):
        evaluate(options)
    assert message in capsys.readouterr().err


def test_files_that_do_not_do(evaluate, pictures, tmp_path):
    (tmp_path / "prompts.txt").write_text("\n")
    with pytest.raises(ValueError, match="prompts.txt holds no prompts: one a line is expected"):
        evaluate(f"--prompts {tmp_path}/prompts.txt")
    (tmp_path / "prompts.jsonl").write_text('{"text": "a"}\n{"caption": "b"}\n')
    with pytest.raises(ValueError, match="prompts.jsonl: example 2 has no text in 'text', but None"):
        evaluate(f"--prompts {tmp_path}/prompts.jsonl")
    (tmp_path / "single").mkdir()
    (tmp_path / "single" / "0.png").write_bytes((pictures / "0.png").read_bytes())
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
    with pytest.raises(ValueError, match="Two reference pictures or more are needed; the data have 1"):
        evaluate(f"--prompts {tmp_path}/prompts.txt --reference_data_dir {tmp_path}/single")
