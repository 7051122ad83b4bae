# SPDX-License-Identifier: Apache-2.0
import json
import os
import pickle
import shutil
import sys
from pathlib import Path

import pytest
import torch
from diffusers.hooks import apply_group_offloading
from diffusers.utils import logging
from hub_server import Repository
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file

from diffusers_hart import HARTClassConditionalPipeline, HARTPipeline, HARTTransformer2DModel
from diffusers_hart.random_pipeline import random_pipeline


TARGETS = {
    "transformer": ["to_q", "to_k", "to_v", "to_out.0", "gate_proj", "up_proj", "down_proj"],
    "residual_mlp": ["linear_1", "linear_2"],
    "text_encoder": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj"],
}


@pytest.fixture
def pipe():
    pipe = random_pipeline()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe, **options):
    generator = torch.Generator().manual_seed(0)
    return pipe("a red circle", generator=generator, output_type="latent", **options).images


def write_adapter(folder, components=("transformer",), rank=4, alpha=8, seed=0, size=0.5, **options) -> Path:
    """An adapter of a fresh pipeline, with random weights of both factors, as training saves it."""
    pipe, tensors = random_pipeline(), {}
    for name in components:
        model = getattr(pipe, name)
        model.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, target_modules=TARGETS[name], **options))
        weights = get_peft_model_state_dict(model, adapter_name="default")
        generator = torch.Generator().manual_seed(seed)
        weights = {key: size * torch.randn(value.shape, generator=generator) / 4 for key, value in weights.items()}
        tensors[f"{name}_lora_layers"] = weights
        tensors[f"{name}_lora_adapter_metadata"] = model.peft_config["default"].to_dict()
    HARTPipeline.save_lora_weights(folder, **tensors)
    return folder / "pytorch_lora_weights.safetensors"


def weights(pipe):
    return {
        f"{name}.{key.replace('.base_layer', '')}": value.clone()
        for name in TARGETS
        for key, value in getattr(pipe, name).state_dict().items()
        if "lora_" not in key
    }


def scalings(pipe):
    return [
        dict(layer.scaling)
        for name in TARGETS
        for layer in getattr(pipe, name).modules()
        if isinstance(layer, LoraLayer)
    ]


def test_a_zero_adapter_changes_nothing(pipe, tmp_path):
    base = draw(pipe)
    for name, targets in TARGETS.items():
        getattr(pipe, name).add_adapter(LoraConfig(r=4, target_modules=targets))  # peft starts lora_B at zero
    assert torch.equal(draw(pipe), base)


@pytest.mark.parametrize("component", list(TARGETS))
def test_scales(component, pipe, tmp_path):
    """Of each model alone: the scale of a call, and the weights of `set_adapters`, which it leaves as they are."""
    base = draw(pipe)
    pipe.load_lora_weights(write_adapter(tmp_path, [component]), adapter_name="style")
    adapted = draw(pipe)
    assert not torch.equal(adapted, base)
    assert torch.equal(draw(pipe, attention_kwargs={"scale": 0.0}), base)
    assert torch.equal(draw(pipe, attention_kwargs={"scale": 1.0}), adapted)
    assert torch.equal(draw(pipe), adapted)

    half = draw(pipe, attention_kwargs={"scale": 0.5})
    assert not torch.equal(half, adapted) and not torch.equal(half, base)
    pipe.set_adapters("style", 0.5)
    assert torch.equal(draw(pipe), half)
    before = scalings(pipe)
    for scale in (0.3, 0.0):
        draw(pipe, attention_kwargs={"scale": scale})
        assert scalings(pipe) == before
    pipe.set_adapters("style", 0.0)
    assert torch.equal(draw(pipe), base)


