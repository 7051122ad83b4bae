# SPDX-License-Identifier: Apache-2.0
import json
import pickle
import re
from pathlib import Path

import pytest
import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file, save_file

from diffusers_hart import HARTScheduler
from diffusers_hart.conversion import load_hart_checkpoint


def edit_config(checkpoint: Path, part: str, **changes):
    """Change values of a config; `None` takes a key out."""
    path = checkpoint / part / "config.json"
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in values.items() if value is not None}))


def edit_ema(checkpoint: Path, **changes):
    """Change weights; `None` takes one out. `__` stands for the dots of a name."""
    path = checkpoint / "llm" / "ema_model.bin"
    weights = torch.load(path) | {name.replace("__", "."): tensor for name, tensor in changes.items()}
    torch.save({name: tensor for name, tensor in weights.items() if tensor is not None}, path)


def test_ema_weights_are_the_default(golden):
    original = golden / "t2i_tiny" / "original"
    ema = torch.load(original / "llm" / "ema_model.bin")
    trained = load_file(original / "llm" / "model.safetensors")
    assert not torch.equal(ema["head.weight"], trained["head.weight"])
    for use_ema, weights in ((True, ema), (False, trained)):
        components = load_hart_checkpoint(original, use_ema=use_ema)
        assert torch.equal(components["transformer"].proj_out.weight, weights["head.weight"])
        linear = components["residual_mlp"].proj_out
        assert torch.equal(linear.weight, weights["diffloss.net.final_layer.linear.weight"])


def test_components_are_ready_to_use(golden):
    components = load_hart_checkpoint(golden / "t2i_variant" / "original")
    models = [components[name] for name in ("transformer", "residual_mlp", "vae")]
    assert not any(module.training for model in models for module in model.modules())
    assert all(parameter.device.type == "cpu" for model in models for parameter in model.parameters())
    assert components["scheduler"].config.num_inference_steps == 8
    assert components["transformer"].config.sample_size == 5
    assert components["residual_scheduler"].config.num_train_timesteps == 1000


def test_weights_keep_the_type_of_the_file(checkpoint):
    path = checkpoint / "llm" / "ema_model.bin"
    torch.save({name: tensor.half() for name, tensor in torch.load(path).items()}, path)
    components = load_hart_checkpoint(checkpoint)
    assert {parameter.dtype for parameter in components["transformer"].parameters()} == {torch.float16}
    assert {parameter.dtype for parameter in components["vae"].parameters()} == {torch.float32}


def test_dtype_leaves_what_must_stay_precise_in_float32(golden):
    original = golden / "t2i_tiny" / "original"
    exact, rounded = load_hart_checkpoint(original), load_hart_checkpoint(original, dtype=torch.bfloat16)
    for name in ("transformer", "residual_mlp", "vae"):
        for key, parameter in rounded[name].named_parameters():
            precise = name != "residual_mlp" and key.startswith(("norm_out", "proj_out", "codebook", "phi"))
            precise = precise or key.endswith("logit_scale")
            assert parameter.dtype == (torch.float32 if precise else torch.bfloat16), key
            assert torch.equal(parameter, exact[name].get_parameter(key).to(parameter.dtype))


@pytest.mark.parametrize("form", ["pytorch_model.bin", "shards"])
def test_other_forms_of_weight_files(checkpoint, form):
    weights = load_file(checkpoint / "llm" / "model.safetensors")
    (checkpoint / "llm" / "model.safetensors").unlink()
    if form == "shards":
        save_torch_state_dict(weights, checkpoint / "llm", max_shard_size="200KB")
        assert len(list((checkpoint / "llm").glob("model-*.safetensors"))) > 1
    else:
        torch.save(weights, checkpoint / "llm" / form)
    transformer = load_hart_checkpoint(checkpoint, use_ema=False)["transformer"]
    assert torch.equal(transformer.x_embedder.weight, weights["word_embed.weight"])
    assert torch.equal(transformer.proj_out.weight, weights["head.weight"])


