# SPDX-License-Identifier: Apache-2.0
import json

import pytest
import torch
from safetensors.torch import load_file

from diffusers_hart import HARTKVCache, HARTTransformer2DModel
from diffusers_hart.conversion.key_tables import check_original, to_original, to_ours, transformer_table


def teacher_forced(model, **kwargs):
    return model.pipe.transformer(
        model["tok.scale_inputs"], model.scales, model["in.prompt_embeds"], model["in.prompt_attention_mask"], **kwargs
    )


@torch.no_grad()
def test_teacher_forced(model, assert_close):
    transformer, vae = model.pipe.transformer, model.pipe.vae
    output = teacher_forced(model)
    assert_close(output.logits, model["tf.logits"])

    last_scale = model.scales[-1] ** 2
    code_embeds = vae.embed(output.logits[:, -last_scale:].argmax(-1))
    condition = transformer.residual_condition(output.hidden_states[:, -last_scale:], code_embeds)
    assert_close(condition, model["tf.residual_condition"])
    assert_close(model["tok.last_scale_target"] - code_embeds, model["tf.residual_target"])


@torch.no_grad()
def test_first_scales_alone(model):
    """What is given of the scales' inputs is predicted as with all of them: no scale sees one behind it."""
    whole = teacher_forced(model).logits
    for count in range(2, len(model.scales)):
        num_tokens = sum(side * side for side in model.scales[:count])
        inputs = model["tok.scale_inputs"][:, : num_tokens - 1]
        text = model["in.prompt_embeds"], model["in.prompt_attention_mask"]
        first = model.pipe.transformer(inputs, model.scales, *text).logits
        torch.testing.assert_close(first, whole[:, :num_tokens], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_token_drop(model, assert_close):
    transformer, vae = model.pipe.transformer, model.pipe.vae
    dropped = model["drop.dropped_indices"]
    tokens = torch.arange(model.scales[-1] ** 2).expand(len(dropped), -1)
    kept = tokens[torch.ones_like(tokens, dtype=torch.bool).scatter(1, dropped, False)].view(len(dropped), -1)
    output = teacher_forced(model, kept_tokens=kept)
    assert_close(output.logits, model["drop.logits"])

    code_embeds = vae.embed(output.logits[:, -kept.shape[1] :].argmax(-1))
    condition = transformer.residual_condition(output.hidden_states[:, -kept.shape[1] :], code_embeds)
    assert_close(condition, model["drop.residual_condition"])
    targets = model["tok.last_scale_target"].gather(1, kept[..., None].expand(-1, -1, code_embeds.shape[-1]))
    assert_close(targets - code_embeds, model["drop.residual_target"])


@torch.no_grad()
def test_generation_with_a_cache_equals_teacher_forcing(model, assert_close):
    kv_cache = HARTKVCache()
    inputs = [None, *model["tok.scale_inputs"].split([side * side for side in model.scales[1:]], dim=1)]
    logits = [
        model.pipe.transformer(
            scale_input,
            model.scales,
            model["in.prompt_embeds"],
            model["in.prompt_attention_mask"],
            scale_index=k,
            kv_cache=kv_cache,
        ).logits
        for k, scale_input in enumerate(inputs)
    ]
    assert_close(torch.cat(logits, dim=1), model["tf.logits"])
    kept = model["in.prompt_embeds"].shape[1] + sum(side * side for side in model.scales[1:-1])
    num_layers = len(model.pipe.transformer.transformer_blocks)
    for buffer in (kv_cache.key, kv_cache.value):  # room for one last scale, not for one a block
        assert buffer.shape[1] == kv_cache.first_start + num_layers * kept + model.scales[-1] ** 2


@torch.no_grad()
def test_attention_is_causal_by_scale(tiny):
    """A change of one input changes the scales from its own on, all tokens of its own scale included, and no other."""
    before = teacher_forced(tiny).logits
    scale_inputs = tiny["tok.scale_inputs"].clone()
    start = sum(side * side for side in tiny.scales[1:3])
    scale_inputs[:, start] += 1  # the first token of scale 3
    after = tiny.pipe.transformer(
        scale_inputs, tiny.scales, tiny["in.prompt_embeds"], tiny["in.prompt_attention_mask"]
    ).logits
    changed = (before != after).any(-1).all(0)
    assert not changed[: start + 1].any()
    assert changed[start + 1 :].all()


@torch.no_grad()
def test_class_conditional(golden, assert_close):
    tensors = load_file(golden / "c2i_tiny" / "golden.safetensors")
    config = json.loads((golden / "c2i_tiny" / "config.json").read_text())
    transformer = HARTTransformer2DModel(
        in_channels=config["latent_channels"],
        codebook_size=config["codebook_size"],
        num_layers=config["depth"],
        num_attention_heads=config["heads"],
        attention_head_dim=config["width"] // config["heads"],
        caption_channels=None,
        num_classes=config["num_classes"],
        qk_norm=config["qk_l2_norm"],
        sample_size=config["schedule"][-1],
    ).eval()
    weights = {
        name.removeprefix("weights."): tensor for name, tensor in tensors.items() if name.startswith("weights.")
    }
    table = transformer_table(transformer)
    shapes = {name: tensor.shape for name, tensor in transformer.state_dict().items()}
    check_original(weights, table, shapes, "c2i_tiny")
    ours = to_ours(weights, table, shapes)
    transformer.load_state_dict(ours)
    back = to_original(ours, table)
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[name], weights[name]) for name in weights)

    scales = tuple(config["schedule"])
    output = transformer(tensors["scale_inputs"], scales, class_labels=tensors["labels"])
    assert_close(output.logits, tensors["logits"])
    code_embeds = tensors["codebook"][tensors["last_scale_codes"]]
    condition = transformer.residual_condition(output.hidden_states[:, -code_embeds.shape[1] :], code_embeds)
    assert_close(condition, tensors["residual_condition"])

    kv_cache = HARTKVCache()
    inputs = [None, *tensors["scale_inputs"].split([side * side for side in scales[1:]], dim=1)]
    logits = [
        transformer(x, scales, class_labels=tensors["labels"], scale_index=k, kv_cache=kv_cache).logits
        for k, x in enumerate(inputs)
    ]
    assert_close(torch.cat(logits, dim=1), tensors["logits"])