def test_a_scale_is_undone_after_an_exception(pipe, tmp_path, monkeypatch):
    pipe.load_lora_weights(write_adapter(tmp_path, TARGETS), adapter_name="style")
    pipe.set_adapters("style", 0.7)
    before = scalings(pipe)

    def interrupt(pipe, index, side, tensors):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        draw(pipe, attention_kwargs={"scale": 0.0}, callback_on_step_end=interrupt)
    assert scalings(pipe) == before
    with pytest.raises(ValueError):
        pipe.encode_prompt([None], lora_scale=0.0)
    assert scalings(pipe) == before
    with pytest.raises(ValueError, match="must be a number, not 'high'"):
        draw(pipe, attention_kwargs={"scale": "high"})


def test_encoding_with_a_scale(pipe, tmp_path):
    base = pipe.encode_prompt("a", negative_prompt="b")
    pipe.load_lora_weights(write_adapter(tmp_path, ["text_encoder"]))
    with torch.no_grad():
        scaled = pipe.encode_prompt("a", negative_prompt="b", lora_scale=0.0)
        adapted = pipe.encode_prompt("a", negative_prompt="b")
    for place in (0, 2):
        assert torch.equal(scaled[place], base[place])
        assert not torch.equal(adapted[place], base[place])


def test_several_adapters(pipe, tmp_path):
    """Together they add the sum of what each adds to a weight, times its own weight."""
    before = weights(pipe)
    for i, name in enumerate(("first", "second")):
        pipe.load_lora_weights(write_adapter(tmp_path / name, TARGETS, rank=2 + i, seed=i), adapter_name=name)
        assert name in pipe.get_active_adapters()

    def deltas(names, factors=1.0):
        pipe.set_adapters(names, factors)
        assert pipe.get_active_adapters() == ([names] if isinstance(names, str) else names)
        pipe.fuse_lora()
        after = weights(pipe)
        pipe.unfuse_lora()
        return {key: after[key] - before[key] for key in before}

    first, second = deltas("first"), deltas("second")
    both = deltas(["first", "second"], [0.5, 2.0])
    assert (
        sum(value.any().item() for value in both.values()) == 2 * 7 + (2 * 2 + 2) + 2 * 5
    )  # the MLP of diffusion times too
    for key in both:
        torch.testing.assert_close(both[key], 0.5 * first[key] + 2.0 * second[key], rtol=0, atol=2e-6)
    of_parts = deltas("first", {"transformer": 1.0, "residual_mlp": 0.0, "text_encoder": 0.0})
    for key in of_parts:
        expected = first[key] if key.startswith("transformer.") else torch.zeros_like(first[key])
        torch.testing.assert_close(of_parts[key], expected, rtol=0, atol=2e-6)


def test_fusing(pipe, tmp_path):
    base, before = draw(pipe), weights(pipe)
    pipe.load_lora_weights(write_adapter(tmp_path, TARGETS, size=0.2), adapter_name="style")
    adapted = draw(pipe, smooth=False, top_k=1)
    pipe.fuse_lora()
    assert pipe.fused_loras == {"style"} and pipe.num_fused_loras == 1
    torch.testing.assert_close(draw(pipe, smooth=False, top_k=1), adapted, rtol=0, atol=1e-3)
    pipe.unfuse_lora()
    assert pipe.num_fused_loras == 0
    for key, value in weights(pipe).items():
        torch.testing.assert_close(value, before[key], rtol=0, atol=1e-6)

    pipe.fuse_lora(lora_scale=0.5)
    fused = weights(pipe)
    pipe.unload_lora_weights()
    assert not any(isinstance(m, LoraLayer) for name in TARGETS for m in getattr(pipe, name).modules())
    assert weights(pipe).keys() == before.keys()
    assert all(torch.equal(value, fused[key]) for key, value in weights(pipe).items())
    assert not torch.equal(draw(pipe), base)


def test_a_scale_warns_where_adapters_are_fused(pipe, tmp_path, caplog):
    pipe.load_lora_weights(write_adapter(tmp_path))
    pipe.fuse_lora()
    logging.enable_propagation()
    draw(pipe)
    assert "has no effect" not in caplog.text
    draw(pipe, attention_kwargs={"scale": 0.5})
    logging.disable_propagation()
    assert "A LoRA scale of 0.5 has no effect on adapters that are fused" in caplog.text