def test_schedules(checkpoint):
    published = [list(schedule) for schedule in HARTScheduler().config.schedules]
    components = load_hart_checkpoint(checkpoint)
    assert [list(schedule) for schedule in components["scheduler"].config.schedules] == [[1, 2, 3, 4, 6]]

    # The tokenizer's own schedule may be that of a smaller size; pictures have the transformer's.
    for patch_nums in published:
        edit_config(checkpoint, "llm", patch_nums=patch_nums)
        components = load_hart_checkpoint(checkpoint)
        assert [list(schedule) for schedule in components["scheduler"].config.schedules] == published
        assert list(components["vae"].config.scales) == patch_nums
        assert components["transformer"].config.sample_size == patch_nums[-1]


def test_a_missing_key_of_a_config_is_the_default_of_the_original(checkpoint, golden):
    variant = golden / "t2i_variant" / "original"
    values = json.loads((variant / "llm" / "config.json").read_text())
    assert values["attn_l2_norm"] is False and values["mlp_ratio"] == 4.0
    for part in ("llm", "tokenizer"):
        for file in (variant / part).iterdir():
            (checkpoint / part / file.name).write_bytes(file.read_bytes())
    edit_config(checkpoint, "llm", attn_l2_norm=None, mlp_ratio=None, num_sampling_steps=None, shared_aln=None)
    components = load_hart_checkpoint(checkpoint)
    assert components["transformer"].config.qk_norm is False
    assert components["scheduler"].config.num_inference_steps == 8

    edit_config(checkpoint, "llm", use_context_norm=None)
    with pytest.raises(ValueError, match=r"`use_context_norm` False \(the default: the key is missing\)"):
        load_hart_checkpoint(checkpoint)


def test_phi_of_one_scale_each(checkpoint):
    path = checkpoint / "tokenizer" / "model.safetensors"
    weights = load_file(path)
    save_file({name.replace("quant_resi.qresi_ls.", "quant_resi."): weights[name] for name in weights}, path)
    edit_config(checkpoint, "tokenizer", share_quant_resi=0, default_qresi_counts=4)
    vae = load_hart_checkpoint(checkpoint)["vae"]
    assert len(vae.phi) == 4
    assert torch.equal(vae.phi[2].weight, weights["vae.quantize.quant_resi.qresi_ls.2.weight"])


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [
        ("llm", "model_type", "hart_transformer_c2i"),
        ("llm", "attn_type", "gpt2"),
        ("llm", "mlp_type", "gpt2"),
        ("llm", "disable_aln", False),
        ("llm", "shared_aln", True),
        ("llm", "sep_aln_pooling_mode", "avg"),
        ("llm", "use_context_norm", False),
        ("llm", "use_cross_attn", True),
        ("llm", "diffusion_head_repeats", 2),
        ("llm", "sampler", "dpm"),
        ("llm", "num_sampling_steps", "ddim25"),
        ("llm", "patch_nums", [2, 3, 4, 6]),
        ("llm", "patch_nums", "1 2 3"),
        ("llm", "depth", "2"),
        ("llm", "num_heads", 5),
        ("tokenizer", "quantizer_type", "var"),
        ("tokenizer", "using_znorm", True),
        ("tokenizer", "quant_conv_ks", 1),
        ("tokenizer", "disable_quant_resi", True),
        ("tokenizer", "double_decoder", True),
        ("tokenizer", "quant_resi", 0.0),
        ("tokenizer", "ch_mult", [2, 4]),
    ],
)
def test_unsupported_values_of_configs(checkpoint, part, name, value):
    edit_config(checkpoint, part, **{name: value})
    with pytest.raises(ValueError, match=f"`{name}` {re.escape(repr(value))}"):
        load_hart_checkpoint(checkpoint)


def test_unknown_keys_of_configs_are_no_matter(checkpoint):
    edit_config(checkpoint, "llm", some_later_addition=1)
    load_hart_checkpoint(checkpoint)


def test_missing_keys(checkpoint):
    edit_ema(checkpoint, head__weight=None, diffloss__net__input_proj__bias=None)
    with pytest.raises(ValueError, match="ema_model.bin does not fit its config. Keys 1 missing: head.weight"):
        load_hart_checkpoint(checkpoint)
    edit_ema(checkpoint, head__weight=torch.zeros(640, 64))
    with pytest.raises(ValueError, match="1 missing: diffloss.net.input_proj.bias"):
        load_hart_checkpoint(checkpoint)


