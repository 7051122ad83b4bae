# SPDX-License-Identifier: Apache-2.0
import copy
import json

import numpy as np
import PIL.Image
import pytest
import torch
from accelerate import cpu_offload
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler
from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
from transformers import CLIPConfig, CLIPImageProcessorPil

from diffusers_hart import HARTClassConditionalPipeline, HARTPipeline, HARTScheduler, HARTTransformer2DModel


DETERMINISTIC = {"top_k": 1, "smooth": False, "residual_temperature": 0.0}


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def from_components(pipe, **changes):
    return HARTPipeline(**{**pipe.components, **changes})


@pytest.fixture
def pipe(tiny):
    """A pipeline of its own for each test, over shared weights."""
    pipe = from_components(tiny.pipe)
    pipe.set_progress_bar_config(disable=True)
    return pipe


class RecordingScheduler(HARTScheduler):
    """A scheduler that writes down the logits it gets and the codes it draws."""

    def __init__(self, schedules):
        super().__init__(schedules=schedules)
        self.logits, self.codes = [], []

    def step(self, logits, *args, **kwargs):
        output = super().step(logits, *args, **kwargs)
        self.logits.append(logits)
        self.codes.append(output.codes)
        return output


@pytest.mark.parametrize("guided", [True, False])
def test_generation_equals_the_original(model, assert_close, guided):
    keys = "e2e" if guided else "e2e_noguide"
    side = model.scales[-1]
    scheduler = RecordingScheduler(schedules=(model.scales,))
    pipe = from_components(model.pipe, scheduler=scheduler)
    arguments = {
        "prompt_embeds": model["in.prompt_embeds"],
        "prompt_attention_mask": model["in.prompt_attention_mask"],
        "guidance_scale": model["e2e.guidance"].item() if guided else 0,
        "latents": model["e2e.residual_noise"].transpose(1, 2).unflatten(2, (side, side)),
        **DETERMINISTIC,
    }
    latents = pipe(**arguments, output_type="latent").images
    assert torch.equal(torch.cat(scheduler.codes, dim=1), model[f"{keys}.tokens"])
    assert_close(torch.cat(scheduler.logits, dim=1), model[f"{keys}.logits"])
    assert_close(latents, model[f"{keys}.final_latent"], atol=3e-4)
    assert_close(pipe(**arguments, output_type="pt").images, model[f"{keys}.image"], atol=3e-4)


@pytest.mark.parametrize("kind", ["plain", "system"])
@torch.no_grad()
def test_text_equals_the_original(model, assert_close, kind):
    embeds, mask, _, _ = model.pipe.encode_prompt(
        model.text["prompts"],
        do_classifier_free_guidance=False,
        max_sequence_length=model.text["max_sequence_length"],
        system_prompt=model.text["system_prompt"] if kind == "system" else "",
    )
    tokens = model.pipe.tokenizer(
        model.text["prompts"], padding="max_length", max_length=model.text["max_sequence_length"], truncation=True
    )
    assert torch.equal(torch.tensor(tokens.input_ids), model.text_tensors[f"{kind}.input_ids"])
    assert torch.equal(mask, model.text_tensors[f"{kind}.mask"])
    assert torch.equal(mask.cumsum(-1) - 1, model.text_tensors[f"{kind}.position_ids"])
    assert_close(embeds, model.text_tensors[f"{kind}.embeds"])


def test_the_unconditional_branch_is_zeros_at_position_zero(pipe):
    _, mask, negative_embeds, negative_mask = pipe.encode_prompt("a red circle")
    assert negative_embeds.abs().max() == 0
    assert (negative_mask.cumsum(-1) - 1 == 0).all()
    assert mask.sum() > 1


def test_what_encode_prompt_returns_is_what_the_call_accepts(pipe):
    embeds = pipe.encode_prompt("a red circle", negative_prompt="a blue square")
    names = ("prompt_embeds", "prompt_attention_mask", "negative_prompt_embeds", "negative_prompt_attention_mask")
    by_embeds = pipe(**dict(zip(names, embeds)), generator=seeded(0), output_type="np").images
    by_text = pipe("a red circle", negative_prompt="a blue square", generator=seeded(0), output_type="np").images
    assert np.array_equal(by_embeds, by_text)
    without = pipe("a red circle", generator=seeded(0), output_type="np").images
    assert not np.array_equal(by_text, without)