def test_switching_off_deleting_and_unloading(pipe, tmp_path):
    base, names = draw(pipe), list(weights(pipe))
    pipe.load_lora_weights(write_adapter(tmp_path / "first", TARGETS), adapter_name="first")
    first = draw(pipe)
    pipe.disable_lora()
    assert torch.equal(draw(pipe), base)
    pipe.enable_lora()
    assert torch.equal(draw(pipe), first)

    pipe.load_lora_weights(write_adapter(tmp_path / "second", ["transformer"], seed=1))
    assert pipe.get_list_adapters() == {
        "transformer": ["first", "default_0"],
        "residual_mlp": ["first"],
        "text_encoder": ["first"],
    }
    assert pipe.get_active_adapters() == ["default_0", "first"]
    pipe.delete_adapters("default_0")
    pipe.set_adapters("first")
    assert torch.equal(draw(pipe), first)
    pipe.delete_adapters(["first"])
    assert pipe.get_list_adapters() in ({}, {"transformer": [], "residual_mlp": []})
    assert torch.equal(draw(pipe), base)
    pipe.load_lora_weights(tmp_path / "first")
    pipe.unload_lora_weights()
    assert torch.equal(draw(pipe), base) and list(weights(pipe)) == names and pipe.get_active_adapters() == []


def test_saving_what_was_loaded(pipe, tmp_path):
    """The settings that tensors do not tell are kept, and the picture is the same bit for bit."""
    options = {"use_rslora": True, "alpha_pattern": {"to_k": 2}, "rank_pattern": {"to_v": 3, "linear_1": 2}}
    path = write_adapter(tmp_path / "saved", TARGETS, **options)
    pipe.load_lora_weights(path, adapter_name="style")
    assert pipe.transformer.transformer_blocks[0].attn.to_k.scaling["style"] == 2 / 4**0.5
    assert pipe.transformer.transformer_blocks[0].attn.to_v.scaling["style"] == 8 / 3**0.5
    image = draw(pipe)
    parts = {name: getattr(pipe, name) for name in TARGETS}
    pipe.save_lora_weights(
        tmp_path / "again",
        **{f"{n}_lora_layers": get_peft_model_state_dict(m, adapter_name="style") for n, m in parts.items()},
        **{f"{n}_lora_adapter_metadata": m.peft_config["style"].to_dict() for n, m in parts.items()},
    )
    files = [load_file(folder / path.name) for folder in (path.parent, tmp_path / "again")]
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(files[0][key], files[1][key]) for key in files[0])
    assert "transformer.transformer_blocks.0.attn.to_out.0.lora_A.weight" in files[0]

    other = random_pipeline()
    other.set_progress_bar_config(disable=True)
    other.load_lora_weights(str(tmp_path / "again"))
    assert torch.equal(draw(other), image)


def test_tensors_without_settings(pipe, tmp_path):
    """Their factor is 1, as elsewhere in diffusers; the dict is left as it was."""
    tensors = load_file(write_adapter(tmp_path, alpha=8))
    keys = list(tensors)
    pipe.load_lora_weights(tensors)
    assert list(tensors) == keys
    assert {factor for layer in scalings(pipe) for factor in layer.values()} == {1.0}
    state_dict, metadata = pipe.lora_state_dict(tmp_path, return_lora_metadata=True)
    assert state_dict.keys() == tensors.keys() and metadata["transformer.lora_alpha"] == 8


