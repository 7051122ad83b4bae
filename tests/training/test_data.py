# SPDX-License-Identifier: Apache-2.0
import io

import numpy as np
import PIL.Image
import pytest
import torch

from diffusers_hart.training.data import (
    ExampleStream,
    UnreadableImage,
    collate,
    finish_batch,
    image_to_tensor,
    is_endless,
    read_image,
)


def picture(width=40, height=30, seed=0, mode="RGB"):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return PIL.Image.fromarray(pixels).convert(mode)


def png(image):
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def number(example, generator):
    """An example of a data set of numbers; negative ones stand for bad pictures."""
    if example < 0:
        raise UnreadableImage(f"picture {example} is not readable")
    return {"number": torch.tensor(example), "augmentation": torch.rand((), generator=generator)}


def numbers(count, **options):
    """The first numbers of a stream."""
    stream = iter(ExampleStream(prepare=number, **options))
    return [next(stream)["number"].item() for _ in range(count)]


class Restartable:
    """A source in order, without a length."""

    def __init__(self, values):
        self.values = values

    def __iter__(self):
        return iter(self.values)


class Endless:
    """A source of the numbers themselves, the multiples of 7 replaced by bad ones."""

    def __init__(self, bad=False):
        self.bad = bad
        self.asked = []

    def __getitem__(self, index):
        self.asked.append(index)
        return -1 if self.bad and index % 7 == 0 else index


def test_pictures_are_read_from_what_data_sets_hold(tmp_path):
    expected = picture()
    path = tmp_path / "a.png"
    path.write_bytes(png(expected))
    forms = [
        expected,
        path,
        str(path),
        path.read_bytes(),
        {"path": str(path), "bytes": None},
        {"path": None, "bytes": path.read_bytes()},
        {"path": "elsewhere.png", "bytes": path.read_bytes()},
    ]
    for form in forms:
        assert np.array_equal(np.asarray(read_image(form)), np.asarray(expected))


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "I;16", "1"])
def test_pictures_become_rgb(mode):
    image = PIL.Image.new(mode, (5, 4))
    assert read_image(image).mode == "RGB" and read_image(image).size == (5, 4)


def test_pictures_are_turned_upright():
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # the camera was turned by 90 degrees
    file = io.BytesIO()
    picture(40, 30).save(file, "JPEG", exif=exif)
    assert read_image(file.getvalue()).size == (30, 40)


