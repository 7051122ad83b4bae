# SPDX-License-Identifier: Apache-2.0
import random

import numpy as np
import pytest
import torch

from diffusers_hart.random_pipeline import random_pipeline


@pytest.fixture(scope="module")
def pipe():
    pipe = random_pipeline()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def weights(pipe):
    models = [component for component in pipe.components.values() if isinstance(component, torch.nn.Module)]
    return [value for model in models for value in model.state_dict().values()]


def draw(pipe, prompt, seed=0):
    return pipe(prompt, generator=torch.Generator().manual_seed(seed), output_type="np").images[0]


def test_the_seed_decides_the_weights(pipe):
    again, other = random_pipeline(seed=0), random_pipeline(seed=1)
    assert all(torch.equal(one, two) for one, two in zip(weights(pipe), weights(again), strict=True))
    assert not all(torch.equal(one, two) for one, two in zip(weights(pipe), weights(other), strict=True))


def test_the_global_random_states_are_left_alone():
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    random_pipeline(seed=3)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.array_equal(np.random.get_state()[1], states[1])
    assert random.getstate() == states[2]


def test_prompts_and_seeds_give_different_pictures_of_some_contrast(pipe):
    pictures = [draw(pipe, "a cat"), draw(pipe, "a car"), draw(pipe, ""), draw(pipe, "a cat", seed=1)]
    for i, picture in enumerate(pictures):
        assert picture.shape == (128, 128, 3)
        assert picture.std() > 0.1
        assert all(np.abs(picture - other).mean() > 0.05 for other in pictures[:i])


@pytest.mark.parametrize("text", ["a red circle", "\u4e94\u8292\u661f \u2b50", "tab\tand\nline", "caf\u00e9"])
def test_no_text_is_unknown_to_the_tokenizer(pipe, text):
    ids = pipe.tokenizer(text).input_ids
    assert len(ids) == len(text.encode())
    assert pipe.tokenizer.decode(ids) == text


def test_end_of_text_is_one_token_and_pads(pipe):
    tokenizer = pipe.tokenizer
    assert tokenizer("a<|endoftext|>").input_ids[-1] == tokenizer.eos_token_id == tokenizer.pad_token_id
    padded = tokenizer("a", padding="max_length", max_length=3)
    assert padded.input_ids[1:] == [tokenizer.pad_token_id] * 2
    assert padded.attention_mask == [1, 0, 0]
