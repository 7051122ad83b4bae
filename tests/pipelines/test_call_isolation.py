# SPDX-License-Identifier: Apache-2.0
"""What one call of a pipeline leaves to others: at the same time, inside of it and after it, also if it failed."""

import copy
import operator
import pickle
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, Event

import numpy as np
import pytest
import torch
from peft import LoraConfig

from diffusers_hart.random_pipeline import random_pipeline


@pytest.fixture
def pipe():
    pipe = random_pipeline()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe, prompt="a red circle", seed=0, **options):
    return pipe(prompt, generator=torch.Generator().manual_seed(seed), output_type="np", **options).images


CALLS = [
    {"prompt": "a red circle", "guidance_scale": 0.0},
    {"prompt": "two green triangles under a yellow star", "guidance_scale": 7.0, "max_sequence_length": 24},
    {"prompt": "a", "seed": 3, "num_inference_steps": 2, "max_sequence_length": 90},
]


def together(pipe, calls, **options):
    """Pictures of calls that go scale by scale in step with each other."""
    barrier = Barrier(len(calls), timeout=60)

    def wait(pipe, scale_index, side, tensors):
        barrier.wait()
        return {}

    with ThreadPoolExecutor(len(calls)) as threads:
        drawn = [threads.submit(draw, pipe, **call, callback_on_step_end=wait, **options) for call in calls]
        return [future.result() for future in drawn]


def is_same(drawn, expected):
    """Matrix products may be split among fewer threads where others are busy, which rounds differently."""
    return np.abs(drawn - expected).max() < 0.01


def test_threads_get_their_single_thread_pictures(pipe):
    alone = [draw(pipe, **call) for call in CALLS]
    assert not any(is_same(alone[0], other) for other in alone[1:])
    for drawn, expected in zip(together(pipe, CALLS), alone):
        assert is_same(drawn, expected)


def test_threads_that_cut_and_pad_prompts_differently(pipe):
    lengths = [5, 17, 60]
    alone = [pipe.encode_prompt("a photo of a purple cat", max_sequence_length=length) for length in lengths]
    with torch.no_grad(), ThreadPoolExecutor(len(lengths)) as threads:
        for _ in range(20):
            encoded = threads.map(
                lambda length: pipe.encode_prompt("a photo of a purple cat", max_sequence_length=length), lengths
            )
            assert all(torch.equal(a[1], b[1]) for a, b in zip(encoded, alone))


def test_threads_with_different_lora_scales(pipe):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipe.transformer.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_v"], init_lora_weights=False))
    scales = [0.0, 1.0, 3.0]

    def draw_scaled(scale):
        return draw(pipe, attention_kwargs={"scale": scale})

    alone = [draw_scaled(scale) for scale in scales]
    assert not any(is_same(alone[0], other) for other in alone[1:])
    with ThreadPoolExecutor(len(scales)) as threads:
        for drawn, expected in zip(threads.map(draw_scaled, scales), alone):
            assert is_same(drawn, expected)


def test_a_callback_changes_its_own_call_alone(pipe):
    expected = draw(pipe)
    seen = {}
    barrier = Barrier(2, timeout=60)

    def stop(pipe, scale_index, side, tensors):
        pipe._guidance_scale, pipe._interrupt = 0.0, True
        barrier.wait()
        return {}

    def go_on(pipe, scale_index, side, tensors):
        if scale_index == 0:
            barrier.wait()
        seen[scale_index] = (pipe.guidance_scale, pipe.interrupt, pipe.num_timesteps)
        return {}

    with ThreadPoolExecutor(2) as threads:
        stopped = threads.submit(draw, pipe, callback_on_step_end=stop)
        drawn = threads.submit(draw, pipe, callback_on_step_end=go_on)
        assert is_same(drawn.result(), expected)
        assert not is_same(stopped.result(), expected)
    assert seen == dict.fromkeys(range(6), (4.5, False, 6))


def test_another_thread_may_interrupt_a_call(pipe):
    started, told = Event(), Event()
    scales_run = []

    def wait(pipe, scale_index, side, tensors):
        scales_run.append(scale_index)
        started.set()
        told.wait(60)
        return {}

    with ThreadPoolExecutor(1) as threads:
        drawn = threads.submit(draw, pipe, callback_on_step_end=wait)
        started.wait(60)
        pipe._interrupt = True
        told.set()
        drawn.result()
    assert scales_run == [0]


def test_a_call_inside_of_a_callback(pipe):
    outer, inner = draw(pipe), draw(pipe, "a purple cat", guidance_scale=1.0)
    pictures = []

    def call(pipe, scale_index, side, tensors):
        if scale_index == 2:
            pictures.append(draw(pipe, "a purple cat", guidance_scale=1.0))
        assert pipe.guidance_scale == 4.5
        return {}

    assert np.array_equal(draw(pipe, callback_on_step_end=call), outer)
    assert np.array_equal(pictures[0], inner)


def test_state_of_a_call_before_and_after_it(pipe):
    with pytest.raises(AttributeError, match="num_timesteps"):
        pipe.num_timesteps  # noqa: B018
    draw(pipe, guidance_scale=2.0)
    assert (pipe.guidance_scale, pipe.num_timesteps, pipe.interrupt) == (2.0, 6, False)
    assert copy.deepcopy(pipe).guidance_scale == pickle.loads(pickle.dumps(pipe)).guidance_scale == 2.0


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("scale", [0, 5])
def test_a_callback_that_raises(pipe, error, scale):
    expected = draw(pipe)

    def fail(pipe, scale_index, side, tensors):
        if scale_index == scale:
            raise error("by the callback")
        return {}

    with pytest.raises(error, match="by the callback"):
        draw(pipe, "a purple cat", guidance_scale=1.0, attention_kwargs={"scale": 0.5}, callback_on_step_end=fail)
    assert np.array_equal(draw(pipe), expected)


@pytest.mark.parametrize("component", ["text_encoder", "transformer", "residual_mlp", "vae.decoder"])
def test_running_out_of_memory(pipe, component):
    expected = draw(pipe)

    def fail(module, args, output):
        raise torch.OutOfMemoryError("out of memory")

    hook = operator.attrgetter(component)(pipe).register_forward_hook(fail)
    with pytest.raises(torch.OutOfMemoryError):
        draw(pipe, "a purple cat", guidance_scale=1.0)
    hook.remove()
    assert np.array_equal(draw(pipe), expected)


def test_a_failed_call_takes_models_off_the_device_again(pipe):
    """On the CPU, with hooks that only count: the failed call ends as a whole one does."""
    pipe.enable_model_cpu_offload(device="cpu")
    expected = draw(pipe)
    hooks = pipe._all_hooks

    def fail(pipe, scale_index, side, tensors):
        raise RuntimeError("by the callback")

    with pytest.raises(RuntimeError, match="by the callback"):
        draw(pipe, callback_on_step_end=fail)
    assert pipe._all_hooks is not hooks  # put on anew, after what was on the device was brought back
    assert np.array_equal(draw(pipe), expected)