def test_a_cache_of_other_scales_is_refused(tiny):
    scale_input = torch.zeros(2, 9, 8)
    with pytest.raises(ValueError, match="Scale 2 needs a `kv_cache` of the scales before; this one holds 0"):
        tiny.pipe.transformer(scale_input, tiny.scales, scale_index=2, kv_cache=HARTKVCache())


@pytest.mark.parametrize(
    "tokens, scale_index, message",
    [
        (
            5,
            None,
            r"scales 1 to K - 1 or the first of them of \(1, 2, 3, 4, 6\), 0 or 4 or 13 or 29 or 65 a sample.*5, 8",
        ),
        (None, None, "is None"),
        (8, 2, r"tokens of scale 2 of \(1, 2, 3, 4, 6\), 9 a sample, and is of shape \(2, 8, 8\)"),
    ],
)
def test_tokens_that_are_not_whole_scales_are_refused(tiny, tokens, scale_index, message):
    assert tiny.scales == (1, 2, 3, 4, 6)
    scale_inputs = None if tokens is None else torch.zeros(2, tokens, 8)
    condition = (tiny["in.prompt_embeds"], tiny["in.prompt_attention_mask"])
    with pytest.raises(ValueError, match=message):
        tiny.pipe.transformer(scale_inputs, tiny.scales, *condition, scale_index=scale_index)


@pytest.mark.parametrize("kwargs", [{}, {"caption_channels": None}, {"num_classes": 10}])
def test_a_model_has_exactly_one_kind_of_condition(kwargs):
    tiny_sizes = {"num_layers": 1, "num_attention_heads": 1, "attention_head_dim": 8}
    if not kwargs:
        HARTTransformer2DModel(**tiny_sizes)
        return
    with pytest.raises(ValueError, match="`caption_channels` or `num_classes`"):
        HARTTransformer2DModel(**tiny_sizes, **kwargs)


