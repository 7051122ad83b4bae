# SPDX-License-Identifier: Apache-2.0
import json
from types import SimpleNamespace

from diffusers_hart import HARTScheduler
from diffusers_hart.training.new_models import new_scheduler


def tokenizer(*scales):
    return SimpleNamespace(config=SimpleNamespace(scales=scales))


def test_the_tokenizers_own_scales_come_before_published_ones_of_its_size():
    scheduler = new_scheduler(tokenizer(1, 2, 3, 4, 6, 8, 11, 16))
    assert scheduler.scales(16) == (1, 2, 3, 4, 6, 8, 11, 16)
    assert scheduler.scales(32) == HARTScheduler().scales(32)


def test_scales_of_a_size_of_its_own_are_added():
    scheduler = new_scheduler(tokenizer(1, 2, 4, 8))
    assert [schedule[-1] for schedule in scheduler.config.schedules] == [8, 16, 32, 64]


def test_published_scales_stay_as_they_are():
    published = HARTScheduler()
    scheduler = new_scheduler(tokenizer(*published.scales(64)))
    assert [tuple(schedule) for schedule in scheduler.config.schedules] == [*map(tuple, published.config.schedules)]


def test_a_file_has_the_last_word(tmp_path):
    (tmp_path / "scheduler.json").write_text(json.dumps({"schedules": [[1, 2, 5]], "guidance_scale": 2.0}))
    scheduler = new_scheduler(tokenizer(1, 2, 3, 5), str(tmp_path / "scheduler.json"))
    assert scheduler.scales(5) == (1, 2, 5) and scheduler.config.guidance_scale == 2.0
