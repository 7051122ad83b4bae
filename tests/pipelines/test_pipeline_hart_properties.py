# SPDX-License-Identifier: Apache-2.0
"""Whatever is passed to a call: what is promised, or one error that says why not; and nothing left behind."""

import logging
import math
import warnings

import numpy as np
import PIL.Image
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from diffusers_hart import HARTPipeline


SIDE, LATENT, CHANNELS, TOKENS = 12, (8, 6, 6), 24, 12  # of the golden model's pictures, latents and text
NAN, INF = math.nan, math.inf


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def noise(*shape, seed=0):
    return torch.randn(shape, generator=seeded(seed))


def keep_everything(pipe, scale_index, side, tensors):
    return None


def negate_latents(pipe, scale_index, side, tensors):
    return {"latents": -tensors["latents"]} if "latents" in tensors else {}


def stop_guiding(pipe, scale_index, side, tensors):
    pipe._guidance_scale = 0.0
    return {}


def interrupt(pipe, scale_index, side, tensors):
    pipe._interrupt = True
    return {}


@st.composite
def valid_calls(draw):
    """Arguments that fit each other, and how many pictures they ask for."""
    batch_size, per_prompt = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    images = batch_size * per_prompt
    prompts = st.text(max_size=40)
    arguments = {"num_images_per_prompt": per_prompt}
    tokens = None
    if draw(st.booleans()):
        one = batch_size == 1 and draw(st.booleans())
        arguments["prompt"] = (
            draw(prompts) if one else draw(st.lists(prompts, min_size=batch_size, max_size=batch_size))
        )
        arguments["max_sequence_length"] = tokens = draw(st.sampled_from([None, 1, 5, 30]))
    else:
        tokens = draw(st.integers(1, 14))
        arguments["prompt_embeds"] = noise(batch_size, tokens, CHANNELS)
        arguments["prompt_attention_mask"] = (noise(batch_size, tokens) > 0).long()
    negative = draw(st.sampled_from([None, "text", "texts", "embeds"]))
    if negative == "text":
        arguments["negative_prompt"] = draw(prompts)
    elif negative == "texts":
        arguments["negative_prompt"] = draw(st.lists(prompts, min_size=batch_size, max_size=batch_size))
    elif negative == "embeds":
        arguments["negative_prompt_embeds"] = noise(batch_size, tokens or TOKENS, CHANNELS, seed=1)
        arguments["negative_prompt_attention_mask"] = torch.ones(batch_size, tokens or TOKENS)
    choices = {
        "height": [None, SIDE, np.int64(SIDE)],
        "width": [None, SIDE],
        "guidance_scale": [None, 0, 1, 4.5, np.float32(2), 1e4],
        "num_inference_steps": [None, 0, 1, 2, 3, 21, np.int64(2)],
        "top_k": [None, 1, 2, 7, 10**9],
        "top_p": [None, 1e-9, 0.5, 1, 1.0],
        "smooth": [True, False],
        "residual_temperature": [0, 0.0, 0.7, 1.0, 3],
        "generator": [None, "one", "each"],
        "latents": [None, "float32", "float16"],
        "output_type": ["pil", "np", "pt", "latent"],
        "return_dict": [True, False],
        "attention_kwargs": [None, {}, {"scale": 0.5}, {"scale": 0}],
        "callback_on_step_end": [None, keep_everything, negate_latents, stop_guiding, interrupt],
        "callback_on_step_end_tensor_inputs": [["latents"], []],
        "system_prompt": [None, "", "Draw:"],
    }
    for name in draw(st.sets(st.sampled_from(sorted(choices)))):
        arguments[name] = draw(st.sampled_from(choices[name]))
    generator = arguments.get("generator")
    if generator is not None:
        arguments["generator"] = seeded(1) if generator == "one" else [seeded(i) for i in range(images)]
    if arguments.get("latents") is not None:
        arguments["latents"] = noise(images, *LATENT).to(getattr(torch, arguments["latents"]))
    return arguments, images


