# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from diffusers_hart.random_pipeline import random_pipeline
from diffusers_hart.training.caption_encoder import CaptionEncoder


CAPTIONS = ["a", "two words", "a longer caption than the others", ""]


@pytest.fixture(scope="module")
def pipe():
    return random_pipeline()


def warnings_of_cuts(caplog):
    return [record.getMessage() for record in caplog.records if "cut" in record.getMessage()]


@pytest.mark.parametrize("system_prompt", [None, "Draw this:"])
def test_captions_are_embedded_as_prompts(system_prompt, pipe):
    pipe.register_to_config(system_prompt=system_prompt)
    text = CaptionEncoder(pipe, 40)(CAPTIONS)
    with torch.no_grad():
        embeds, mask, _, _ = pipe.encode_prompt(CAPTIONS, do_classifier_free_guidance=False, max_sequence_length=40)
    assert torch.equal(text["prompt_embeds"], embeds) and torch.equal(text["prompt_attention_mask"], mask)
    assert embeds.shape == (4, 40, 64) and not text["prompt_embeds"].requires_grad
    pipe.register_to_config(system_prompt=None)


def test_one_warning_of_captions_that_are_cut(pipe, caplog):
    encode = CaptionEncoder(pipe, 9)
    encode(["a", "two words"])  # the second fills its nine tokens
    assert warnings_of_cuts(caplog) == []
    for captions in (CAPTIONS, CAPTIONS[::-1], ["another one that is too long"]):
        encode(captions)
    (message,) = warnings_of_cuts(caplog)
    assert message.startswith("Captions of more than 9 tokens are cut; the first one seen has 32.")
