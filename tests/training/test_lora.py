# SPDX-License-Identifier: Apache-2.0

import numpy as np
import PIL.Image
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState

from diffusers_hart.random_pipeline import random_pipeline
from diffusers_hart.training import HARTTrainingModule, teacher_forcing_targets
from diffusers_hart.training.data import UnreadableImage
from diffusers_hart.training.data_sources import image_preparer
from diffusers_hart.training.dreambooth import (
    DreamBoothExamples,
    draw_class_pictures,
    list_pictures,
    pair_preparer,
    split_prior,
)
from diffusers_hart.training.example_cache import cache_examples, can_cache
from diffusers_hart.training.lora import (
    TEXT_ENCODER_LAYERS,
    TRANSFORMER_LAYERS,
    add_lora_adapter,
    load_lora_adapters,
    lora_tensors,
    save_lora_adapters,
)
from diffusers_hart.training.lora_module import LoraTrainingModule


SCALES = (1, 2, 3, 4, 6, 8)


@pytest.fixture
def pipe():
    pipe = random_pipeline()
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def accelerator(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    yield Accelerator()
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def write_pictures(folder, count):
    folder.mkdir()
    for i in range(count):
        patches = np.random.default_rng(i).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        PIL.Image.fromarray(patches).resize((128, 128), PIL.Image.Resampling.NEAREST).save(folder / f"{i}.png")
    return folder


def batch_of(pipe, count=2, seed=0):
    images = torch.rand(count, 3, 128, 128, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    with torch.no_grad():
        embeds, mask, _, _ = pipe.encode_prompt([f"a {seed}"] * count, do_classifier_free_guidance=False)
    targets = teacher_forcing_targets(pipe.vae, SCALES, images=images)
    return {"targets": targets, "prompt_embeds": embeds, "prompt_attention_mask": mask}


def make_module(pipe, kind=LoraTrainingModule, **options):
    parts = (pipe.transformer, pipe.residual_mlp.requires_grad_(False), pipe.vae, pipe.scheduler)
    return kind(*parts, pipe.residual_scheduler, SCALES, **options)


def draw(pipe):
    return pipe("a", generator=torch.Generator().manual_seed(0), output_type="latent").images


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_new_adapter(dtype, pipe, tmp_path):
    """In float32 over a model of any precision, alone in being trained, and without effect, bit for bit."""
    for model in (pipe.transformer, pipe.residual_mlp):
        model.to(dtype)
    autocast = torch.autocast("cpu", dtype, enabled=dtype != torch.float32)
    with autocast:
        base = draw(pipe)
    add_lora_adapter(pipe.transformer, TRANSFORMER_LAYERS, rank=4, alpha=2.0, dropout=0.5)
    trained = {name: p for name, p in pipe.transformer.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 2 * 7 and all("lora_" in name for name in trained)
    assert {p.dtype for p in trained.values()} == {torch.float32}
    assert pipe.transformer.transformer_blocks[0].attn.to_q.scaling == {"default": 0.5}
    with autocast:
        assert torch.equal(draw(pipe), base)
        targets = batch_of(pipe)
        pipe.transformer.train()
        losses = make_module(pipe)(**targets, step=0, positions=[0, 1])
    losses["loss"].backward()
    assert all(p.grad.dtype == torch.float32 for p in trained.values())
    assert all(p.grad.abs().sum() > 0 for name, p in trained.items() if "lora_B" in name)


def test_an_adapter_follows_from_the_seed(pipe):
    tensors = []
    for seed, noise in ((1, 1), (1, 2), (2, 2)):
        torch.manual_seed(noise)
        other = random_pipeline()
        add_lora_adapter(other.transformer, ["to_q", "to_k"], rank=2, seed=seed)
        tensors.append(lora_tensors(other.transformer))
    assert all(torch.equal(tensors[0][name], tensors[1][name]) for name in tensors[0])
    first = "transformer_blocks.0.attn.to_q.lora_A.weight"
    assert not torch.equal(tensors[0][first], tensors[2][first])
    assert not torch.equal(tensors[0][first], tensors[0][first.replace("to_q", "to_k")])


def test_layers_that_there_are_not(pipe):
    for layers in (["to_q", "to_x"], ["norm"], ["q"], []):
        with pytest.raises(ValueError, match=r"HARTTransformer2DModel has no linear layers .*transformer_blocks.attn"):
            add_lora_adapter(pipe.transformer, layers, rank=2)
    with pytest.raises(ValueError, match="rank of a LoRA must be a positive integer, not 0"):
        add_lora_adapter(pipe.transformer, TRANSFORMER_LAYERS, rank=0)
    assert not hasattr(pipe.transformer, "peft_config")
    assert all(parameter.requires_grad for parameter in pipe.transformer.parameters())


def test_saving_and_loading_again(pipe, tmp_path):
    models = {"transformer": pipe.transformer, "text_encoder": pipe.text_encoder}
    add_lora_adapter(pipe.transformer, TRANSFORMER_LAYERS, rank=2, alpha=6)
    add_lora_adapter(pipe.text_encoder, TEXT_ENCODER_LAYERS, rank=2, alpha=6)
    with torch.no_grad():
        for model in models.values():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(generator=torch.Generator().manual_seed(0))
    save_lora_adapters(tmp_path, models)
    expected = draw(pipe)

    other = random_pipeline()
    other.set_progress_bar_config(disable=True)
    other.load_lora_weights(tmp_path)
    assert torch.equal(draw(other), expected)

    again = random_pipeline()
    again.set_progress_bar_config(disable=True)
    models = {"transformer": again.transformer, "text_encoder": again.text_encoder}
    add_lora_adapter(again.transformer, TRANSFORMER_LAYERS, rank=2, alpha=6)
    add_lora_adapter(again.text_encoder, TEXT_ENCODER_LAYERS, rank=2, alpha=6)
    load_lora_adapters(tmp_path, models)
    assert torch.equal(draw(again), expected)
    assert all(p.requires_grad for name, p in again.transformer.named_parameters() if "lora_" in name)

    with pytest.raises(ValueError, match="other layers or another rank.* text_encoder.* and None here"):
        load_lora_adapters(tmp_path, {"transformer": again.transformer})
    other = random_pipeline()
    add_lora_adapter(other.transformer, TRANSFORMER_LAYERS, rank=3)
    add_lora_adapter(other.text_encoder, TEXT_ENCODER_LAYERS, rank=2)
    with pytest.raises(ValueError, match=r"is \(2, 64\) there and \(3, 64\) here"):
        load_lora_adapters(tmp_path, {"transformer": other.transformer, "text_encoder": other.text_encoder})


def test_losses_without_a_class_are_those_of_full_training(pipe):
    batch = batch_of(pipe)
    expected = make_module(pipe, HARTTrainingModule)(**batch, step=3, positions=[4, 5])
    add_lora_adapter(pipe.transformer, TRANSFORMER_LAYERS, rank=2)
    losses = make_module(pipe)(**batch, step=3, positions=[4, 5])
    assert losses.keys() == expected.keys()
    assert all(torch.equal(losses[name], expected[name]) for name in expected)


def test_the_loss_of_the_class(pipe):
    """Is added with its weight, is computed with other draws, and both losses have gradients."""
    add_lora_adapter(pipe.transformer, TRANSFORMER_LAYERS, rank=2)
    own, prior = batch_of(pipe), batch_of(pipe, seed=1)
    arguments = {"step": 0, "positions": [0, 1]}
    alone = make_module(pipe)(**own, **arguments)["loss"]
    losses = make_module(pipe, prior_loss_weight=0.25)(**own, **arguments, prior=prior)
    torch.testing.assert_close(losses["loss"], alone + 0.25 * losses["prior_loss"])
    same_draws = make_module(pipe)(**prior, **arguments)["loss"]
    assert not torch.equal(losses["prior_loss"], same_draws)
    assert losses["prior_loss"].item() == pytest.approx(same_draws.item(), rel=0.5)

    parameter = next(p for name, p in pipe.transformer.named_parameters() if "lora_B" in name)
    gradients = []
    for weight in (0.0, 1.0, 2.0):
        parameter.grad = None
        make_module(pipe, prior_loss_weight=weight)(**own, **arguments, prior=prior)["loss"].backward()
        gradients.append(parameter.grad.clone())
    torch.testing.assert_close(gradients[2] - gradients[1], gradients[1] - gradients[0], rtol=1e-3, atol=1e-5)
    assert not torch.allclose(gradients[0], gradients[1])


def test_a_trained_text_encoder(pipe):
    batch = batch_of(pipe)
    add_lora_adapter(pipe.text_encoder, TEXT_ENCODER_LAYERS, rank=2)
    pipe.transformer.requires_grad_(False)

    def encode(captions):
        return pipe.encode_prompt(captions, do_classifier_free_guidance=False)[:2]

    module = make_module(pipe, text_encoder=pipe.text_encoder, encode_captions=encode)
    expected = make_module(pipe)(**batch, step=0, positions=[0, 1])["loss"]
    loss = module(batch["targets"], 0, [0, 1], captions=["a 0", "a 0"])["loss"]
    torch.testing.assert_close(loss, expected)
    loss.backward()
    gradients = {name: p.grad for name, p in module.named_parameters() if p.requires_grad}
    assert len(gradients) == 2 * 2 * 4 and all(name.startswith("text_encoder.") for name in gradients)
    assert all(gradient.abs().sum() > 0 for name, gradient in gradients.items() if "lora_B" in name)


def test_cached_examples(pipe, tmp_path):
    """Are what a batch would be encoded to, each once; bad pictures stop it or are left out."""
    folder = write_pictures(tmp_path / "pictures", 3)
    source = [(path, path.stem) for path in list_pictures(folder)]
    encoded = []

    def encode(batch):
        encoded.append(batch["caption"])
        targets = teacher_forcing_targets(pipe.vae, SCALES, images=batch["pixel_values"])
        return {**vars(targets), "caption": batch["caption"]}

    prepare = image_preparer(128)
    examples = cache_examples(source, prepare, encode)
    assert encoded == [["0"], ["1"], ["2"]] and [example["caption"] for example in examples] == ["0", "1", "2"]
    pixels = torch.stack([prepare(item, torch.Generator())["pixel_values"] for item in source])
    for name, value in vars(teacher_forcing_targets(pipe.vae, SCALES, images=pixels)).items():
        torch.testing.assert_close(torch.stack([example[name] for example in examples]), value, rtol=0, atol=1e-4)

    (folder / "1.png").write_bytes(b"no picture")
    with pytest.raises(UnreadableImage, match="1.png"):
        cache_examples(source, prepare, encode)
    examples = cache_examples(source, prepare, encode, on_bad_image="skip")
    assert [example["caption"] for example in examples] == ["0", "2"]
    with pytest.raises(ValueError, match="no picture that could be read"):
        cache_examples(source[1:2], prepare, encode, on_bad_image="skip")


def test_what_can_be_cached():
    class Finishing(list):
        def finish_batch(self, batch, device):
            return batch

    assert can_cache([1], False, False)
    assert not can_cache([1], True, False) and not can_cache([1], False, True)
    assert not can_cache(iter([1]), False, False) and not can_cache(Finishing(), False, False)


def test_pairs_of_subject_and_class():
    examples = DreamBoothExamples(["a", "b"], [1, 2, 3, 4, 5], minimum=4)
    pairs = [examples[i] for i in range(len(examples))]
    assert len(pairs) == 6
    assert [subject for subject, _ in pairs].count("a") == 3 and {other for _, other in pairs} == {1, 2, 3, 4, 5}
    with pytest.raises(IndexError):
        examples[6]
    assert [DreamBoothExamples(["a", "b"], minimum=3)[i] for i in range(4)] == [("a", None), ("b", None)] * 2

    prepare = pair_preparer(lambda value, generator: {"x": value}, lambda value, generator: {"x": -value})
    example = prepare((1, 2), None)
    assert example == {"x": 1, "prior_x": -2}
    assert split_prior(example) == ({"x": 1}, {"x": -2}) and split_prior({"x": 1}) == ({"x": 1}, {})
    assert prepare((1, None), None) == {"x": 1}


def test_drawing_pictures_of_the_class(pipe, accelerator, tmp_path):
    """Only what a folder lacks is drawn, each picture from its own seed whatever the batch."""

    def run(folder, count, batch_size):
        return draw_class_pictures(pipe, accelerator, tmp_path / folder, "a dog", count, batch_size, seed=0, top_k=1)

    first = run("first", 3, batch_size=2)
    assert [path.name for path in first] == ["class-00000.png", "class-00001.png", "class-00002.png"]
    pixels = [np.array(PIL.Image.open(path)) for path in first]
    assert pixels[0].shape == (128, 128, 3) and not np.array_equal(pixels[0], pixels[1])
    times = [path.stat().st_mtime_ns for path in first]
    assert run("first", 3, batch_size=2) == first and run("first", 2, batch_size=2) == first
    assert [path.stat().st_mtime_ns for path in first] == times

    write_pictures(tmp_path / "second", 1)
    second = run("second", 3, batch_size=1)
    assert [path.name for path in second] == ["0.png", "class-00000.png", "class-00001.png"]
    for path, expected in zip(second[1:], pixels):
        assert np.abs(np.array(PIL.Image.open(path)).astype(int) - expected).mean() < 2


def test_folders_of_pictures(tmp_path):
    with pytest.raises(ValueError, match="nowhere is no folder"):
        list_pictures(tmp_path / "nowhere")
    folder = write_pictures(tmp_path / "pictures", 2)
    (folder / "notes.txt").write_text("no picture")
    assert [path.name for path in list_pictures(folder)] == ["0.png", "1.png"]
