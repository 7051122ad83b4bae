# SPDX-License-Identifier: Apache-2.0
import io
import json
import tarfile

import datasets
import numpy as np
import PIL.Image
import pytest
import torch

from diffusers_hart.training.data import ExampleStream
from diffusers_hart.training.data_sources import image_preparer, load_image_source


CAPTIONS = ["a red square", "a blue, bright circle", 'a "green" line']


def picture(seed):
    return PIL.Image.fromarray(np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8))


def png(image):
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def first_epoch(source, **options):
    """Captions and pixels of the first epoch, by caption."""
    stream = iter(ExampleStream(source, image_preparer(16, **options), batch_size=1))
    examples = [next(stream) for _ in CAPTIONS]
    return {example["caption"]: example["pixel_values"] for example in examples}


@pytest.fixture
def check(tmp_path):
    """That a source has the three pictures with their captions."""

    def check_source(image_column="image", caption_column="text", **place):
        columns = {"image_column": image_column, "caption_column": caption_column}
        source = load_image_source(cache_dir=str(tmp_path / "cache"), **columns, **place)
        pixels = first_epoch(source, **columns)
        assert set(pixels) == set(CAPTIONS)
        for seed, caption in enumerate(CAPTIONS):
            expected = torch.from_numpy(np.array(picture(seed))).permute(2, 0, 1) / 127.5 - 1
            assert torch.equal(pixels[caption], expected)
        return source

    return check_source


@pytest.fixture
def folder(tmp_path):
    """A folder of pictures with a table of captions."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for seed in range(3):
        picture(seed).save(folder / f"{seed}.png")
    lines = [json.dumps({"file_name": f"{seed}.png", "text": caption}) for seed, caption in enumerate(CAPTIONS)]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def test_a_folder_with_json_lines(folder, check):
    check(train_data_dir=str(folder))


def test_a_folder_with_comma_separated_values(folder, check):
    (folder / "metadata.jsonl").unlink()
    rows = [f'{seed}.png,"{caption.replace(chr(34), chr(34) * 2)}"' for seed, caption in enumerate(CAPTIONS)]
    (folder / "metadata.csv").write_text("\n".join(["file_name,prompt", *rows]))
    check(train_data_dir=str(folder), caption_column="prompt")


def test_a_saved_data_set(tmp_path, check):
    data = datasets.Dataset.from_dict(
        {"picture": [picture(seed) for seed in range(3)], "text": CAPTIONS},
        features=datasets.Features({"picture": datasets.Image(), "text": datasets.Value("string")}),
    )
    data.save_to_disk(str(tmp_path / "saved"))
    check(dataset_name=str(tmp_path / "saved"), image_column="picture")


def test_shards(tmp_path, check):
    for shard, seeds in enumerate([(0, 1), (2,)]):
        with tarfile.open(tmp_path / f"shard-{shard}.tar", "w") as archive:
            for seed in seeds:
                for suffix, content in (("png", png(picture(seed))), ("txt", CAPTIONS[seed].encode())):
                    entry = tarfile.TarInfo(f"{seed}.{suffix}")
                    entry.size = len(content)
                    archive.addfile(entry, io.BytesIO(content))
    source = check(train_shards=str(tmp_path / "shard-*.tar"), image_column="png", caption_column="txt")
    stream = iter(ExampleStream(source, image_preparer(16, "png", "txt"), batch_size=2))
    assert [next(stream)["caption"] for _ in range(5)] == [*CAPTIONS, *CAPTIONS[:2]]


MODULE = """
import io
import numpy as np
import PIL.Image

CAPTIONS = ["a red square", "a blue, bright circle", 'a "green" line']

def picture(seed):
    return PIL.Image.fromarray(np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8))

def generator():
    for seed, caption in enumerate(CAPTIONS):
        yield picture(seed), caption

def listed():
    return list(generator())

constant = listed()

def dicts():
    for seed, caption in enumerate(CAPTIONS):
        yield {"image": picture(seed), "text": caption}

def nothing():
    return None

class Endless:
    made = 0

    def __init__(self):
        Endless.made += 1

    def __getitem__(self, index):
        return picture(index % 3), CAPTIONS[index % 3]
