# SPDX-License-Identifier: Apache-2.0
import json
import shutil

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from diffusers_hart import HARTPipeline
from diffusers_hart.conversion import convert_hart_to_diffusers


def test_the_converted_folder_draws_what_the_original_draws(converted, assert_close):
    golden_folder, folder = converted
    pipe = HARTPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    tensors = load_file(golden_folder / "golden.safetensors")
    side = pipe.transformer.config.sample_size
    images = pipe(
        prompt_embeds=tensors["in.prompt_embeds"],
        prompt_attention_mask=tensors["in.prompt_attention_mask"],
        latents=tensors["e2e.residual_noise"].transpose(1, 2).unflatten(2, (side, side)),
        guidance_scale=tensors["e2e.guidance"].item(),
        top_k=1,
        smooth=False,
        residual_temperature=0,
        output_type="pt",
    ).images
    assert_close(images, tensors["e2e.image"], atol=3e-4)


def test_the_converted_folder_reads_text_as_the_original_does(converted, assert_close):
    golden_folder, folder = converted
    pipe = HARTPipeline.from_pretrained(folder)
    assert pipe.config.system_prompt == "Draw this:\n"
    text = json.loads((golden_folder / "text_golden.json").read_text())
    tensors = load_file(golden_folder / "text_golden.safetensors")
    with torch.no_grad():
        embeds, mask, _, _ = pipe.encode_prompt(text["prompts"], system_prompt=text["system_prompt"])
    assert torch.equal(mask, tensors["system.mask"].long())
    assert_close(embeds, tensors["system.embeds"])


def test_trained_weights_and_dtype(golden, text_encoder, tmp_path):
    original = golden / "t2i_tiny" / "original"
    folder = convert_hart_to_diffusers(
        original, text_encoder("t2i_tiny"), tmp_path / "out", use_ema=False, dtype=torch.float16
    )
    weights = load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    trained = load_file(original / "llm" / "model.safetensors")
    assert torch.equal(weights["x_embedder.weight"], trained["word_embed.weight"].half())
    assert torch.equal(weights["proj_out.weight"], trained["head.weight"])  # stays precise
    text = load_file(folder / "text_encoder" / "model.safetensors")
    assert {tensor.dtype for tensor in text.values()} == {torch.float16}


def test_the_card_of_a_conversion(converted, golden, text_encoder, tmp_path):
    card = ModelCard.load(converted[1] / "README.md")
    assert card.data.library_name == "diffusers"
    assert card.data.license is None
    assert "`llm/ema_model.bin` (EMA weights)" in card.text

    folder = convert_hart_to_diffusers(
        golden / "t2i_tiny" / "original",
        text_encoder("t2i_tiny"),
        tmp_path / "out",
        use_ema=False,
        dtype=torch.bfloat16,
        license="mit",
        base_model="someone/hart",
        repo_id="me/hart",
    )
    card = ModelCard.load(folder / "README.md")
    assert (card.data.license, card.data.base_model) == ("mit", "someone/hart")
    assert "`llm/model.safetensors` (trained weights)" in card.text
    assert 'from_pretrained("me/hart"' in card.text
    assert "bfloat16 and float32" in card.text
    assert str(tmp_path) not in card.text and str(golden) not in card.text


def test_an_empty_folder_is_written_into(golden, text_encoder, tmp_path):
    (tmp_path / "out").mkdir()
    folder = convert_hart_to_diffusers(
        golden / "t2i_variant" / "original", text_encoder("t2i_variant"), tmp_path / "out"
    )
    assert (folder / "model_index.json").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_is_there_is_not_overwritten(golden, text_encoder, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    (tmp_path / "file").touch()
    for name, problem in (("out", "is not empty"), ("file", "is a file")):
        with pytest.raises(FileExistsError, match=problem):
            convert_hart_to_diffusers(golden / "t2i_tiny" / "original", text_encoder("t2i_tiny"), tmp_path / name)
    assert sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")) == ["file", "out", "out/mine"]


def test_text_encoders_that_do_not_fit(golden, text_encoder, tmp_path):
    original, out = golden / "t2i_tiny" / "original", tmp_path / "new" / "out"
    with pytest.raises(ValueError, match="hidden states of width 16; the checkpoint .* width 24"):
        convert_hart_to_diffusers(original, text_encoder("t2i_variant"), out)

    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="No text encoder with its tokenizer can be loaded from .*empty"):
        convert_hart_to_diffusers(original, tmp_path / "empty", out)

    no_padding = shutil.copytree(text_encoder("t2i_tiny"), tmp_path / "no_padding")
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        values = json.loads((no_padding / name).read_text())
        values.pop("pad_token")
        (no_padding / name).write_text(json.dumps(values | {"tokenizer_class": "PreTrainedTokenizerFast"}))
    config = json.loads((no_padding / "config.json").read_text())
    (no_padding / "config.json").write_text(json.dumps(config | {"model_type": "llama"}))
    with pytest.raises(ValueError, match="has no pad token"):
        convert_hart_to_diffusers(original, no_padding, out)
    assert not out.parent.exists()


def test_nothing_is_left_behind_by_a_failure(checkpoint, text_encoder, tmp_path):
    weights = torch.load(checkpoint / "llm" / "ema_model.bin")
    del weights["head.weight"]
    torch.save(weights, checkpoint / "llm" / "ema_model.bin")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ValueError, match="1 missing: head.weight"):
        convert_hart_to_diffusers(checkpoint, text_encoder("t2i_tiny"), tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == before


def test_a_text_encoder_without_its_tokenizer(golden, tmp_path):
    """transformers makes up an empty tokenizer from the model's config, to which every prompt is empty."""
    with pytest.raises(ValueError, match="has no tokenizer: its files"):
        convert_hart_to_diffusers(
            golden / "t2i_tiny" / "original", golden / "t2i_tiny" / "text_encoder", tmp_path / "converted"
        )
    assert not (tmp_path / "converted").exists()