@pytest.mark.parametrize("component", ["transformer", "residual_mlp", "text_encoder"])
def test_what_peft_saves(component, pipe, tmp_path):
    """A `PeftModel` of one of the models, saved by peft itself, gives the picture that it gave there."""
    other = random_pipeline()
    other.set_progress_bar_config(disable=True)
    config = LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS[component], init_lora_weights=False)
    adapted = get_peft_model(getattr(other, component), config)
    adapted.save_pretrained(tmp_path)
    expected = draw(other)
    assert (tmp_path / "adapter_model.safetensors").exists()
    pipe.load_lora_weights(tmp_path, adapter_name="style")
    assert pipe.get_list_adapters() == {component: ["style"]}
    assert torch.equal(draw(pipe), expected)


def test_what_a_model_saves(pipe, tmp_path):
    """`save_lora_adapter` of the transformer alone knows no prefix."""
    pipe.transformer.add_adapter(
        LoraConfig(r=2, lora_alpha=5, target_modules=["to_q"], init_lora_weights=False), "style"
    )
    expected = draw(pipe)
    pipe.transformer.save_lora_adapter(tmp_path, adapter_name="style")
    other = random_pipeline()
    other.set_progress_bar_config(disable=True)
    other.load_lora_weights(tmp_path)
    assert torch.equal(draw(other), expected)


def draw_from_hub():
    pipe = random_pipeline()
    pipe.load_lora_weights("me/style", adapter_name="style")
    return draw(pipe).tolist()


def test_from_the_hub(pipe, tmp_path, hub):
    path = write_adapter(tmp_path / "saved", TARGETS)
    hub.repositories["me/style"] = Repository()
    hub.repositories["me/style"].commit({path.name: path.read_bytes(), "README.md": b"A style"}, "A LoRA")
    pipe.load_lora_weights(path)
    found = hub.call(
        draw_from_hub, OMP_NUM_THREADS="1", PYTHONPATH=os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])
    )
    torch.testing.assert_close(torch.tensor(found), draw(pipe), rtol=0, atol=1e-4)


def test_hot_swapping(pipe, tmp_path):
    """Of the transformer, of another rank and factor; and an adapter that has other parts is refused."""
    first = write_adapter(tmp_path / "first", rank=2, alpha=2)
    second = write_adapter(tmp_path / "second", rank=4, alpha=8, seed=1)
    pipe.load_lora_weights(second)
    expected = draw(pipe)
    pipe.unload_lora_weights()

    pipe.enable_lora_hotswap(target_rank=4)
    pipe.load_lora_weights(first, adapter_name="style")
    layer = pipe.transformer.transformer_blocks[0].attn.to_q
    weight = layer.lora_A["style"].weight
    pipe.load_lora_weights(second, adapter_name="style", hotswap=True)
    assert layer.lora_A["style"].weight is weight
    assert torch.equal(draw(pipe), expected)
    draw(pipe, attention_kwargs={"scale": 0.0})
    assert torch.equal(draw(pipe), expected)

    with pytest.raises(ValueError, match=r"no adapters \['other'\]; loaded are \['style'\]"):
        pipe.load_lora_weights(second, adapter_name="other", hotswap=True)
    with pytest.raises(ValueError, match="needs the `adapter_name` to replace"):
        pipe.load_lora_weights(second, hotswap=True)
    with pytest.raises(ValueError, match="text encoder cannot be hot-swapped"):
        pipe.load_lora_weights(write_adapter(tmp_path / "text", TARGETS), adapter_name="style", hotswap=True)
    other = write_adapter(tmp_path / "mlp", ["transformer", "residual_mlp"])
    with pytest.raises(ValueError, match=r"has layers in \['transformer'\].* in \['residual_mlp', 'transformer'\]"):
        pipe.load_lora_weights(other, adapter_name="style", hotswap=True)
    assert torch.equal(draw(pipe), expected)


