# SPDX-License-Identifier: Apache-2.0
import importlib.util
import json
import socket
import subprocess
import sys
from pathlib import Path

import PIL.Image
import pytest
import torch
from accelerate.state import AcceleratorState

from diffusers_hart import HybridTokenizer
from diffusers_hart.training.train_loop import NonFiniteLoss


SCRIPT = Path(__file__).parents[2] / "examples" / "train_hybrid_tokenizer.py"
SIZES = {
    "latent_channels": 8,
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "codebook_size": 64,
    "scales": (1, 2, 4, 8),
}
DISCRIMINATOR = ["--discriminator_layers", "2", "--discriminator_channels", "8"]


def flags(**options) -> list[str]:
    texts = {k: ",".join(map(str, v)) if isinstance(v, tuple) else str(v) for k, v in options.items()}
    return [part for name, text in texts.items() for part in (f"--{name}", text)]


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location(SCRIPT.stem, SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> list[str]:
    """Four plain pictures, and the flags that name them."""
    folder = tmp_path_factory.mktemp("pictures")
    generator = torch.Generator().manual_seed(0)
    for i in range(4):
        pixels = (torch.rand(4, 5, 3, generator=generator) * 255).byte().numpy()
        PIL.Image.fromarray(pixels).resize((20, 16), PIL.Image.Resampling.BILINEAR).save(folder / f"{i}.png")
    return flags(train_data_dir=folder, cache_dir=tmp_path_factory.mktemp("cache"))


@pytest.fixture
def train(script, data, tmp_path):
    """Runs the script on the four pictures and gives the run's folder."""

    def run(name: str, *arguments: str, sizes: dict | None = SIZES) -> Path:
        folder = tmp_path / name
        script.main([*data, "--output_dir", str(folder), *flags(**sizes or {}), "--logging_steps", "1", *arguments])
        return folder

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tensors this small are slower with more
    yield run
    torch.set_num_threads(threads)
    AcceleratorState._reset_state(reset_partial_state=True)  # the next run may want another precision


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def figures(folder: Path, name: str) -> dict[int, float]:
    return {line["step"]: line[name] for line in lines(folder) if name in line}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return HybridTokenizer.from_pretrained(folder).state_dict()


def test_one_batch_is_learned_in_three_phases(train):
    schedule = ["--phases", "continuous:40,discrete:60,alternating:40", "--restart_codes_after", "3"]
    folder = train(
        "run", *schedule, "--adversarial_weight", "0", "--learning_rate", "5e-3", "--validation_steps", "70"
    )

    mse = figures(folder, "mse_loss")
    assert mse[1] > 0.2
    assert sum(mse[step] for step in range(136, 141)) / 5 < 0.02
    vq_loss = figures(folder, "vq_loss")
    assert set(vq_loss) == set(range(41, 141))
    assert vq_loss[100] < 0.2 * vq_loss[41]
    assert figures(folder, "codebook_usage/8x8")[100] > 0.3
    for path in ("discrete", "hybrid"):
        psnr = figures(folder, f"psnr_{path}")
        assert psnr[140] > psnr[70] + 3 and psnr[140] > 22

    for step in (70, 140):
        assert PIL.Image.open(folder / "validation" / f"step-{step:06d}.png").size == (3 * 16, 4 * 16)
    vae = HybridTokenizer.from_pretrained(folder)
    assert all(torch.equal(torch.tensor(vae.config[name]), torch.tensor(size)) for name, size in SIZES.items())
    assert "HybridTokenizer.from_pretrained" in (folder / "README.md").read_text()


def test_resuming_goes_on_exactly_across_a_phase_boundary(train):
    arguments = ["--phases", "continuous:2,discrete:3,alternating:3", "--restart_codes_after", "2", "--use_ema"]
    arguments += ["--ema_decay", "0.5", "--discriminator_start", "1", *DISCRIMINATOR, "--learning_rate", "1e-3"]
    arguments += ["--gradient_accumulation_steps", "2", "--train_batch_size", "2", "--lr_scheduler", "cosine"]
    whole = train("whole", *arguments)
    for stop in ("1", "4"):
        train("resumed", *arguments, "--max_train_steps", stop, "--resume_from_checkpoint", "latest")
    resumed = train("resumed", *arguments, "--resume_from_checkpoint", "latest")

    for name in ("loss", "discriminator_loss", "generator_weight", "restarted_codes", "learning_rate", "grad_norm"):
        assert figures(resumed, name) == figures(whole, name) != {}, name
    assert [line["step"] for line in lines(resumed) if "loss" in line] == list(range(1, 9))
    assert len(set(figures(whole, "learning_rate").values())) == 8
    assert figures(whole, "restarted_codes")[5] > 0  # codes that were unused before and after the run was cut
    expected = weights(whole)
    assert all(torch.equal(value, expected[name]) for name, value in weights(resumed).items())


def test_two_processes_train_and_push_like_one(train, data, hub, tmp_path):
    """Without a discriminator, whose batch norms see the pictures of their own process (they are synchronised on GPUs)."""
    arguments = ["--phases", "continuous:2,discrete:4,alternating:4", "--restart_codes_after", "1"]
    arguments += ["--adversarial_weight", "0", "--use_ema", "--logging_steps", "1", "--learning_rate", "1e-3"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, str(SCRIPT), *data, *flags(**SIZES, output_dir=tmp_path / "two", train_batch_size=2)]
    rendezvous = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    environment = {**hub.environment(), **rendezvous, "ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
    processes = [
        subprocess.Popen(
            [*command, *arguments, "--push_to_hub", "--hub_model_id", "me/tokenizer"],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    one = train("one", *arguments, "--train_batch_size", "4")
    for process in processes:
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output

    two = tmp_path / "two"
    for name in ("loss", "mse_loss", "vq_loss", "grad_norm", "psnr_hybrid", "restarted_codes", "codebook_usage/4x4"):
        assert figures(two, name) == pytest.approx(figures(one, name), rel=1e-4), name
    assert max(figures(one, "restarted_codes").values()) > 0
    expected = weights(one)
    assert all(torch.allclose(value, expected[name], atol=2e-4) for name, value in weights(two).items())
    pushed = hub.repositories["me/tokenizer"].files
    assert set(pushed) == {"README.md", "config.json", "diffusion_pytorch_model.safetensors", "metrics.jsonl"}
    assert pushed["config.json"] == (two / "config.json").read_bytes()


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(train, tmp_path):
    arguments = ["--phases", "discrete:4", "--adversarial_weight", "0", "--checkpointing_steps", "1"]
    with pytest.raises(NonFiniteLoss, match="not finite"):
        train("run", *arguments, "--learning_rate", "1e30")
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-1"]
    assert not (tmp_path / "run" / "config.json").exists()


@pytest.mark.parametrize("place", ["pipeline", "tokenizer"])
def test_a_saved_tokenizer_gets_a_better_decoder_only(train, tmp_path, place):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        vae = HybridTokenizer(**SIZES)
    vae.save_pretrained(tmp_path / "saved" / ("vae" if place == "pipeline" else ""))
    arguments = ["--pretrained_model_name_or_path", str(tmp_path / "saved"), "--phases", "alternating:2"]
    trained = weights(train("run", *arguments, *DISCRIMINATOR, "--discriminator_start", "0", sizes=None))
    for name, value in vae.state_dict().items():
        is_trained = name.split(".")[0] in ("decoder", "post_quant_conv")
        assert torch.equal(trained[name], value) != is_trained, name


def test_another_schedule_of_scales_is_kept(train, tmp_path):
    HybridTokenizer(**SIZES).save_pretrained(tmp_path / "saved")
    arguments = ["--pretrained_model_name_or_path", str(tmp_path / "saved"), "--phases", "discrete:1"]
    folder = train(
        "run", *arguments, "--scales", "1,3,6", "--resolution", "12", "--adversarial_weight", "0", sizes=None
    )
    assert HybridTokenizer.from_pretrained(folder).config.scales == [1, 3, 6]


def test_bfloat16_with_gradient_checkpointing(train, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({**SIZES, "_class_name": "HybridTokenizer"}))
    arguments = ["--tokenizer_config", str(tmp_path / "config.json"), "--codebook_size", "32", "--scales", "1,2,8"]
    arguments += ["--phases", "discrete:2", *DISCRIMINATOR, "--discriminator_start", "0", "--mixed_precision", "bf16"]
    folder = train("run", *arguments, "--gradient_checkpointing", sizes=None)
    vae = HybridTokenizer.from_pretrained(folder)
    assert vae.dtype == torch.float32 and vae.codebook.weight.shape == (32, 8) and vae.config.scales == [1, 2, 8]
    assert set(figures(folder, "loss")) == {1, 2}


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_precision_on_a_gpu(train, precision):
    arguments = ["--phases", "continuous:20,discrete:40", *DISCRIMINATOR, "--discriminator_start", "10", "--use_ema"]
    arguments += ["--mixed_precision", precision, "--gradient_accumulation_steps", "2", "--train_batch_size", "2"]
    arguments += ["--fixed_adversarial_weight", "--adversarial_weight", "0.01", "--learning_rate", "2e-3"]
    train("run", *arguments, "--max_train_steps", "30")
    folder = train("run", *arguments, "--resume_from_checkpoint", "latest")
    mse = figures(folder, "mse_loss")
    assert set(mse) == set(range(1, 61))
    assert mse[60] < 0.5 * mse[1]
    assert all(torch.isfinite(value).all() for value in weights(folder).values())


def test_given_pictures_are_reconstructed(train, tmp_path):
    PIL.Image.new("RGB", (30, 20), "red").save(tmp_path / "red.png")
    arguments = ["--phases", "continuous:1", "--adversarial_weight", "0"]
    folder = train("run", *arguments, "--validation_images", str(tmp_path / "red.png"))
    grid = PIL.Image.open(folder / "validation" / "step-000001.png")
    assert grid.size == (48, 16)
    assert grid.getpixel((8, 8)) == (255, 0, 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--phases", "discrete:2,warmup:3"], "'warmup:3' is not a phase"),
        (["--phases", "discrete:2", "--max_train_steps", "3"], "3 is more than the 2 steps"),
        (["--phases", "discrete:2", "--resolution", "32"], "32 does not fit .* 16 pixels.*end in 16"),
        (["--phases", "discrete:2", "--discriminator_start", "0"], "24 pixels a side at least, not 16"),
        (["--phases", "discrete:2", "--mixed_precision", "fp16"], "--fixed_adversarial_weight"),
        (["--phases", "discrete:2", "--pretrained_model_name_or_path", "x"], "leave out --latent_channels"),
        (["--phases", "discrete:2", "--train_batch_size", "5"], "4 examples, too few"),
    ],
)
def test_arguments_that_do_not_fit(train, tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        train("run", *arguments)
    assert not list(tmp_path.glob("run/*"))


def test_a_perceptual_loss_without_its_package(train, monkeypatch):
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(ImportError, match="pip install lpips"):
        train("run", "--phases", "discrete:2", "--perceptual_weight", "1")


def test_a_discriminator_that_would_never_start_is_left_out(train, caplog):
    folder = train("run", "--phases", "discrete:1")
    assert "without a discriminator" in caplog.text
    assert "generator_loss" not in lines(folder)[0]