"""


@pytest.mark.parametrize("name", ["generator", "listed", "constant", "dicts", "Endless"])
def test_python_iterables(name, tmp_path, check):
    (tmp_path / "pairs_of_a_test.py").write_text(MODULE)
    source = check(train_iterable=f"{tmp_path}/pairs_of_a_test.py:{name}")
    stream = iter(ExampleStream(source, image_preparer(16), batch_size=3))
    assert len([next(stream) for _ in range(9)]) == 9  # a generator starts anew each epoch


def test_a_class_is_made_once(tmp_path):
    (tmp_path / "class_of_a_test.py").write_text(MODULE)
    assert load_image_source(train_iterable=f"{tmp_path}/class_of_a_test.py:Endless").made == 1


def test_an_installed_module(tmp_path, check, monkeypatch):
    (tmp_path / "installed_pairs_of_a_test.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    check(train_iterable="installed_pairs_of_a_test:generator")


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("pairs", "must be 'path/to/file.py:name' or 'module:name'"),
        ("{folder}/missing.py:pairs", "missing.py, which does not exist"),
        ("{folder}/module_of_a_test.py:missing", "has no 'missing'"),
        ("{folder}/module_of_a_test.py:nothing", "gives a NoneType, which cannot be iterated"),
    ],
)
def test_python_iterables_that_are_none(reference, message, tmp_path):
    (tmp_path / "module_of_a_test.py").write_text(MODULE)
    with pytest.raises(ValueError, match=message):
        load_image_source(train_iterable=reference.format(folder=tmp_path))


def test_exactly_one_place(folder):
    with pytest.raises(ValueError, match="Name one source"):
        load_image_source()
    with pytest.raises(ValueError, match="Name one source"):
        load_image_source(train_data_dir=str(folder), train_shards="*.tar")


def test_captions_without_a_picture(folder, tmp_path):
    (folder / "1.png").unlink()
    with pytest.raises(ValueError, match=r"do not match its pictures: 1 captions without a picture \(1.png\)"):
        load_image_source(train_data_dir=str(folder), cache_dir=str(tmp_path / "cache"))


def test_pictures_without_a_caption(folder, tmp_path):
    for seed in range(3, 10):
        picture(seed).save(folder / f"{seed}.png")
    with pytest.raises(
        ValueError, match=r"7 pictures without a caption \(3.png, 4.png, 5.png, 6.png, 7.png, \.\.\.\)"
    ):
        load_image_source(train_data_dir=str(folder), cache_dir=str(tmp_path / "cache"))


def test_a_table_without_file_names(folder, tmp_path):
    (folder / "metadata.jsonl").write_text('{"file": "0.png", "text": "a"}')
    with pytest.raises(ValueError, match="metadata.jsonl has no column 'file_name'"):
        load_image_source(train_data_dir=str(folder), cache_dir=str(tmp_path / "cache"))


def test_a_missing_column(folder, tmp_path):
    with pytest.raises(ValueError, match=r"no column 'caption'; it has \['image', 'text'\]"):
        load_image_source(train_data_dir=str(folder), caption_column="caption", cache_dir=str(tmp_path / "cache"))


def test_pictures_alone(folder, tmp_path):
    source = load_image_source(train_data_dir=str(folder), caption_column=None, cache_dir=str(tmp_path / "cache"))
    stream = iter(ExampleStream(source, image_preparer(16, caption_column=None), batch_size=1))
    assert set(next(stream)) == {"pixel_values", "position", "skipped"}


def test_one_of_several_captions_is_chosen():
    prepare = image_preparer(16)
    chosen = [prepare((picture(0), ["a", "b"]), torch.Generator().manual_seed(seed))["caption"] for seed in range(200)]
    assert 70 < chosen.count("a") < 130 and set(chosen) == {"a", "b"}


@pytest.mark.parametrize("caption", [None, 3, []])
def test_captions_that_are_no_text(caption, folder):
    image = {"path": str(folder / "0.png"), "bytes": None}
    with pytest.raises(ValueError, match=r"The caption of .*0.png must be a text, not"):
        image_preparer(16)({"image": image, "text": caption}, torch.Generator())


def test_labels(folder):
    prepare = image_preparer(16, caption_column="label", num_classes=3)
    for label in (2, np.int64(2), torch.tensor(2)):
        example = prepare((picture(0), label), torch.Generator())
        assert example["label"] == 2 and type(example["label"]) is int
    image = {"path": str(folder / "0.png"), "bytes": None}
    for label in (3, -1, "cat", 1.5, None, True):
        with pytest.raises(ValueError, match=r"The label of .*0.png must be an integer in \[0, 3\), not"):
            prepare({"image": image, "label": label}, torch.Generator())


class Drawn:
    def finish_batch(self, batch, device):
        return batch


def test_examples_whose_pictures_are_made_later():
    scene = torch.zeros(3)
    generator = torch.Generator()
    prepare = image_preparer(16, source=Drawn())
    assert prepare({"scene": scene, "caption": "a"}, generator) == {"scene": scene, "caption": "a"}
    chosen = [prepare({"caption": ["a", "b"]}, generator.manual_seed(seed))["caption"] for seed in range(200)]
    assert 70 < chosen.count("a") < 130 and set(chosen) == {"a", "b"}
    labelled = image_preparer(16, caption_column="kind", num_classes=3, source=Drawn())
    assert labelled({"scene": scene, "label": np.int64(2)}, generator) == {"scene": scene, "label": 2}
    alone = image_preparer(16, caption_column=None, source=Drawn())
    assert alone({"scene": scene}, generator) == {"scene": scene}

    for bad, example, message in (
        (prepare, {"scene": scene}, "The caption of a picture without a name must be a text, not None"),
        (labelled, {"label": 3}, r"must be an integer in \[0, 3\), not 3"),
        (prepare, (scene, "a"), "The examples of a source with `finish_batch` must be dicts, not tuple"),
    ):
        with pytest.raises(ValueError, match=message):
            bad(example, generator)
    for option in ("random_crop", "random_flip"):
        with pytest.raises(ValueError, match="Drawn makes its pictures itself: leave out"):
            image_preparer(16, source=Drawn(), **{option: True})