def test_compiled_models(pipe, tmp_path):
    """Swapping compiles nothing anew where blocks are compiled in place; a wrapped model is refused."""
    first = write_adapter(tmp_path / "first", rank=2, alpha=2)
    second = write_adapter(tmp_path / "second", rank=4, alpha=8, seed=1)
    pipe.load_lora_weights(second)
    expected = draw(pipe)
    pipe.unload_lora_weights()

    pipe.enable_lora_hotswap(target_rank=4)
    pipe.load_lora_weights(first, adapter_name="style")
    pipe.transformer.compile_repeated_blocks(fullgraph=True, backend="eager")
    assert not torch.equal(draw(pipe), expected)
    with torch._dynamo.config.patch(error_on_recompile=True):
        pipe.load_lora_weights(second, adapter_name="style", hotswap=True)
        torch.testing.assert_close(draw(pipe), expected, rtol=0, atol=1e-3)
    pipe.transformer = torch.compile(pipe.transformer)
    with pytest.raises(ValueError, match="transformer is wrapped by `torch.compile`.*compile_repeated_blocks"):
        pipe.load_lora_weights(second)


def test_low_precision(tmp_path):
    random_pipeline().save_pretrained(tmp_path / "model")
    pipe = HARTPipeline.from_pretrained(tmp_path / "model", dtype=torch.bfloat16)
    pipe.set_progress_bar_config(disable=True)
    base = draw(pipe)
    pipe.load_lora_weights(write_adapter(tmp_path / "lora", TARGETS))
    assert {p.dtype for name, p in pipe.transformer.named_parameters() if "lora_" in name} == {torch.bfloat16}
    assert not torch.equal(draw(pipe), base)
    assert torch.equal(draw(pipe, attention_kwargs={"scale": 0.0}), base)


def test_fused_projections_and_adapters(pipe, tmp_path):
    path = write_adapter(tmp_path)
    pipe.transformer.fuse_qkv_projections()
    with pytest.raises(ValueError, match="projections of this transformer are fused"):
        pipe.load_lora_weights(path)
    pipe.transformer.unfuse_qkv_projections()
    pipe.load_lora_weights(path)
    with pytest.raises(ValueError, match="Projections with LoRA adapters cannot be joined"):
        pipe.transformer.fuse_qkv_projections()
    adapted = draw(pipe, smooth=False, top_k=1)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    pipe.transformer.fuse_qkv_projections()
    torch.testing.assert_close(draw(pipe, smooth=False, top_k=1), adapted, rtol=0, atol=1e-3)


def test_a_pipeline_of_classes(tmp_path):
    tiny = random_pipeline()
    config = {name: tiny.transformer.config[name] for name in ("in_channels", "codebook_size", "sample_size")}
    transformer = HARTTransformer2DModel(
        **config,
        num_layers=2,
        num_attention_heads=4,
        attention_head_dim=16,
        caption_channels=None,
        num_classes=3,
    )
    with torch.no_grad():
        transformer.proj_out.weight.mul_(16)
        for block in transformer.transformer_blocks:
            block.modulation.bias.fill_(1.0)
    pipe = HARTClassConditionalPipeline(
        transformer.eval(), tiny.vae, tiny.scheduler, tiny.residual_mlp, tiny.residual_scheduler
    )
    pipe.set_progress_bar_config(disable=True)

    def draw_class(**options):
        return pipe([1], generator=torch.Generator().manual_seed(0), output_type="latent", **options).images

    base = draw_class()
    path = write_adapter(tmp_path, ["transformer", "residual_mlp"])
    pipe.load_lora_weights(path)
    assert not torch.equal(draw_class(), base)
    assert torch.equal(draw_class(attention_kwargs={"scale": 0.0}), base)
    pipe.unload_lora_weights()
    assert torch.equal(draw_class(), base)


def assert_untouched(pipe, names):
    assert list(weights(pipe)) == names and pipe.get_list_adapters() == {}


