# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
import torch

from diffusers_hart import HARTClassConditionalPipeline, HARTTransformer2DModel


def seeded(seed):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def pipe(tiny):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformer = HARTTransformer2DModel(
            in_channels=8,
            codebook_size=640,
            num_layers=2,
            num_attention_heads=4,
            attention_head_dim=16,
            caption_channels=None,
            num_classes=3,
            sample_size=6,
        ).eval()
    transformer.proj_out.weight.data.mul_(8)  # sharp enough for the class to show
    components = {
        name: tiny.pipe.components[name] for name in ("vae", "scheduler", "residual_mlp", "residual_scheduler")
    }
    pipe = HARTClassConditionalPipeline(transformer, **components, id2label={0: "cat, house cat", 1: "dog", 2: "owl"})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_classes_give_different_pictures_and_a_batch_equals_single_runs(pipe):
    options = {"smooth": False, "output_type": "pt"}
    together = pipe([0, 2], generator=[seeded(0), seeded(0)], **options).images
    assert not torch.equal(together[0], together[1])
    for i, label in enumerate((0, 2)):
        alone = pipe(label, generator=[seeded(0)], **options).images
        assert torch.allclose(together[i], alone[0], atol=1e-4)


def test_guidance_and_its_absence(pipe):
    images = [
        pipe([1], guidance_scale=w, generator=seeded(0), output_type="np", num_inference_steps=2).images
        for w in (0, 0.0, 2.0, None)
    ]
    assert np.array_equal(images[0], images[1])
    assert not np.array_equal(images[0], images[2])
    assert images[3].shape == (1, 12, 12, 3)


def test_labels(pipe):
    assert pipe.get_label_ids(["owl", "house cat"]) == [2, 0]
    assert pipe.get_label_ids("dog") == [1]
    with pytest.raises(ValueError, match="Unknown class names .'horse'."):
        pipe.get_label_ids(["owl", "horse"])


def test_save_and_load(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    loaded = HARTClassConditionalPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert loaded.labels == pipe.labels
    images = [
        p(loaded.labels["owl"], smooth=False, generator=seeded(3), output_type="np").images for p in (pipe, loaded)
    ]
    assert np.allclose(
        *images, atol=1e-4
    )  # weights read from a file lie elsewhere in memory, which rounds differently


@pytest.mark.parametrize("labels", [[3], [-1], [], [0.5], 7, [True], "cat"])
def test_bad_labels(pipe, labels):
    with pytest.raises(ValueError, match=r"`class_labels` must be integers in \[0, 3\)"):
        pipe(labels)


def test_shared_arguments_are_checked(pipe):
    with pytest.raises(ValueError, match="this model draws squares of 12 pixels"):
        pipe([0], height=20)
    with pytest.raises(ValueError, match="`generator` is a list of 1, but 2 images"):
        pipe([0, 1], generator=[seeded(0)])
