# SPDX-License-Identifier: Apache-2.0
import copy

import pytest
import torch
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from diffusers_hart.training.byte_pair_tokenizer import train_byte_pair_tokenizer
from diffusers_hart.training.new_models import new_text_encoder, read_text_encoder_config
from diffusers_hart.training.text_encoder_training import TextEncoderTrainingModule, language_model_inputs


CAPTIONS = ["a red circle", "a blue square above a red circle", "two green circles", ""]


@pytest.fixture(scope="module")
def tokenizer():
    return train_byte_pair_tokenizer(CAPTIONS * 3, 280)


@pytest.fixture(scope="module")
def text_encoder(tokenizer):
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    return new_text_encoder(config, seed=0)


@pytest.mark.parametrize("text", [*CAPTIONS, " leading", "Straße 北京 🚲", "line\nbreak\x00"])
def test_no_text_is_unknown(text, tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    ids = again(text).input_ids
    assert again.decode(ids, clean_up_tokenization_spaces=False) == text
    assert again.eos_token_id == again.pad_token_id and again.eos_token_id not in ids
    assert again([text, "x" * 50], padding=True).input_ids[0] == ids + [again.pad_token_id] * (50 - len(ids))


def test_pairs_are_learnt(tokenizer):
    assert len(tokenizer) == 280
    assert len(tokenizer("a red circle").input_ids) <= 4 < len(tokenizer("A RED CIRCLE").input_ids)
    again = train_byte_pair_tokenizer(iter(CAPTIONS * 3), 280)
    assert again.get_vocab() == tokenizer.get_vocab()
    assert len(train_byte_pair_tokenizer(["a"], 280)) == 257  # no more pairs
    with pytest.raises(ValueError, match="A vocabulary of 256 is too small: .* take 257"):
        train_byte_pair_tokenizer(CAPTIONS, 256)


def test_what_is_predicted(tokenizer):
    first, second = tokenizer(CAPTIONS[:2]).input_ids
    end = tokenizer.eos_token_id
    inputs = language_model_inputs(tokenizer, CAPTIONS[:2], 40)
    assert inputs["input_ids"].shape == inputs["targets"].shape == inputs["mask"].shape == (2, len(second))
    assert inputs["input_ids"][1].tolist() == second and inputs["targets"][1].tolist() == [*second[1:], end]
    assert inputs["targets"][0][inputs["mask"][0]].tolist() == [*first[1:], end]
    cut = language_model_inputs(tokenizer, CAPTIONS[:2], 3)
    assert cut["input_ids"][1].tolist() == second[:3] and cut["targets"][1].tolist() == second[1:4]
    assert cut["mask"].tolist()[1] == [True] * 3


def test_captions_without_text(tokenizer, text_encoder):
    inputs = language_model_inputs(tokenizer, ["", ""], 40)
    assert inputs["input_ids"].shape == (2, 1) and not inputs["mask"].any()
    for weight in (0.0, 1.0):
        assert TextEncoderTrainingModule(text_encoder, weight, weight)(**inputs)["loss"] == 0


@torch.no_grad()
def test_the_loss_is_that_of_a_causal_language_model(tokenizer, text_encoder, tmp_path):
    text_encoder.save_pretrained(tmp_path)
    model = Qwen2ForCausalLM.from_pretrained(tmp_path)
    module = TextEncoderTrainingModule(text_encoder, recall_weight=0.0, history_weight=0.0)
    assert {name for name, _ in module.named_children()} == {"text_encoder"}
    losses = []
    for caption in CAPTIONS[:3]:
        ids = torch.tensor([[*tokenizer(caption).input_ids, tokenizer.eos_token_id]])
        losses.append(model(input_ids=ids, labels=ids).loss)
        loss = module(**language_model_inputs(tokenizer, [caption], 40))["loss"]
        torch.testing.assert_close(loss, losses[-1])
    together = module(**language_model_inputs(tokenizer, CAPTIONS[:3], 40))["loss"]
    torch.testing.assert_close(together, torch.stack(losses).mean())


def learn(module, inputs, steps):
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        module(**inputs)["loss"].backward()
        optimizer.step()


def test_hidden_states_recall_their_tokens(tokenizer, text_encoder):
    inputs = language_model_inputs(tokenizer, CAPTIONS[:3], 40)
    module = TextEncoderTrainingModule(copy.deepcopy(text_encoder), recall_weight=2.0, history_weight=0.0)
    losses = module(**inputs)
    torch.testing.assert_close(losses["recall_loss"], torch.tensor(float(len(tokenizer))).log())  # it begins at zero
    torch.testing.assert_close(losses["loss"], losses["next_token_loss"] + 2 * losses["recall_loss"])
    learn(module, inputs, 60)
    hidden_states = module.text_encoder(input_ids=inputs["input_ids"]).last_hidden_state
    recalled = module.recall(hidden_states).argmax(-1)
    assert torch.equal(recalled[inputs["mask"]], inputs["input_ids"][inputs["mask"]])


def test_hidden_states_tell_what_came_before(tokenizer, text_encoder):
    inputs = language_model_inputs(tokenizer, CAPTIONS[:3], 40)
    module = TextEncoderTrainingModule(copy.deepcopy(text_encoder), recall_weight=0.0, history_weight=0.5)
    losses = module(**inputs)
    torch.testing.assert_close(losses["history_loss"], len(tokenizer) * torch.tensor(2.0).log())  # it begins at zero
    torch.testing.assert_close(losses["loss"], losses["next_token_loss"] + 0.5 * losses["history_loss"])
    learn(module, inputs, 200)
    told = module.history(module.text_encoder(input_ids=inputs["input_ids"]).last_hidden_state) > 0
    for ids, length, found in zip(inputs["input_ids"].tolist(), inputs["mask"].sum(1), told):
        for place in range(length):
            assert set(found[place].nonzero().flatten().tolist()) == set(ids[:place])


def test_weights_are_a_function_of_the_seed(text_encoder):
    state = torch.get_rng_state()
    same, other = (new_text_encoder(text_encoder.config, seed) for seed in (0, 1))
    assert torch.equal(state, torch.get_rng_state())
    name = "embed_tokens.weight"
    assert torch.equal(same.state_dict()[name], text_encoder.state_dict()[name])
    assert not torch.equal(other.state_dict()[name], text_encoder.state_dict()[name])


def test_a_configuration_that_is_none(tmp_path):
    (tmp_path / "config.json").write_text('{"hidden_size": 64, "depth": 3}')
    with pytest.raises(ValueError, match=r"Qwen2Config has no \['depth'\]; it has"):
        read_text_encoder_config(tmp_path / "config.json")