def test_the_system_prompt_of_the_checkpoint_is_the_default(tiny):
    text = tiny.text["system_prompt"]
    with_default = from_components(tiny.pipe, system_prompt=text)
    plain = tiny.pipe.encode_prompt("a red circle")[0]
    given = tiny.pipe.encode_prompt("a red circle", system_prompt=text)[0]
    assert torch.equal(with_default.encode_prompt("a red circle")[0], given)
    assert torch.equal(with_default.encode_prompt("a red circle", system_prompt="")[0], plain)
    assert not torch.equal(given, plain)


def test_output_types(pipe):
    images = {kind: pipe("a red circle", generator=seeded(0), output_type=kind).images for kind in ("pil", "np", "pt")}
    assert isinstance(images["pil"][0], PIL.Image.Image) and images["pil"][0].size == (12, 12)
    assert images["np"].shape == (1, 12, 12, 3) and images["np"].dtype == np.float32
    assert images["pt"].shape == (1, 3, 12, 12)
    assert 0 <= images["np"].min() and images["np"].max() <= 1
    assert np.allclose(images["pt"].permute(0, 2, 3, 1).numpy(), images["np"])
    assert np.abs(np.asarray(images["pil"][0]) / 255 - images["np"][0]).max() <= 0.5 / 255 + 1e-6
    latents = pipe("a red circle", generator=seeded(0), output_type="latent", return_dict=False)[0]
    assert latents.shape == (1, 8, 6, 6)
    with torch.no_grad():
        decoded = pipe.vae.decode(latents).sample
    assert torch.allclose(decoded / 2 + 0.5, images["pt"], atol=1e-6)


def test_the_same_generator_gives_the_same_picture_twice(pipe):
    first, second, other = (
        pipe("a red circle", generator=seeded(seed), output_type="np").images for seed in (0, 0, 1)
    )
    assert np.array_equal(first, second)
    assert not np.array_equal(first, other)


def test_everything_random_comes_from_the_generator(pipe):
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = pipe("a red circle", generator=seeded(0), output_type="np").images
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert np.array_equal(pipe("a red circle", generator=seeded(0), output_type="np").images, first)
    without = [pipe("a red circle", output_type="np").images for _ in range(2)]
    assert not np.array_equal(*without)


# Smoothing divides the guided logits by a temperature of 0.08 at the last scale: where two codes are nearly tied, float32
# rounding, which depends on the batch size, is amplified by about 200.
@pytest.mark.parametrize(("smooth", "atol"), [(False, 1e-4), (True, 1e-3)])
def test_a_batch_with_a_list_of_generators_equals_single_runs(model, assert_close, smooth, atol):
    prompts = ["a red circle", "two green triangles under a yellow star", "", "a photo of a purple cat"]
    scheduler = RecordingScheduler(schedules=(model.scales,))
    pipe = from_components(model.pipe, scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)
    options = {"smooth": smooth, "output_type": "pt"}
    together = pipe(prompts, generator=[seeded(i) for i in range(4)], **options).images
    codes = torch.cat(scheduler.codes, dim=1)
    for i, prompt in enumerate(prompts):
        scheduler.codes.clear()
        alone = pipe(prompt, generator=[seeded(i)], **options).images
        assert torch.equal(torch.cat(scheduler.codes, dim=1), codes[i : i + 1])
        assert_close(together[i : i + 1], alone, atol=atol)


def test_deterministic_given_the_noise(pipe):
    noise = torch.randn(1, 8, 6, 6, generator=seeded(0))
    images = [pipe("a red circle", latents=noise, output_type="np", **DETERMINISTIC).images for _ in range(2)]
    assert np.array_equal(*images)
    other = pipe("a red circle", latents=-noise, output_type="np", **DETERMINISTIC).images
    assert not np.array_equal(images[0], other)


