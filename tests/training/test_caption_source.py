# SPDX-License-Identifier: Apache-2.0
import datasets
import pytest
import torch

from diffusers_hart.training.caption_source import caption_preparer, captions_alone
from diffusers_hart.training.data import is_endless


class Drawn:
    def finish_batch(self, batch, device):
        raise AssertionError("pictures are not needed")


class Endless(Drawn):
    def __getitem__(self, index):
        return {"caption": f"caption {index}"}


class Sized(Endless):
    def __len__(self):
        return 3


class InOrder(Drawn):
    def __iter__(self):
        return iter([{"caption": "caption 0"}])


def test_sources_keep_their_kind_without_their_pictures():
    endless, sized, in_order = (captions_alone(kind()) for kind in (Endless, Sized, InOrder))
    assert not any(hasattr(source, "finish_batch") for source in (endless, sized, in_order))
    assert is_endless(endless) and endless[7] == {"caption": "caption 7"}
    assert len(sized) == 3 and sized[1] == {"caption": "caption 1"}
    assert not hasattr(in_order, "__getitem__") and list(in_order) == list(in_order) == [{"caption": "caption 0"}]
    pairs = [("a.png", "a")]
    assert captions_alone(pairs) is pairs


def test_columns_of_pictures_are_not_read():
    data = datasets.Dataset.from_dict({"image": ["a.png"], "text": ["a"], "label": [3]})
    assert captions_alone(data)[0] == {"text": "a"}


def test_captions_of_examples():
    prepare = caption_preparer("prompt")
    generator = torch.Generator()
    for example in ("a", ("a.png", "a"), {"prompt": "a"}, {"caption": "a"}, {"prompt": "a", "caption": "b"}):
        assert prepare(example, generator) == {"caption": "a"}
    chosen = [prepare(("a.png", ["a", "b"]), generator.manual_seed(seed))["caption"] for seed in range(200)]
    assert 70 < chosen.count("a") < 130 and set(chosen) == {"a", "b"}
    for example in (3, ("a.png",), {"label": 3}, {"prompt": None}):
        with pytest.raises(ValueError, match="must be a text, not"):
            prepare(example, generator)