# Values that no call may take, whatever else it is given.
REFUSED = {
    "prompt": [3, [], ["a", None], ("a",), b"a", {}, 0.5],
    "negative_prompt": [3, [], [None], ["a"] * 7, b"a"],
    "height": [0, -SIDE, 16, "12", NAN, INF, [SIDE], True],
    "width": [0, -SIDE, 16, "12", NAN, INF, [SIDE], True],
    "guidance_scale": [-1, NAN, INF, "4", [4.5], 1j, True],
    "num_images_per_prompt": [0, -1, 1.5, "1", True, None],
    "num_inference_steps": [-1, 1001, 2.5, "8", NAN, True],
    "top_k": [0, -3, 2.5, "5", True, NAN],
    "top_p": [0, -0.5, 1.5, NAN, "1", True],
    "residual_temperature": [-0.1, NAN, INF, "1", None, True],
    "generator": [0, "seed", (seeded(),), [None], [seeded()] * 7, []],
    "latents": [noise(1, 2, 3), noise(7, *LATENT), 0, "noise", [[0.0]], noise(1, *LATENT) * NAN],
    "prompt_embeds": [noise(1, 4, 3), noise(4, CHANNELS), noise(0, 4, CHANNELS), "embeds", 3, torch.ones(())],
    "prompt_attention_mask": [torch.ones(5), torch.ones(9, 9), "mask", 3],
    "negative_prompt_embeds": [noise(1, 4, 3), noise(9, 4, CHANNELS), "embeds", 3],
    "negative_prompt_attention_mask": [torch.ones(5), torch.ones(9, 9), "mask", 3],
    "output_type": ["jpg", None, 3, ["pil"], ""],
    "attention_kwargs": ["scale", 3, {"scale": "1"}, {"scale": None}, {"scale": True}],
    "callback_on_step_end": ["callback", 3],
    "callback_on_step_end_tensor_inputs": [["codes"], "latents", 3, None, [3]],
    "max_sequence_length": [0, -1, 2.5, "5", True],
    "system_prompt": [3, ["a"], b"a"],
}


@st.composite
def calls(draw):
    """Half of the calls are valid; the others have one or two arguments that no call may take."""
    arguments, images = draw(valid_calls())
    refused = draw(st.sets(st.sampled_from(sorted(REFUSED)), min_size=1, max_size=2)) if draw(st.booleans()) else set()
    for name in refused:
        arguments[name] = REFUSED[name][draw(st.integers(0, len(REFUSED[name]) - 1))]
    return arguments, images, refused


def check_pictures(output, arguments, images):
    assert isinstance(output, tuple) != arguments.get("return_dict", True)
    pictures = output[0]
    kind = arguments.get("output_type", "pil")
    assert len(pictures) == images
    if kind == "pil":
        assert all(isinstance(picture, PIL.Image.Image) and picture.size == (SIDE, SIDE) for picture in pictures)
        assert all(picture.mode == "RGB" for picture in pictures)
    elif kind == "latent":
        assert pictures.shape == (images, *LATENT) and pictures.dtype == torch.float32 and pictures.isfinite().all()
    else:
        shape = (images, SIDE, SIDE, 3) if kind == "np" else (images, 3, SIDE, SIDE)
        assert pictures.shape == shape
        assert pictures.dtype == (np.float32 if kind == "np" else torch.float32)
        assert 0 <= pictures.min() and pictures.max() <= 1  # which excludes what is no number


class Records(logging.Handler):
    def __init__(self):
        super().__init__()
        self.messages = []

    def emit(self, record):
        self.messages.append(record.getMessage())


def plain_picture(pipe):
    return pipe("a red circle", generator=seeded(), output_type="np").images


def check_one_call(pipe, expected, arguments, images, refused):
    records = Records()
    loggers = [logging.getLogger(name) for name in ("diffusers", "diffusers_hart", "transformers", "py.warnings")]
    for logger in loggers:
        logger.addHandler(records)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            output = pipe(**arguments)
    except ValueError as error:
        assert refused, f"a valid call was refused: {error}"
        assert any(f"`{name}" in str(error) for name in (*refused, "prompt", "negative_prompt")), error
    else:
        assert not refused, f"{refused} went unnoticed"
        check_pictures(output, arguments, images)
    finally:
        for logger in loggers:
            logger.removeHandler(records)
    assert len(records.messages) <= 2 * images + 2  # one for each text that was cut, and the system prompt twice
    assert np.array_equal(plain_picture(pipe), expected)


@pytest.fixture(scope="module")
def pipe(tiny):
    pipe = HARTPipeline(**tiny.pipe.components)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def expected(pipe):
    return plain_picture(pipe)


OPTIONS = {
    "deadline": None,
    "database": None,
    "suppress_health_check": list(HealthCheck),
    "phases": [Phase.generate, Phase.shrink],
}


@settings(max_examples=150, derandomize=True, **OPTIONS)
@given(call=calls())
def test_any_call_gives_what_is_promised_or_says_why_not(pipe, expected, call):
    check_one_call(pipe, expected, *call)


@pytest.mark.slow
@settings(max_examples=2000, **OPTIONS)
@given(call=calls())
def test_two_thousand_calls(pipe, expected, call):
    check_one_call(pipe, expected, *call)