def test_a_lora_for_another_model(pipe, tmp_path):
    names = list(weights(pipe))
    tensors = load_file(write_adapter(tmp_path, TARGETS))
    flux = {key.replace("transformer_blocks", "single_blocks"): value for key, value in tensors.items()}
    with pytest.raises(
        ValueError,
        match=r"LoRA for another model: 28 of its 28 tensors do not fit the transformer: "
        r"single_blocks.0.attn.to_k.lora_A.weight \(there is no single_blocks.0.attn.to_k\), .*, \.\.\.",
    ):
        pipe.load_lora_weights({key: value for key, value in flux.items() if key.startswith("transformer.")})
    with pytest.raises(ValueError, match="24 tensors do not fit any of .*: unet.down.0.lora_A.weight, unet.up"):
        few = dict(list(tensors.items())[:22])
        pipe.load_lora_weights({**few, "unet.down.0.lora_A.weight": torch.ones(1), "unet.up": torch.ones(1)})
    with pytest.raises(ValueError, match="1 of its 1 tensors do not fit any of .*: lora_unet_blocks"):
        pipe.load_lora_weights({"lora_unet_blocks.alpha": torch.ones(1)})
    with pytest.raises(ValueError, match="holds no tensors"):
        pipe.load_lora_weights({})

    wide = {key: torch.ones(value.shape[0], 96) for key, value in tensors.items() if "to_q.lora_A" in key}
    with pytest.raises(ValueError, match=r"blocks.0.attn.to_q.lora_A.weight \(of shape \(4, 96\) for 64 inputs\)"):
        pipe.load_lora_weights({**tensors, **wide})
    with pytest.raises(ValueError, match=r"attn.norm.lora_A.weight \(there is no"):
        pipe.load_lora_weights({"transformer.transformer_blocks.0.attn.norm.lora_A.weight": torch.ones(4, 64)})
    key = "transformer.transformer_blocks.0.attn.to_q.lora_B.weight"
    with pytest.raises(ValueError, match="to_q is incomplete: lora_B.weight is missing"):
        pipe.load_lora_weights({k: v for k, v in tensors.items() if k != key})
    with pytest.raises(ValueError, match="to_q has rank 4 in lora_A and 3 in lora_B"):
        pipe.load_lora_weights({**tensors, key: tensors[key][:, :3]})
    empty = {k: v[:0] if "lora_A" in k else v[:, :0] for k, v in tensors.items()}
    with pytest.raises(ValueError, match="has rank 0 in lora_A and 0 in lora_B; both must be the same positive"):
        pipe.load_lora_weights(empty)
    assert_untouched(pipe, names)


def test_damaged_files(pipe, tmp_path):
    names = list(weights(pipe))
    path = write_adapter(tmp_path)
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"\0" * 64):
        path.write_bytes(content)
        for source in (path, tmp_path):
            with pytest.raises(OSError, match=f"{source} is no readable safetensors file"):
                pipe.load_lora_weights(source)
    save_file(load_file(write_adapter(tmp_path)), path, metadata={"lora_adapter_metadata": "{"})
    with pytest.raises(OSError, match="is no readable safetensors file"):
        pipe.load_lora_weights(path)
    metadata = json.dumps({"transformer.lora_alpha": "much", "transformer.r": 4})
    save_file(load_file(write_adapter(tmp_path)), path, metadata={"lora_adapter_metadata": metadata})
    with pytest.raises(ValueError, match="not those of a LoRA.*'much'"):
        pipe.load_lora_weights(path)
    with pytest.raises(OSError, match="nothing_here"):
        pipe.load_lora_weights(tmp_path / "nothing_here")
    with pytest.raises(TypeError, match=r"Unknown arguments for loading a LoRA: \['wheight_name'\]"):
        pipe.load_lora_weights(path, wheight_name="x")
    assert_untouched(pipe, names)


