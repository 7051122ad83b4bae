# SPDX-License-Identifier: Apache-2.0
import time

import pytest
import torch
from huggingface_hub import constants
from shapes_stand_in import ColorChecker
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPProcessor

from diffusers_hart.evaluation import Instruments, PictureMeasurements, load_instruments
from diffusers_hart.evaluation.downloaded_models import ClipScore, NotMeasured
from diffusers_hart.random_pipeline import random_pipeline


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """A tiny CLIP model of random weights, with a tokenizer of bytes."""
    folder = tmp_path_factory.mktemp("clip")
    tokenizer = random_pipeline().tokenizer
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    end = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = CLIPModel(
            CLIPConfig(
                text_config=sizes | {"vocab_size": len(tokenizer), "max_position_embeddings": 32} | end,
                vision_config=sizes | {"image_size": 32, "patch_size": 16},
                projection_dim=8,
            )
        )
    model.save_pretrained(folder)
    size = {"shortest_edge": 32}
    images = CLIPImageProcessorPil(size=size, crop_size={"height": 32, "width": 32})
    CLIPProcessor(image_processor=images, tokenizer=tokenizer).save_pretrained(folder)
    return folder


def test_clip_scores_of_each_picture(clip_folder):
    score = ClipScore(str(clip_folder), "cpu")
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    captions = ["a cat", "two"]
    found = score(images, captions)
    assert found.shape == (2,)
    assert (found >= 0).all()
    model, processor = CLIPModel.from_pretrained(clip_folder), CLIPProcessor.from_pretrained(clip_folder)
    for image, caption, value in zip((images * 127.5 + 127.5).round().byte(), captions, found):
        inputs = processor(text=[caption], images=[image], return_tensors="pt")
        with torch.no_grad():
            cosine = model(**inputs).logits_per_image.item() / model.logit_scale.exp().item()
        assert value.item() == pytest.approx(max(100 * cosine, 0), abs=1e-3)


def test_clip_scores_are_kept_where_there_are_captions(clip_folder):
    checker = ColorChecker()
    instruments = Instruments({"checker": checker.features}, checker, ClipScore(str(clip_folder), "cpu"))
    measured = PictureMeasurements(instruments)
    measured.add(torch.zeros(2, 3, 128, 128), captions=["a", "b"])
    measured.add(torch.zeros(1, 3, 128, 128), captions=["a"])
    assert measured.clip_scores.shape == (3,)
    assert measured.features["checker"].shape == (3, 48)
    without = PictureMeasurements(instruments)
    without.add(torch.zeros(2, 3, 128, 128))
    assert without.clip_scores is None


def test_without_a_network_the_reason_comes_at_once(monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    start = time.monotonic()
    with pytest.raises(NotMeasured, match="127.0.0.1:9/no/such-model/.* cannot be downloaded: .*refused"):
        ClipScore("no/such-model", "cpu")
    assert time.monotonic() - start < 10


def test_what_cannot_be_loaded_is_left_out_with_a_reason(tmp_path):
    instruments = load_instruments(ColorChecker(), "cpu", "no/such-model", downloads=False)
    assert list(instruments.feature_extractors) == ["checker"]
    assert instruments.clip_score is None
    assert (
        "torch-fidelity cannot be imported: No module named"
        in instruments.not_measured["FID and KID on Inception features"]
    )
    assert "downloads are not allowed" in instruments.not_measured["CLIP score"]
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(NotMeasured, match="could not be loaded"):
        ClipScore(str(tmp_path), "cpu")
