# SPDX-License-Identifier: Apache-2.0
import pytest
from huggingface_hub import ModelCard

from diffusers_hart import HARTPipeline
from diffusers_hart.conversion import load_hart_checkpoint, write_model_card


@pytest.fixture(scope="module")
def components(golden):
    return load_hart_checkpoint(golden / "t2i_tiny" / "original")


def card_of(components, folder, system_prompt=None, **options) -> ModelCard:
    pipe = HARTPipeline(tokenizer=None, text_encoder=None, system_prompt=system_prompt, **components)
    return ModelCard.load(write_model_card(folder, pipe, {"transformer": "a file"}, **options))


def test_header(components, tmp_path):
    data = card_of(components, tmp_path, license="apache-2.0", base_model="someone/hart").data
    assert data.library_name == "diffusers"
    assert data.pipeline_tag == "text-to-image"
    assert {"hart", "diffusers"} <= set(data.tags)
    assert (data.license, data.base_model) == ("apache-2.0", "someone/hart")


def test_a_licence_is_never_guessed(components, tmp_path):
    card = card_of(components, tmp_path)
    assert "license" not in card.data.to_dict() and "base_model" not in card.data.to_dict()
    assert "No licence was stated" in card.text
    assert "No licence was stated" not in card_of(components, tmp_path, license="mit").text


def test_what_the_card_tells(components, tmp_path):
    card = card_of(components, tmp_path, repo_id="me/hart")
    assert 'HARTPipeline.from_pretrained("me/hart"' in card.text
    assert "| `transformer` | a file | float32 |" in card.text
    assert "squares of 12 pixels" in card.text
    assert "longer than 12 tokens" in card.text
    assert "No system prompt is configured" in card.text
    assert "Values were not changed" in card.text
    card = card_of(components, tmp_path, system_prompt="Draw:", changed_dtype=True)
    assert "A system prompt is configured" in card.text and "Draw:" not in card.text
    assert "Values were rounded" in card.text