def test_mis_shaped_keys(checkpoint):
    edit_ema(checkpoint, blocks__1__attn__qkv_proj__weight=torch.zeros(64, 64))
    with pytest.raises(ValueError, match=r"blocks.1.attn.qkv_proj.weight is \(64, 64\), expected \(192, 64\)"):
        load_hart_checkpoint(checkpoint)


def test_extra_keys_unless_allowed(checkpoint):
    edit_ema(checkpoint, blocks__7__surprise=torch.zeros(1))
    with pytest.raises(ValueError, match="1 unknown: blocks.7.surprise"):
        load_hart_checkpoint(checkpoint)
    components = load_hart_checkpoint(checkpoint, allow_extra_keys=True)
    assert "surprise" not in str(components["transformer"].state_dict().keys())


@pytest.mark.parametrize(
    "file", ["llm/ema_model.bin", "llm/model.safetensors", "tokenizer/model.safetensors", "llm/config.json"]
)
@pytest.mark.parametrize("kept", [0.0, 0.7])
def test_truncated_files(checkpoint, file, kept):
    content = (checkpoint / file).read_bytes()
    (checkpoint / file).write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(ValueError, match=re.escape(str(checkpoint / file))):
        load_hart_checkpoint(checkpoint, use_ema="model" not in file or "ema" in file)


def test_a_pointer_of_git_lfs(checkpoint):
    (checkpoint / "tokenizer" / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ValueError, match="git lfs pull"):
        load_hart_checkpoint(checkpoint)


class Trap:
    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self):
        return Path.touch, (self.target,)


@pytest.mark.parametrize("save", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value, protocol=2))])
def test_code_in_a_pickle_is_refused_and_not_run(checkpoint, tmp_path, save):
    target = tmp_path / "it_ran"
    pickle.loads(pickle.dumps(Trap(target)))
    assert target.exists()  # the trap works
    target.unlink()
    save({"head.weight": Trap(target)}, checkpoint / "llm" / "ema_model.bin")
    with pytest.raises(ValueError, match="ema_model.bin is not a pickle of plain tensors.*not run"):
        load_hart_checkpoint(checkpoint)
    assert not target.exists()


@pytest.mark.parametrize("value", [[torch.zeros(1)], {"head.weight": 1.0}, {"model": {"head.weight": torch.zeros(1)}}])
def test_a_pickle_of_something_else(checkpoint, value):
    torch.save(value, checkpoint / "llm" / "ema_model.bin")
    with pytest.raises(ValueError, match="ema_model.bin must hold tensors by name and nothing else"):
        load_hart_checkpoint(checkpoint)


def test_missing_files(checkpoint, tmp_path):
    with pytest.raises(FileNotFoundError, match="an original checkpoint has `llm` and `tokenizer` side by side"):
        load_hart_checkpoint(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="an original checkpoint has `llm` and `tokenizer` side by side"):
        load_hart_checkpoint(checkpoint / "llm")
    (checkpoint / "llm" / "ema_model.bin").unlink()
    with pytest.raises(FileNotFoundError, match="expected ema_model.bin.*--no_ema"):
        load_hart_checkpoint(checkpoint)
    (checkpoint / "llm" / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="expected model.safetensors or pytorch_model.bin"):
        load_hart_checkpoint(checkpoint, use_ema=False)


def test_broken_indices_of_shards(checkpoint):
    (checkpoint / "llm" / "model.safetensors").unlink()
    index = checkpoint / "llm" / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"head.weight": "model-1.safetensors"}}')
    with pytest.raises(FileNotFoundError, match="lists model-1.safetensors, which is missing"):
        load_hart_checkpoint(checkpoint, use_ema=False)
    index.write_text('{"weight_map": {"head.weight": "../tokenizer/model.safetensors"}}')
    with pytest.raises(ValueError, match="not a file beside it"):
        load_hart_checkpoint(checkpoint, use_ema=False)
    index.write_text("{}")
    with pytest.raises(ValueError, match="has no `weight_map`"):
        load_hart_checkpoint(checkpoint, use_ema=False)
