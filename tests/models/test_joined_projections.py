# SPDX-License-Identifier: Apache-2.0
import copy
import pickle

import pytest
import torch
from accelerate.utils import clean_state_dict_for_safetensors
from peft import LoraConfig

from diffusers_hart import HARTTransformer2DModel
from diffusers_hart.models.transformers.joined_projections import JoinedProjections


@pytest.fixture
def transformer(tiny):
    return copy.deepcopy(tiny.pipe.transformer)


def predict(model, tiny):
    condition = (tiny["in.prompt_embeds"], tiny["in.prompt_attention_mask"])
    with torch.no_grad():
        return model(tiny["tok.scale_inputs"], tiny.scales, *condition).logits


def joined(model):
    return [module for module in model.modules() if isinstance(module, JoinedProjections)]


def assert_kept_once(model):
    for module in joined(model):
        weight = getattr(module, module._joined_projection).weight
        storages = {getattr(module, name).weight.untyped_storage().data_ptr() for name in module._single_projections}
        assert storages == {weight.untyped_storage().data_ptr()}


def test_joined_projections_give_the_same_and_are_kept_once(transformer, tiny):
    expected, state = predict(transformer, tiny), copy.deepcopy(transformer.state_dict())
    random_state = torch.get_rng_state()
    transformer.fuse_qkv_projections()
    assert torch.equal(torch.get_rng_state(), random_state)
    names = {name.rpartition(".")[2] for name, _ in transformer.named_modules()}
    assert {"to_qkv", "gate_up_proj"} <= names
    torch.testing.assert_close(predict(transformer, tiny), expected)
    assert_kept_once(transformer)

    saved = transformer.state_dict()
    assert list(saved) == list(state)
    assert all(torch.equal(saved[name], state[name]) for name in state)


def test_a_joined_model_is_saved_as_the_several(transformer, tmp_path):
    plain = copy.deepcopy(transformer)
    transformer.fuse_qkv_projections()
    for module in joined(transformer):
        getattr(module, module._joined_projection).weight.data.mul_(2)
    transformer.save_pretrained(tmp_path)
    saved = joined(HARTTransformer2DModel.from_pretrained(tmp_path))
    for module, original in zip(saved, joined(plain), strict=True):
        for name in module._single_projections:
            assert torch.equal(getattr(module, name).weight, 2 * getattr(original, name).weight)
    for _ in range(2):  # joined and taken apart: accelerate leaves out what shares memory
        state = transformer.state_dict()
        assert clean_state_dict_for_safetensors(state).keys() == state.keys()
        transformer.unfuse_qkv_projections()


@pytest.mark.parametrize(
    "change",
    [
        copy.deepcopy,
        lambda model: pickle.loads(pickle.dumps(model)),
        lambda model: model.to(torch.float64).to(torch.float32),
    ],
)
def test_copied_and_cast_they_are_still_kept_once(transformer, tiny, change):
    expected = predict(transformer, tiny)
    transformer.fuse_qkv_projections()
    changed = change(transformer)
    assert_kept_once(changed)
    torch.testing.assert_close(predict(changed, tiny), expected)


def test_weights_are_loaded_into_joined_projections(transformer, tiny):
    state = {name: 0.5 * value for name, value in transformer.state_dict().items()}
    plain = copy.deepcopy(transformer)
    plain.load_state_dict(state)
    transformer.fuse_qkv_projections()
    transformer.load_state_dict(state)
    torch.testing.assert_close(predict(transformer, tiny), predict(plain, tiny))
    transformer.load_state_dict({name: value for name, value in state.items() if "to_q." in name}, strict=False)
    torch.testing.assert_close(predict(transformer, tiny), predict(plain, tiny))


def test_frozen_projections_stay_frozen(transformer):
    transformer.requires_grad_(False).fuse_qkv_projections()
    assert not any(parameter.requires_grad for parameter in transformer.parameters())


def test_joined_projections_take_no_adapters(transformer):
    transformer.fuse_qkv_projections()
    with pytest.raises(ValueError, match="projections of this transformer are fused"):
        transformer.add_adapter(LoraConfig(r=2, target_modules=["up_proj"]))


def test_taken_apart_they_are_as_before(transformer, tiny):
    expected, names = predict(transformer, tiny), [name for name, _ in transformer.named_parameters()]
    for _ in range(2):
        transformer.fuse_qkv_projections()
        transformer.fuse_qkv_projections()  # once more changes nothing
        transformer.unfuse_qkv_projections()
    assert [name for name, _ in transformer.named_parameters()] == names
    assert torch.equal(predict(transformer, tiny), expected)
    attn = transformer.transformer_blocks[0].attn
    assert attn.to_q.weight.untyped_storage().data_ptr() != attn.to_k.weight.untyped_storage().data_ptr()


def test_nothing_is_joined_if_there_is_an_adapter_on_one(transformer):
    transformer.add_adapter(LoraConfig(r=2, target_modules=["transformer_blocks.1.ff.up_proj"]))
    with pytest.raises(ValueError, match="Projections with LoRA adapters cannot be joined"):
        transformer.fuse_qkv_projections()
    assert not any(module.fused_projections for module in joined(transformer))