def test_gradient_checkpointing_gives_the_same_gradients(tiny):
    gradients = []
    for checkpointing in (False, True):
        transformer = HARTTransformer2DModel.from_config(tiny.pipe.transformer.config)
        transformer.load_state_dict(tiny.pipe.transformer.state_dict())
        if checkpointing:
            transformer.enable_gradient_checkpointing()
        transformer.train()
        runs = []
        transformer.transformer_blocks[0].ff.register_forward_pre_hook(lambda *args, runs=runs: runs.append(1))
        output = transformer(
            tiny["tok.scale_inputs"], tiny.scales, tiny["in.prompt_embeds"], tiny["in.prompt_attention_mask"]
        )
        output.logits.logsumexp(-1).mean().backward()
        assert len(runs) == (2 if checkpointing else 1)  # once more in the backward pass
        without = {name for name, parameter in transformer.named_parameters() if parameter.grad is None}
        assert without == {"residual_norm.weight"}  # which only the residual condition goes through
        gradients.append({n: p.grad for n, p in transformer.named_parameters() if p.grad is not None})
    assert all(torch.allclose(gradients[0][name], gradients[1][name], atol=1e-7) for name in gradients[0])


@torch.no_grad()
def test_logits_are_float32_in_a_half_precision_model(tiny):
    transformer = HARTTransformer2DModel.from_config(tiny.pipe.transformer.config).eval()
    transformer.load_state_dict(tiny.pipe.transformer.state_dict())
    transformer.to(torch.bfloat16)
    output = transformer(
        tiny["tok.scale_inputs"].bfloat16(),
        tiny.scales,
        tiny["in.prompt_embeds"].bfloat16(),
        tiny["in.prompt_attention_mask"],
    )
    assert output.logits.dtype == torch.float32
    assert output.hidden_states.dtype == torch.bfloat16
    assert (output.logits - tiny["tf.logits"]).abs().max() < 0.15 * tiny["tf.logits"].abs().max()


def test_published_size():
    with torch.device("meta"):
        transformer = HARTTransformer2DModel()
    assert 695e6 < sum(parameter.numel() for parameter in transformer.parameters()) < 697e6


@torch.no_grad()
def test_guided_logits_are_those_of_the_halves_guided(tiny, assert_close):
    arguments = (tiny["tok.scale_inputs"], tiny.scales, tiny["in.prompt_embeds"], tiny["in.prompt_attention_mask"])
    conditional, unconditional = tiny.pipe.transformer(*arguments).logits.chunk(2)
    for guidance in (0.0, 3.0, torch.tensor(3.0)):
        guided = tiny.pipe.transformer(*arguments, guidance=guidance).logits
        assert_close(guided, (1 + guidance) * conditional - guidance * unconditional, atol=1e-4)


@torch.no_grad()
def test_pruned_tokens_take_the_output_of_the_scale_before(tiny):
    transformer, scales = tiny.pipe.transformer, tiny.scales
    kv_cache = HARTKVCache()
    inputs = [None, *tiny["tok.scale_inputs"].split([side * side for side in scales[1:]], dim=1)]
    condition = (tiny["in.prompt_embeds"], tiny["in.prompt_attention_mask"])
    for k in range(4):
        before = transformer(inputs[k], scales, *condition, scale_index=k, kv_cache=kv_cache).hidden_states
    kept = torch.tensor([[7, 0, 35]]).expand(len(before), -1)  # of 6 x 6, the scale before being 4 x 4
    output = transformer(inputs[4], scales, scale_index=4, kv_cache=kv_cache, kept_tokens=kept)
    assert output.logits.shape[1] == 36
    nearest = before.unflatten(1, (4, 4))
    for row, column, coarse in ((0, 1, (0, 1)), (2, 3, (1, 2)), (5, 0, (3, 0))):
        assert torch.equal(output.hidden_states[:, 6 * row + column], nearest[:, coarse[0], coarse[1]])
    assert not torch.equal(output.hidden_states[:, 7], nearest[:, 0, 0])