def test_several_images_a_prompt(pipe):
    prompts = ["a red circle", "a photo of a purple cat"]
    options = {"smooth": False, "output_type": "pt"}
    images = pipe(prompts, num_images_per_prompt=2, generator=[seeded(i) for i in range(4)], **options).images
    assert len(images) == 4
    for i in range(4):
        alone = pipe(prompts[i // 2], generator=[seeded(i)], **options).images
        assert torch.allclose(images[i], alone[0], atol=1e-4)


def test_negative_prompts(pipe):
    prompts = ["a red circle", "a photo of a purple cat"]
    one = pipe(prompts, negative_prompt="a star", generator=seeded(0), output_type="np").images
    each = pipe(prompts, negative_prompt=["a star", "a star"], generator=seeded(0), output_type="np").images
    assert np.array_equal(one, each)
    unguided = [
        pipe(prompts, negative_prompt=text, guidance_scale=0, generator=seeded(0), output_type="np").images
        for text in ("a star", None)
    ]
    assert np.array_equal(*unguided)


def test_callbacks_see_the_latents_and_may_change_them(pipe):
    seen = []

    def watch(pipe, scale_index, side, tensors):
        seen.append((scale_index, side, tensors["latents"].clone()))
        return tensors

    latents = pipe("a red circle", generator=seeded(0), callback_on_step_end=watch, output_type="latent").images
    assert [(k, side) for k, side, _ in seen] == list(enumerate((1, 2, 3, 4, 6)))
    assert pipe.num_timesteps == 5
    assert torch.equal(seen[-1][2], latents)

    def zero_at_the_end(pipe, scale_index, side, tensors):
        if scale_index == pipe.num_timesteps - 1:
            tensors["latents"] = torch.zeros_like(tensors["latents"])
        return tensors

    zeros = pipe("a red circle", generator=seeded(0), callback_on_step_end=zero_at_the_end, output_type="latent")
    assert zeros.images.abs().sum() == 0

    def zero_at_the_start(pipe, scale_index, side, tensors):
        return {"latents": torch.zeros_like(tensors["latents"])} if scale_index == 0 else {}

    changed = pipe("a red circle", generator=seeded(0), callback_on_step_end=zero_at_the_start, output_type="latent")
    assert not torch.equal(changed.images, latents)


def test_a_callback_may_change_the_guidance_and_interrupt(pipe):
    def stop_guiding(pipe, scale_index, side, tensors):
        pipe._guidance_scale = 0.0
        return {}

    guided = pipe("a red circle", generator=seeded(0), output_type="np").images
    less = pipe("a red circle", generator=seeded(0), output_type="np", callback_on_step_end=stop_guiding).images
    assert not np.array_equal(guided, less)

    scales_run = []

    def interrupt(pipe, scale_index, side, tensors):
        scales_run.append(scale_index)
        pipe._interrupt = scale_index == 1
        return {}

    pipe("a red circle", generator=seeded(0), callback_on_step_end=interrupt)
    assert scales_run == [0, 1]
    assert np.array_equal(pipe("a red circle", generator=seeded(0), output_type="np").images, guided)


def test_the_progress_bar_counts_tokens(pipe, capfd):
    pipe.set_progress_bar_config(disable=False)
    pipe("a red circle", generator=seeded(0))
    assert "66/66" in capfd.readouterr().err


def test_without_residual(tiny):
    bare = from_components(tiny.pipe, residual_mlp=None, residual_scheduler=None)
    bare.set_progress_bar_config(disable=True)
    images = [bare("a red circle", output_type="np", **DETERMINISTIC).images for _ in range(2)]
    assert np.array_equal(*images)
    with pytest.raises(ValueError, match="to 0, not 4. This pipeline has no residual diffusion"):
        bare("a red circle", num_inference_steps=4)
    latents = bare("a red circle", generator=seeded(0), output_type="latent", smooth=False).images
    no_steps = tiny.pipe(
        "a red circle", generator=seeded(0), output_type="latent", smooth=False, num_inference_steps=0
    ).images
    assert torch.equal(latents, no_steps)
    with_residual = tiny.pipe("a red circle", generator=seeded(0), output_type="latent", smooth=False).images
    assert not torch.equal(latents, with_residual)


@pytest.mark.parametrize("other", [DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler])
def test_other_residual_schedulers(pipe, other):
    own = pipe("a red circle", generator=seeded(0), output_type="pt").images
    pipe.residual_scheduler = other.from_config(pipe.residual_scheduler.config)
    image = pipe("a red circle", generator=seeded(0), output_type="pt").images
    assert image.isfinite().all() and not torch.equal(image, own)
    listed = pipe("a red circle", generator=[seeded(0)], num_inference_steps=4, output_type="pt").images
    assert listed.isfinite().all()
    with pytest.raises(ValueError, match=f"needs HARTResidualScheduler; {other.__name__}"):
        pipe("a red circle", residual_temperature=0.5)


def test_smoothing_and_temperature_change_the_picture(pipe):
    images = [
        pipe("a red circle", generator=seeded(0), output_type="np", **options).images
        for options in ({}, {"smooth": False}, {"residual_temperature": 0.5}, {"top_k": 3}, {"top_p": 0.3})
    ]
    for i, image in enumerate(images):
        assert not any(np.array_equal(image, other) for other in images[:i])


def test_a_call_leaves_no_state_behind(pipe):
    before = pipe("a red circle", generator=seeded(0), output_type="np").images
    pipe("a purple cat", guidance_scale=1.0, num_inference_steps=3, generator=seeded(9))
    assert np.array_equal(pipe("a red circle", generator=seeded(0), output_type="np").images, before)


def test_unusual_prompts_give_pictures_of_their_own(pipe):
    prompts = ["", "une etoile, \u4e94\u8292\u661f, \u2b50", " ".join(["long"] * 50), "a red circle"]
    images = [pipe(prompt, generator=seeded(0), output_type="np").images for prompt in prompts]
    for i, image in enumerate(images):
        assert image.shape == (1, 12, 12, 3)
        assert not any(np.array_equal(image, other) for other in images[:i])


def test_numbers_of_other_libraries(pipe):
    images = [
        pipe(
            "a red circle",
            generator=seeded(0),
            output_type="np",
            guidance_scale=number(3),
            top_k=number(5),
            num_inference_steps=number(4),
        ).images
        for number in (int, np.int64)
    ]
    assert np.array_equal(*images)


def test_encode_prompt_needs_only_what_concerns_text(tiny):
    bare = HARTPipeline(tiny.pipe.tokenizer, tiny.pipe.text_encoder, None, None, None)
    expected = tiny.pipe.encode_prompt("a red circle", max_sequence_length=12)
    assert all(torch.equal(a, b) for a, b in zip(bare.encode_prompt("a red circle", max_sequence_length=12), expected))
    no_text = from_components(tiny.pipe, text_encoder=None)
    with pytest.raises(ValueError, match="no text encoder or no tokenizer: pass `prompt_embeds`"):
        no_text("a red circle")


def test_a_negative_prompt_beside_embeddings_of_another_length(pipe):
    embeds, mask, _, _ = pipe.encode_prompt("a red circle", max_sequence_length=9)
    arguments = {"prompt_embeds": embeds, "prompt_attention_mask": mask, "output_type": "np"}
    images = [pipe(**arguments, negative_prompt=text, generator=seeded(0)).images for text in ("a star", None)]
    assert not np.array_equal(*images)


@pytest.mark.parametrize("scales", [(1,), (1, 6)])
def test_schedules_of_one_and_two_scales(tiny, scales):
    pipe = from_components(tiny.pipe, scheduler=HARTScheduler(schedules=(scales,)))
    pipe.set_progress_bar_config(disable=True)
    image = pipe("a red circle", height=2 * scales[-1], generator=seeded(0), output_type="pt").images
    assert image.shape == (1, 3, 2 * scales[-1], 2 * scales[-1]) and image.isfinite().all()


def test_hooks_that_move_weights_change_nothing(tiny):
    """What sequential offload and device maps do, on the CPU."""
    components = {name: copy.deepcopy(component) for name, component in tiny.pipe.components.items()}
    for name in ("text_encoder", "transformer", "residual_mlp", "vae"):
        cpu_offload(components[name], execution_device="cpu")
    offloaded = HARTPipeline(**components)
    offloaded.set_progress_bar_config(disable=True)
    images = [
        p("a red circle", generator=seeded(0), output_type="pt", smooth=False).images for p in (offloaded, tiny.pipe)
    ]
    assert torch.allclose(*images, atol=1e-4)
    encoded = offloaded.vae.encode(tiny["tok.image"])
    assert torch.equal(encoded.codes, tiny["tok.indices"])


@pytest.mark.parametrize("flagged", [True, False])
def test_the_safety_checker_blackens_what_it_flags(tiny, flagged):
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(vision_config={**vision, "image_size": 32, "patch_size": 16}, projection_dim=8)
    with torch.random.fork_rng():
        checker = StableDiffusionSafetyChecker(config).eval()
    checker.concept_embeds_weights.data.fill_(-2.0 if flagged else 2.0)  # thresholds of a cosine similarity
    checker.special_care_embeds_weights.data.fill_(2.0)
    extractor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    checked = from_components(tiny.pipe, safety_checker=checker, feature_extractor=extractor)
    checked.set_progress_bar_config(disable=True)
    output = checked("a red circle", generator=seeded(0), output_type="np", num_images_per_prompt=2)
    assert output.nsfw_content_detected == [flagged, flagged]
    plain = tiny.pipe("a red circle", generator=seeded(0), output_type="np", num_images_per_prompt=2).images
    assert np.array_equal(output.images, np.zeros_like(plain) if flagged else plain)


def test_a_transformer_of_the_other_kind(tiny):
    class_model = HARTTransformer2DModel(
        num_layers=1, num_attention_heads=1, attention_head_dim=8, caption_channels=None, num_classes=3
    )
    with pytest.raises(ValueError, match="`transformer` is a model of classes, which HARTPipeline does not draw"):
        from_components(tiny.pipe, transformer=class_model)
    with pytest.raises(ValueError, match="`transformer` is a model of texts, which HARTClassConditionalPipeline"):
        HARTClassConditionalPipeline(tiny.pipe.transformer, tiny.pipe.vae, tiny.pipe.scheduler)


def test_a_cut_prompt_is_told_with_what_was_lost(pipe, caplog):
    text = "two green triangles under a yellow star"
    lost = pipe.tokenizer.decode(pipe.tokenizer(text).input_ids[4:])

    def told(*args, **kwargs):
        caplog.clear()
        pipe.encode_prompt(*args, **kwargs, max_sequence_length=4)
        return [record.message for record in caplog.records if record.name.startswith("diffusers_hart")]

    for messages in (told(text), told("a", system_prompt=text)):
        assert len(messages) == 1
        assert "was cut to 4" in messages[0] and lost in messages[0]
    assert not told("a")


ERRORS = [
    ({"prompt": None}, "either `prompt` or `prompt_embeds`, not neither"),
    ({"prompt_embeds": torch.zeros(1, 12, 24)}, "either `prompt` or `prompt_embeds`, not both"),
    ({"prompt": 3}, "`prompt` must be a string or a list of strings, not 3"),
    ({"prompt": []}, "`prompt` must be a string or a list of strings"),
    ({"prompt": ["a", None]}, "`prompt` must be a string or a list of strings"),
    ({"height": 16}, "`height`=16 and `width`=16; this model draws squares of 12 pixels"),
    ({"height": 0}, "`height`=0 and `width`=0; this model draws squares of 12 pixels"),
    ({"width": 16}, "`height`=16 and `width`=16; this model draws squares of 12 pixels"),
    ({"height": 12, "width": 16}, "`height`=12 and `width`=16; this model draws squares of 12 pixels"),
    ({"guidance_scale": -1.0}, "`guidance_scale` must be 0 .off. or a positive number, not -1.0"),
    ({"guidance_scale": float("nan")}, "`guidance_scale` must be"),
    ({"top_p": 0.0}, "`top_p` must be above 0 and at most 1, not 0.0"),
    ({"top_p": 1.5}, "`top_p` must be above 0 and at most 1, not 1.5"),
    ({"top_k": 0}, "`top_k` must be a positive integer, not 0"),
    ({"num_inference_steps": -1}, "must be an integer from 0 .no residual. to 1000, not -1"),
    ({"num_inference_steps": 1001}, "must be an integer from 0 .no residual. to 1000, not 1001"),
    ({"num_inference_steps": 2.5}, "must be an integer from 0 .no residual. to 1000, not 2.5"),
    ({"top_k": True}, "`top_k` must be a positive integer, not True"),
    ({"generator": (torch.Generator(),)}, "`generator` must be a torch.Generator or a list of them"),
    ({"generator": [None]}, "`generator` must be a torch.Generator or a list of them"),
    (
        {"negative_prompt_embeds": torch.zeros(2, 12, 24), "negative_prompt_attention_mask": torch.ones(2, 12)},
        r"`negative_prompt_embeds` must be of shape \(1, 12, 24\) like the prompts' embeddings, not \(2, 12, 24\)",
    ),
    (
        {"negative_prompt_embeds": torch.zeros(1, 11, 24), "negative_prompt_attention_mask": torch.ones(1, 11)},
        r"`negative_prompt_embeds` must be of shape \(1, 12, 24\)",
    ),
    (
        {"prompt": None, "prompt_embeds": torch.zeros(0, 12, 24), "prompt_attention_mask": torch.ones(0, 12)},
        r"`prompt_embeds` must be of shape .* not \(0, 12, 24\)",
    ),
    ({"residual_temperature": -0.1}, "`residual_temperature` must be 0 or a positive number, not -0.1"),
    ({"num_images_per_prompt": 0}, "`num_images_per_prompt` must be a positive integer, not 0"),
    ({"max_sequence_length": 0}, "`max_sequence_length` must be a positive integer, not 0"),
    ({"output_type": "jpg"}, "`output_type` must be one of pil, np, pt, latent, not 'jpg'"),
    ({"generator": [torch.Generator()] * 2}, "`generator` is a list of 2, but 1 images"),
    ({"latents": torch.zeros(1, 36, 8)}, r"`latents` must be of shape \(1, 8, 6, 6\), not \(1, 36, 8\)"),
    ({"negative_prompt": ["a", "b"]}, "`negative_prompt` is a list of 2 for 1 prompts"),
    ({"callback_on_step_end_tensor_inputs": ["codes"]}, r"must be among \['latents'\], not \['codes'\]"),
    (
        {"prompt": None, "prompt_embeds": torch.zeros(1, 12, 16), "prompt_attention_mask": torch.ones(1, 12)},
        r"`prompt_embeds` must be of shape \(batch_size, tokens, 24\), not \(1, 12, 16\)",
    ),
    ({"prompt": None, "prompt_embeds": torch.zeros(1, 12, 24)}, "`prompt_embeds` need `prompt_attention_mask`"),
    ({"negative_prompt_embeds": torch.zeros(1, 12, 24)}, "`negative_prompt_embeds` need"),
    (
        {"prompt": None, "prompt_embeds": torch.zeros(1, 12, 24), "prompt_attention_mask": torch.ones(1, 11)},
        r"`prompt_attention_mask` must be of shape \(1, 12\), not \(1, 11\)",
    ),
    (
        {"negative_prompt": "a", "negative_prompt_embeds": torch.zeros(1, 12, 24)},
        "either `negative_prompt` or `negative_prompt_embeds`, not both",
    ),
]


@pytest.mark.parametrize(("arguments", "message"), ERRORS)
def test_bad_arguments_get_one_clear_error(pipe, arguments, message):
    calls = []
    for name in ("text_encoder", "transformer"):
        component = copy.copy(getattr(pipe, name))
        component.forward = lambda *args, **kwargs: calls.append(args)
        setattr(pipe, name, component)
    with pytest.raises(ValueError, match=message):
        pipe(**{"prompt": "a red circle", **arguments})
    assert not calls  # nothing was computed


def test_model_index(tiny, tmp_path):
    from_components(tiny.pipe, system_prompt="Draw:").save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == "HARTPipeline"
    assert index["transformer"] == ["diffusers_hart", "HARTTransformer2DModel"]
    assert index["safety_checker"] == [None, None]
    assert HARTPipeline.from_pretrained(tmp_path).config.system_prompt == "Draw:"