def test_settings_of_another_method(pipe, tmp_path):
    other = random_pipeline()
    get_peft_model(other.transformer, LoraConfig(target_modules=["to_q"])).save_pretrained(tmp_path)
    config = tmp_path / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "peft_type": "LOHA"}))
    with pytest.raises(ValueError, match="not those of a LoRA: `peft_type` is 'LOHA'"):
        pipe.load_lora_weights(tmp_path)
    config.write_text("{")
    with pytest.raises(OSError, match="adapter_config.json is no readable JSON"):
        pipe.load_lora_weights(tmp_path)


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_pickles(pipe, tmp_path):
    tensors = load_file(write_adapter(tmp_path / "safe"))
    (tmp_path / "pickle").mkdir()
    path = tmp_path / "pickle" / "pytorch_lora_weights.bin"
    torch.save(tensors, path)
    for source, options in ((path, {}), (path.parent, {}), (path.parent, {"weight_name": path.name})):
        with pytest.raises(ValueError, match="pytorch_lora_weights.bin is a pickle.*use_safetensors=False"):
            pipe.load_lora_weights(source, **options)
    pipe.load_lora_weights(path.parent, use_safetensors=False)
    pipe.unload_lora_weights()
    pipe.load_lora_weights(path, use_safetensors=False)

    pipe.unload_lora_weights()
    for save in (torch.save, lambda value, place: place.write_bytes(pickle.dumps(value))):
        save(Payload(tmp_path / "touched"), path)
        with pytest.raises(OSError, match="pytorch_lora_weights.bin"):
            pipe.load_lora_weights(path, use_safetensors=False)
    assert not (tmp_path / "touched").exists()


def test_names_of_adapters(pipe, tmp_path):
    path = write_adapter(tmp_path)
    pipe.load_lora_weights(path, adapter_name="style")
    image = draw(pipe)
    for call in (
        lambda: pipe.set_adapters("stile"),
        lambda: pipe.set_adapters(["style", "stile"]),
        lambda: pipe.delete_adapters(["style", "stile"]),
        lambda: pipe.fuse_lora(adapter_names=["stile"]),
        lambda: pipe.set_lora_device(["stile"], "cpu"),
    ):
        with pytest.raises(ValueError, match="stile.*style"):
            call()
    with pytest.raises(ValueError, match="There is an adapter 'style' already"):
        pipe.load_lora_weights(path, adapter_name="style")
    for name in ("", "a.b"):
        with pytest.raises(ValueError, match="must not be empty or have a dot"):
            pipe.load_lora_weights(path, adapter_name=name)
    with pytest.raises(ValueError, match="unet is not found"):
        pipe.fuse_lora(components=["unet"])
    assert torch.equal(draw(pipe), image)
    with pytest.raises(ValueError, match="nothing to save"):
        pipe.save_lora_weights(tmp_path)


def test_parts_that_a_pipeline_lacks(pipe, tmp_path, caplog):
    path = write_adapter(tmp_path, TARGETS)
    pipe.register_modules(residual_mlp=None, residual_scheduler=None)
    logging.enable_propagation()
    pipe.load_lora_weights(path, adapter_name="style")
    logging.disable_propagation()
    assert "This pipeline has no residual_mlp: that part of the LoRA is left out." in caplog.text
    assert pipe.get_list_adapters() == {"transformer": ["style"], "text_encoder": ["style"]}


def test_one_of_several_files(pipe, tmp_path):
    base = draw(pipe)
    path = write_adapter(tmp_path, size=0.0)
    shutil.copy(path, tmp_path / "other.safetensors")
    write_adapter(tmp_path)
    pipe.load_lora_weights(tmp_path, weight_name="other.safetensors")
    assert torch.equal(draw(pipe), base)
    pipe.unload_lora_weights()
    pipe.load_lora_weights(tmp_path)
    assert not torch.equal(draw(pipe), base)


def test_offloaded_models(pipe, tmp_path):
    path = write_adapter(tmp_path, TARGETS)
    pipe.load_lora_weights(path)
    adapted = draw(pipe)
    pipe.unload_lora_weights()
    for name in TARGETS:
        apply_group_offloading(getattr(pipe, name), torch.device("cpu"), offload_type="leaf_level")
    pipe.load_lora_weights(path)
    assert torch.equal(draw(pipe), adapted)
    pipe.delete_adapters("default_0")
    assert not torch.equal(draw(pipe), adapted)
