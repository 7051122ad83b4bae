# SPDX-License-Identifier: Apache-2.0
import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from diffusers_hart import HARTPipeline
from diffusers_hart.conversion import convert_diffusers_to_hart, convert_hart_to_diffusers, load_hart_checkpoint


def tokenizer_tensors(checkpoint):
    weights = load_file(checkpoint / "tokenizer" / "model.safetensors")
    return {name: tensor for name, tensor in weights.items() if not name.startswith("disc.")}


def test_there_and_back_is_the_same_bit_for_bit(converted, tmp_path, assert_same_tensors):
    golden_folder, folder = converted
    original, back = golden_folder / "original", convert_diffusers_to_hart(folder, tmp_path / "back")
    ema = torch.load(original / "llm" / "ema_model.bin")
    assert {"lvl_1L", "attn_bias_for_masking", "blocks.0.attn.zero_k_bias"} < ema.keys()
    assert_same_tensors(torch.load(back / "llm" / "ema_model.bin"), ema)
    assert_same_tensors(load_file(back / "llm" / "model.safetensors"), ema)
    expected = tokenizer_tensors(original)
    assert "vae.quantize.ema_vocab_hit_SV" in expected
    assert_same_tensors(load_file(back / "tokenizer" / "model.safetensors"), expected)
    with safe_open(back / "llm" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}  # transformers refuses files without


def test_configs_there_and_back(converted, tmp_path):
    golden_folder, folder = converted
    back = convert_diffusers_to_hart(folder, tmp_path / "back")
    for part in ("llm", "tokenizer"):
        original = json.loads((golden_folder / "original" / part / "config.json").read_text())
        regenerated = json.loads((back / part / "config.json").read_text())
        assert regenerated == {name: original[name] for name in regenerated}
        assert regenerated.keys() >= {"architectures", "model_type", "torch_dtype"}


def test_trained_weights_there_and_back(golden, text_encoder, tmp_path, assert_same_tensors):
    original = golden / "t2i_tiny" / "original"
    folder = convert_hart_to_diffusers(original, text_encoder("t2i_tiny"), tmp_path / "there", use_ema=False)
    back = convert_diffusers_to_hart(folder, tmp_path / "back")
    trained = load_file(original / "llm" / "model.safetensors")
    assert_same_tensors(torch.load(back / "llm" / "ema_model.bin"), trained)
    assert_same_tensors(load_file(back / "llm" / "model.safetensors"), trained)


def test_weights_keep_the_type_they_are_stored_in(golden, text_encoder, tmp_path):
    original = golden / "t2i_tiny" / "original"
    folder = convert_hart_to_diffusers(original, text_encoder("t2i_tiny"), tmp_path / "there", dtype=torch.bfloat16)
    back = convert_diffusers_to_hart(folder, tmp_path / "back")
    ema, weights = torch.load(original / "llm" / "ema_model.bin"), load_file(back / "llm" / "model.safetensors")
    assert torch.equal(weights["word_embed.weight"], ema["word_embed.weight"].bfloat16())
    assert torch.equal(weights["head.weight"], ema["head.weight"])
    assert json.loads((back / "llm" / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_shards_and_other_sizes_of_them(converted, tmp_path, assert_same_tensors):
    golden_folder, folder = converted
    pipe = HARTPipeline.from_pretrained(folder)
    pipe.save_pretrained(tmp_path / "sharded", max_shard_size="300KB")
    assert len(list((tmp_path / "sharded" / "transformer").glob("*.safetensors"))) > 1
    back = convert_diffusers_to_hart(tmp_path / "sharded", tmp_path / "back")
    ema = torch.load(golden_folder / "original" / "llm" / "ema_model.bin")
    assert_same_tensors(load_file(back / "llm" / "model.safetensors"), ema)


def test_phi_of_one_scale_each_there_and_back(checkpoint, text_encoder, tmp_path, assert_same_tensors):
    path = checkpoint / "tokenizer" / "model.safetensors"
    weights = {name.replace("quant_resi.qresi_ls.", "quant_resi."): tensor for name, tensor in load_file(path).items()}
    for name in ("weight", "bias"):
        weights[f"vae.quantize.quant_resi.4.{name}"] = weights[f"vae.quantize.quant_resi.3.{name}"] + 1
    save_file(weights, path)
    config_path = checkpoint / "tokenizer" / "config.json"
    config_path.write_text(json.dumps(json.loads(config_path.read_text()) | {"share_quant_resi": 0}))
    folder = convert_hart_to_diffusers(checkpoint, text_encoder("t2i_tiny"), tmp_path / "there")
    back = convert_diffusers_to_hart(folder, tmp_path / "back")
    assert_same_tensors(load_file(back / "tokenizer" / "model.safetensors"), tokenizer_tensors(checkpoint))


def test_what_is_written_back_loads_again(converted, tmp_path, assert_same_tensors):
    golden_folder, folder = converted
    back = convert_diffusers_to_hart(folder, tmp_path / "back")
    again, first = load_hart_checkpoint(back, use_ema=False), load_hart_checkpoint(golden_folder / "original")
    for name in ("transformer", "residual_mlp", "vae"):
        assert_same_tensors(again[name].state_dict(), first[name].state_dict())
        assert again[name].config == first[name].config
    assert again["scheduler"].config == first["scheduler"].config


@pytest.fixture
def damaged(converted, tmp_path):
    """A copy of a converted folder to do damage to."""
    return shutil.copytree(converted[1], tmp_path / "damaged")


def test_missing_files(damaged, tmp_path):
    (damaged / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="no weights in .*vae: expected diffusion_pytorch_model.safetensors"):
        convert_diffusers_to_hart(damaged, tmp_path / "back")
    shutil.rmtree(damaged / "residual_mlp")
    with pytest.raises(FileNotFoundError, match="There is no .*residual_mlp.config.json"):
        convert_diffusers_to_hart(damaged, tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_weights_that_do_not_fit(damaged, tmp_path):
    path = damaged / "transformer" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    save_file(
        weights | {"proj_out.weight": weights["proj_out.weight"][:-1].contiguous(), "lora": torch.zeros(1)}, path
    )
    with pytest.raises(ValueError, match="1 of the wrong shape: proj_out.weight .*; keys 1 unknown: lora"):
        convert_diffusers_to_hart(damaged, tmp_path / "back")
    path.write_bytes(path.read_bytes()[:10000])
    with pytest.raises(ValueError, match="diffusion_pytorch_model.safetensors cannot be read, it is damaged"):
        convert_diffusers_to_hart(damaged, tmp_path / "back")
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize(
    ("part", "name", "value", "problem"),
    [
        ("transformer", "_class_name", "UNet2DModel", "holds a UNet2DModel, expected a HARTTransformer2DModel"),
        ("transformer", "rope_theta", 500.0, "cannot express HARTTransformer2DModel with `rope_theta` 500.0"),
        ("residual_mlp", "residual_scale", 1.0, "cannot express ResidualDiffusionMLP with `residual_scale` 1.0"),
    ],
)
def test_models_the_original_has_no_words_for(damaged, tmp_path, part, name, value, problem):
    path = damaged / part / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))
    with pytest.raises(ValueError, match=problem):
        convert_diffusers_to_hart(damaged, tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_what_is_there_is_not_overwritten(converted, tmp_path):
    (tmp_path / "mine").touch()
    with pytest.raises(FileExistsError, match="is not empty"):
        convert_diffusers_to_hart(converted[1], tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