@pytest.mark.parametrize("content", ["truncated", "no picture", "empty"])
@pytest.mark.parametrize("form", ["path", "dict"])
def test_bad_pictures_are_named(content, form, tmp_path):
    path = tmp_path / "bad.png"
    whole = png(picture())
    path.write_bytes({"truncated": whole[: len(whole) // 2], "no picture": b"hello", "empty": b""}[content])
    image = path if form == "path" else {"path": str(path), "bytes": path.read_bytes() or None}
    with pytest.raises(UnreadableImage, match="bad.png is not a readable picture"):
        read_image(image)


def test_missing_pictures_are_named():
    with pytest.raises(UnreadableImage, match="nowhere.png"):
        read_image("nowhere.png")
    with pytest.raises(UnreadableImage, match="a picture without a name"):
        read_image(b"hello")


def test_a_picture_of_the_right_size_is_only_rescaled_in_value():
    image = PIL.Image.fromarray(np.array([[[0, 127, 255]] * 4] * 4, dtype=np.uint8))
    tensor = image_to_tensor(image, 4, generator())
    assert tensor.shape == (3, 4, 4) and tensor.dtype == torch.float32
    assert torch.allclose(tensor[:, 0, 0], torch.tensor([-1.0, 127 / 127.5 - 1, 1.0]))


@pytest.mark.parametrize("size", [(40, 20), (20, 40), (7, 50), (3, 3)])
def test_the_middle_of_other_pictures_is_taken(size):
    columns = np.linspace(0, 255, size[0])[None, :, None]
    rows = np.linspace(0, 255, size[1])[:, None, None]
    ramp = np.concatenate(np.broadcast_arrays(columns, rows, 0 * rows * columns), axis=-1).astype(np.uint8)
    tensor = image_to_tensor(PIL.Image.fromarray(ramp), 16, generator())
    assert tensor.shape == (3, 16, 16)
    assert tensor[0].mean().abs() < 0.05 and tensor[1].mean().abs() < 0.05


def test_random_crops_and_flips():
    ramp = np.linspace(0, 255, 64)[None, :, None].repeat(16, axis=0).repeat(3, axis=2).astype(np.uint8)
    image = PIL.Image.fromarray(ramp)
    means = [image_to_tensor(image, 16, generator(seed), random_crop=True)[0].mean().item() for seed in range(40)]
    assert min(means) < -0.6 and max(means) > 0.6  # both ends of the picture are seen
    rising = [image_to_tensor(image, 16, generator(seed), random_flip=True)[0, 0] for seed in range(200)]
    mirrored = sum((row[0] > row[-1]).item() for row in rising)
    assert 70 < mirrored < 130
    same = [image_to_tensor(image, 16, generator(3), random_crop=True, random_flip=True) for _ in range(2)]
    assert torch.equal(*same)


def test_every_epoch_has_all_examples_in_another_order():
    drawn = numbers(30, source=list(range(10)), batch_size=2)
    epochs = [drawn[:10], drawn[10:20], drawn[20:]]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert drawn == numbers(30, source=list(range(10)), batch_size=5)
    assert drawn != numbers(30, source=list(range(10)), batch_size=2, seed=1)
    assert numbers(12, source=list(range(10)), batch_size=2, shuffle=False) == [*range(10), 0, 1]


SOURCES = pytest.mark.parametrize(
    "source", [list(range(10)), Restartable(range(10)), Endless()], ids=["items", "in order", "endless"]
)


@SOURCES
def test_processes_share_the_stream(source):
    one = numbers(24, source=source, batch_size=4)
    two = [numbers(12, source=source, batch_size=2, rank=rank, world_size=2) for rank in range(2)]
    blocks = [iter(two[0]), iter(two[1])]
    together = [next(blocks[i // 2 % 2]) for i in range(24)]
    assert together == one


@SOURCES
def test_a_stream_goes_on_where_it_was(source):
    whole = numbers(30, source=source, batch_size=3)
    assert numbers(18, source=source, batch_size=3, start=12) == whole[12:]


@SOURCES
def test_workers_keep_the_order(source):
    batches = []
    for workers in (0, 2):
        stream = ExampleStream(source, number, batch_size=2, start=4)
        loader = iter(torch.utils.data.DataLoader(stream, 2, collate_fn=collate, num_workers=workers))
        batches.append([next(loader) for _ in range(9)])
    for plain, parallel in zip(*batches):
        assert plain["position"] == parallel["position"]
        assert torch.equal(plain["number"], parallel["number"])
        assert torch.equal(plain["augmentation"], parallel["augmentation"])


def test_an_endless_source_is_asked_for_what_is_needed():
    source = Endless()
    assert is_endless(source)
    assert numbers(4, source=source, batch_size=2, rank=1, world_size=2, start=1000) == [1002, 1003, 1006, 1007]
    assert source.asked == [1002, 1003, 1006, 1007]


def test_what_is_not_endless():
    class InOrder(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter([1, 2, 3])

    assert not any(is_endless(source) for source in ([1], Restartable([1]), InOrder(), iter([1])))
    assert numbers(4, source=InOrder(), batch_size=1) == [1, 2, 3, 1]


def test_the_next_picture_of_an_endless_source_takes_the_place_of_a_bad_one():
    assert numbers(3, source=Endless(bad=True), batch_size=1, start=6, on_bad_image="skip") == [6, 8, 8]

    class AlwaysBad:
        def __getitem__(self, index):
            return -1

    with pytest.raises(UnreadableImage, match="No picture before it could be read either"):
        numbers(1, source=AlwaysBad(), batch_size=1, on_bad_image="skip")


def test_augmentation_goes_with_the_position():
    def augmentations(**options):
        stream = iter(ExampleStream(list(range(8)), number, **options))
        return {example["position"]: example["augmentation"].item() for example in (next(stream) for _ in range(8))}

    whole = augmentations(batch_size=4)
    second = augmentations(batch_size=2, rank=1, world_size=2)
    assert set(second) == {2, 3, 6, 7, 10, 11, 14, 15}
    assert all(second[position] == whole[position] for position in (2, 3, 6, 7))
    assert len(set(whole.values())) == 8


def test_a_source_in_order_is_repeated():
    assert numbers(7, source=Restartable([5, 6, 7]), batch_size=1) == [5, 6, 7, 5, 6, 7, 5]
    with pytest.raises(ValueError, match="can be read once only"):
        numbers(4, source=iter([5, 6, 7]), batch_size=1)


@pytest.mark.parametrize("source", [[1, 2, 3], Restartable([1, 2, 3])], ids=["items", "in order"])
def test_too_few_examples(source):
    with pytest.raises(ValueError, match="has 3 examples, too few for one batch of 2 on each of 2 processes"):
        numbers(4, source=source, batch_size=2, world_size=2)
    assert len(numbers(4, source=source, batch_size=3)) == 4


def test_no_examples_at_all():
    with pytest.raises(ValueError, match="has 0 examples"):
        numbers(1, source=Restartable([]), batch_size=1)


def test_bad_pictures_stop_the_stream_unless_they_are_skipped():
    with pytest.raises(UnreadableImage, match="picture -1"):
        numbers(4, source=[0, -1, 2, 3], batch_size=1)
    with pytest.raises(ValueError, match="'error' or 'skip', not 'ignore'"):
        ExampleStream([0], number, batch_size=1, on_bad_image="ignore")


def test_the_next_picture_takes_the_place_of_a_bad_one():
    stream = ExampleStream([0, -1, -2, 3, 4], number, batch_size=1, shuffle=False, on_bad_image="skip")
    examples = iter(stream)
    drawn = [next(examples) for _ in range(6)]
    assert [example["number"].item() for example in drawn] == [0, 3, 3, 3, 4, 0]
    assert [example["skipped"] for example in drawn] == [0, 2, 1, 0, 0, 0]
    assert collate(drawn)["skipped"] == 3 and collate(drawn)["position"] == list(range(6))


def test_in_a_source_in_order_the_last_good_picture_does():
    stream = iter(ExampleStream(Restartable([7, -1, 8]), number, batch_size=1, on_bad_image="skip"))
    drawn = [next(stream) for _ in range(3)]
    assert [example["number"].item() for example in drawn] == [7, 7, 8]
    assert [example["skipped"] for example in drawn] == [0, 1, 0]


@pytest.mark.parametrize("source", [[-1, -2], Restartable([-1, 5])], ids=["items", "in order"])
def test_nothing_to_take_the_place_of_a_bad_picture(source):
    with pytest.raises(UnreadableImage, match="No picture before it could be read either"):
        numbers(1, source=source, batch_size=1, on_bad_image="skip")


def test_a_start_between_batches():
    with pytest.raises(ValueError, match="`start`=3 is not a whole number of batches of 4"):
        ExampleStream(list(range(9)), number, batch_size=2, world_size=2, start=3)


def test_batches():
    batch = collate(
        [
            {"pixels": torch.zeros(3), "caption": "a", "position": 4, "skipped": 1},
            {"pixels": torch.ones(3), "caption": "b", "position": 5, "skipped": 0},
        ]
    )
    assert batch["pixels"].shape == (2, 3)
    assert batch["caption"] == ["a", "b"] and batch["position"] == [4, 5] and batch["skipped"] == 1


class Drawn:
    """A source whose pictures are made batch by batch."""

    def __init__(self, pictures):
        self.pictures = pictures

    def finish_batch(self, batch, device):
        assert not torch.is_grad_enabled()
        return {"pixel_values": self.pictures, "device": str(device)}


def test_batches_are_finished_by_their_source():
    batch = {"caption": ["a", "b"], "position": [4, 5]}
    pictures = torch.zeros(2, 3, 8, 8)
    finished = finish_batch(Drawn(pictures), batch, "cpu", 8)
    assert finished["pixel_values"] is pictures and finished["device"] == "cpu"
    assert finished["caption"] == ["a", "b"] and finished["position"] == [4, 5]
    assert finish_batch([1, 2], batch, "cpu") is batch


@pytest.mark.parametrize(
    ("pictures", "resolution", "message"),
    [
        (
            None,
            8,
            r"`finish_batch` of Drawn must add `pixel_values`, a tensor \(batch_size, 3, 8, 8\), not a NoneType",
        ),
        (torch.zeros(2, 3, 8, 8), 16, r"\(batch_size, 3, 16, 16\), not \[2, 3, 8, 8\]"),
        (torch.zeros(2, 3, 8, 4), None, r"not \[2, 3, 8, 4\]"),
        (torch.zeros(2, 8, 8), None, r"\(batch_size, 3, resolution, resolution\), not \[2, 8, 8\]"),
    ],
)
def test_batches_that_are_not_finished(pictures, resolution, message):
    with pytest.raises(ValueError, match=message):
        finish_batch(Drawn(pictures), {}, "cpu", resolution)
