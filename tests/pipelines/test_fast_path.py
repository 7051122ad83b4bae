# SPDX-License-Identifier: Apache-2.0
"""The fast path compiles with dynamo's eager backend here, which traces as any other and generates no code."""

import copy

import pytest
import torch
from accelerate import cpu_offload
from peft import LoraConfig

from diffusers_hart import (
    HARTClassConditionalPipeline,
    HARTPipeline,
    HARTResidualScheduler,
    HARTScheduler,
    HARTTransformer2DModel,
    HybridTokenizer,
    ResidualDiffusionMLP,
)
from diffusers_hart.pipelines.hart import fast_path


EAGER = {"backend": "eager"}
DETERMINISTIC = {"top_k": 1, "smooth": False, "residual_temperature": 0.0, "output_type": "pt"}


class RecordingScheduler(HARTScheduler):
    def step(self, *args, **kwargs):
        output = super().step(*args, **kwargs)
        self.codes.append(output.codes)
        return output


def pipeline(tiny, **changes):
    components = {**tiny.pipe.components, "transformer": copy.deepcopy(tiny.pipe.transformer), **changes}
    pipe = HARTPipeline(**components)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def golden_arguments(model):
    side = model.scales[-1]
    return {
        "prompt_embeds": model["in.prompt_embeds"],
        "prompt_attention_mask": model["in.prompt_attention_mask"],
        "guidance_scale": model["e2e.guidance"].item(),
        "latents": model["e2e.residual_noise"].transpose(1, 2).unflatten(2, (side, side)),
        **DETERMINISTIC,
    }


def warnings_of(caplog):
    return [record.message for record in caplog.records if record.name.startswith("diffusers_hart")]


def draw(pipe, prompt="a red circle", seed=0, **options):
    options = {"output_type": "pt", "generator": torch.Generator().manual_seed(seed), **options}
    return pipe(prompt, **options).images


@pytest.fixture(autouse=True)
def no_compiled_code_of_other_tests():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def test_codes_and_picture_equal_the_original_and_nothing_is_compiled_anew(tiny, assert_close):
    scheduler = RecordingScheduler(schedules=(tiny.scales,))
    pipe = pipeline(tiny, scheduler=scheduler)
    arguments = golden_arguments(tiny)
    batch_size, tokens = arguments["prompt_embeds"].shape[:2]
    scheduler.codes = []
    pipe.enable_fast_path(batch_sizes=batch_size, max_sequence_length=tokens, compile_options=EAGER)
    for _ in range(2):
        scheduler.codes.clear()
        with torch.compiler.set_stance("fail_on_recompile"):
            image = pipe(**arguments).images
        assert torch.equal(torch.cat(scheduler.codes, dim=1), tiny["e2e.tokens"])
        assert_close(image, tiny["e2e.image"], atol=3e-4)


def test_it_is_the_compiled_code_that_draws(tiny, monkeypatch):
    pipe = pipeline(tiny)
    seen = []

    def backend(graph, example_inputs):
        return lambda *inputs: seen.append(graph) or graph(*inputs)

    pipe.enable_fast_path(compile_options={"backend": backend})
    seen.clear()
    draw(pipe)
    blocks, scales, steps = len(pipe.transformer.transformer_blocks), len(tiny.scales), 8
    assert len(seen) == blocks * scales + steps + 1  # and the decoder
    pipe.disable_fast_path()
    seen.clear()
    draw(pipe)
    assert not seen


@pytest.fixture
def compiled_blocks(tiny):
    """A backend of torch.compile and the shapes `(rows, tokens)` of the blocks that it has compiled."""
    shapes, width = [], tiny.pipe.transformer.inner_dim

    def backend(graph, example_inputs):
        tensors = [value for value in example_inputs if isinstance(value, torch.Tensor)]
        caches = [tensor for tensor in tensors if tensor.ndim == 4 and tensor.shape[2] > 1]
        if caches:
            shapes.extend(tuple(tensor.shape[:2]) for tensor in tensors if tensor.shape[2:] == (width,))
        return graph

    return backend, shapes


@pytest.mark.parametrize("batch_sizes", [1, (1, 2, 3, 4)])
def test_blocks_are_compiled_once_and_for_about_the_last_scale(tiny, compiled_blocks, batch_sizes):
    backend, shapes = compiled_blocks
    pipeline(tiny).enable_fast_path(batch_sizes=batch_sizes, compile_options={"backend": backend})
    assert tiny.scales[-1] == 6
    assert shapes == [(2, 35)]


def test_blocks_are_compiled_for_the_last_scale_where_guidance_ends_before_it(tiny, compiled_blocks):
    backend, shapes = compiled_blocks
    scheduler = HARTScheduler(schedules=(tiny.scales,), guidance_interval=(0.0, 0.6))
    pipeline(tiny, scheduler=scheduler).enable_fast_path(compile_options={"backend": backend})
    assert shapes == [(2, 35), (1, 35)]  # what is of one row is compiled by itself


def test_what_is_recorded_in_inference_mode_is_compiled_for_the_last_scale(tiny, recorded, compiled_blocks):
    backend, shapes = compiled_blocks
    pipe = recorded(compile_models=True, compile_options={"backend": backend})
    shapes.clear()
    pipe.transformer.fuse_qkv_projections()
    with torch.inference_mode():
        draw(pipe)
    assert shapes == [(2, 35)]


def test_compiled_blocks_of_the_plain_way_serve_several_sizes_and_numbers(tiny, compiled_blocks):
    backend, shapes = compiled_blocks
    sizes = (tiny.scales, tiny.scales[:-1], (*tiny.scales, 8))
    pipe = pipeline(tiny, scheduler=HARTScheduler(schedules=sizes))
    pipe.transformer.compile_repeated_blocks(fullgraph=True, backend=backend)
    for batch_size in (1, 2):
        for scales in sizes:
            height = scales[-1] * pipe.vae_scale_factor
            assert draw(pipe, height=height, num_images_per_prompt=batch_size).isfinite().all()
    assert len(shapes) <= 5


def test_what_is_not_prepared_is_drawn_the_plain_way_with_one_warning(tiny, caplog):
    pipe = pipeline(tiny)
    expected = draw(pipe, ["a red circle", "a star"])
    pipe.enable_fast_path(compile_models=False)
    caplog.clear()
    for _ in range(2):
        assert torch.equal(draw(pipe, ["a red circle", "a star"]), expected)
    assert len(warnings_of(caplog)) == 1
    assert "The fast path was not prepared for 2 picture(s) of 12 px" in warnings_of(caplog)[0]


def test_a_call_within_a_call_goes_the_plain_way(tiny):
    pipe = pipeline(tiny)
    expected = draw(pipe, seed=1)
    pipe.enable_fast_path(compile_models=False)
    inner = []

    def callback(outer, scale_index, side, tensors):
        if scale_index == 2:
            inner.append(draw(pipe, seed=1))
        return {}

    draw(pipe, callback_on_step_end=callback)
    assert torch.allclose(inner[0], expected, atol=1e-5)
    assert torch.allclose(draw(pipe, seed=1), expected, atol=1e-5)  # what was borrowed has been given back


def add_adapter(pipe):
    config = LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipe.transformer.add_adapter(config, "style")


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("change", ["adapter", "fused_projections"])
def test_adapters_and_fused_projections_before_and_after(tiny, change, before):
    def apply(pipe):
        add_adapter(pipe) if change == "adapter" else pipe.transformer.fuse_qkv_projections()

    plain, fast = pipeline(tiny), pipeline(tiny)
    apply(plain)
    if before:
        apply(fast)
    fast.enable_fast_path(compile_options=EAGER)
    if not before:
        draw(fast)
        apply(fast)
    assert torch.allclose(draw(fast), draw(plain), atol=1e-4)
    if change == "adapter" and not before:
        for pipe in (plain, fast):
            pipe.transformer.disable_adapters()
        assert torch.allclose(draw(fast), draw(tiny.pipe), atol=1e-4)
        options = {"attention_kwargs": {"scale": 0.5}}
        for pipe in (plain, fast):
            pipe.transformer.enable_adapters()
        assert torch.allclose(draw(fast, **options), draw(plain, **options), atol=1e-4)


def test_several_sizes_and_numbers_of_a_class_model():
    schedules = ((1, 2, 3, 4, 6), (1, 2, 4))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipe = HARTClassConditionalPipeline(
            HARTTransformer2DModel(
                in_channels=8,
                codebook_size=32,
                num_layers=2,
                num_attention_heads=3,
                attention_head_dim=8,
                caption_channels=None,
                num_classes=3,
                sample_size=6,
            ).eval(),
            HybridTokenizer(
                latent_channels=8, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4, codebook_size=32
            ).eval(),
            HARTScheduler(schedules=schedules),
            ResidualDiffusionMLP(in_channels=8, condition_dim=24, hidden_size=16, num_layers=1).eval(),
            HARTResidualScheduler(),
        )
    pipe.set_progress_bar_config(disable=True)
    cases = [(height, labels) for height in (12, 8) for labels in ([1], [0, 2])]
    expected = [draw(pipe, labels, height=height) for height, labels in cases]
    pipe.enable_fast_path(heights=(12, 8), batch_sizes=(1, 2), compile_options=EAGER)
    with torch.compiler.set_stance("fail_on_recompile"):
        for (height, labels), images in zip(cases, expected):
            assert torch.allclose(draw(pipe, labels, height=height), images, atol=1e-4)


def test_one_warning_where_it_cannot_work(tiny, caplog):
    components = {name: copy.deepcopy(component) for name, component in tiny.pipe.components.items()}
    offloaded = HARTPipeline(**components)
    offloaded.set_progress_bar_config(disable=True)
    cpu_offload(offloaded.transformer, execution_device="cpu")
    offloaded.enable_fast_path(compile_options=EAGER)
    assert [message[:47] for message in warnings_of(caplog)] == ["The fast path needs models that stay on their d"]

    late = HARTPipeline(**{name: copy.deepcopy(component) for name, component in tiny.pipe.components.items()})
    late.set_progress_bar_config(disable=True)
    late.enable_fast_path(cuda_graphs=False, compile_models=False)
    for name in ("text_encoder", "transformer", "residual_mlp", "vae"):
        cpu_offload(getattr(late, name), execution_device="cpu")
    assert torch.allclose(draw(late), draw(tiny.pipe), atol=1e-4)

    def broken(graph, example_inputs):
        raise RuntimeError("no compiler")

    caplog.clear()
    pipe = pipeline(tiny)
    expected = draw(pipe)
    pipe.enable_fast_path(cuda_graphs=False, compile_options={"backend": broken})
    assert len(warnings_of(caplog)) == 1
    assert "not available here" in warnings_of(caplog)[0] and "no compiler" in warnings_of(caplog)[0]
    assert torch.equal(draw(pipe), expected)


def test_bad_arguments(tiny):
    pipe = pipeline(tiny)
    with pytest.raises(ValueError, match="No schedule of scales fits `height`=16"):
        pipe.enable_fast_path(heights=16)
    with pytest.raises(ValueError, match="`batch_sizes` must be positive integers, not .1, 0."):
        pipe.enable_fast_path(batch_sizes=(1, 0))


def test_repeated_blocks_compile_for_all_scales_without_a_fast_path(tiny):
    """Fourteen scales, more than dynamo's limit of recompilations, which with `fullgraph` is an error to reach."""
    scales = tuple(range(1, 15))
    pipe = pipeline(tiny, scheduler=HARTScheduler(schedules=(scales,)))
    expected = draw(pipe, height=28)
    pipe.transformer.compile_repeated_blocks(fullgraph=True, backend="eager")
    assert torch.allclose(draw(pipe, height=28), expected, atol=1e-4)
    with torch.compiler.set_stance("fail_on_recompile"):
        draw(pipe, height=28)


class BothBranches(HARTScheduler):
    def is_guided_from(self, scale_index, num_scales):
        return True


def test_guidance_that_ends_early_saves_the_unconditional_branch(tiny):
    config = {"schedules": (tiny.scales,), "guidance_interval": (0.3, 0.6)}
    saving, whole = (pipeline(tiny, scheduler=kind(**config)) for kind in (HARTScheduler, BothBranches))
    batches = []
    saving.transformer.transformer_blocks[0].register_forward_pre_hook(lambda _, args: batches.append(len(args[0])))
    image = draw(saving, smooth=False)
    assert batches == [2, 2, 2, 1, 1]  # of five scales those up to 0.5 of the way
    assert torch.allclose(image, draw(whole, smooth=False), atol=1e-4)
    assert not torch.allclose(image, draw(tiny.pipe, smooth=False), atol=1e-2)
    saving.enable_fast_path(compile_models=False)
    assert torch.allclose(draw(saving, smooth=False), image, atol=1e-4)


def test_token_pruning(tiny):
    schedule = {"schedules": (tiny.scales,)}
    pruned = pipeline(tiny, scheduler=HARTScheduler(**schedule, kept_fractions=(0.5, 0.25)))
    tokens = []
    pruned.transformer.transformer_blocks[0].register_forward_pre_hook(lambda _, args: tokens.append(args[0].shape[1]))
    image = draw(pruned)
    assert tokens[1:] == [4, 9, 8, 9]  # of 4, 9, 16 and 36
    assert image.isfinite().all() and not torch.equal(image, draw(tiny.pipe))
    pruned.enable_fast_path(compile_models=False)
    assert torch.allclose(draw(pruned), image, atol=1e-3)
    whole = pipeline(tiny, scheduler=HARTScheduler(**schedule, kept_fractions=(1.0, 1.0)))
    assert torch.equal(draw(whole), draw(tiny.pipe))


def test_weights_that_are_written_over_are_those_that_draw(tiny):
    pipe = pipeline(tiny, vae=copy.deepcopy(tiny.pipe.vae))
    pipe.enable_fast_path(compile_options=EAGER)
    before = draw(pipe)
    with torch.no_grad():
        pipe.vae.decoder.conv_out.bias.add_(0.25)
    changed = draw(pipe)
    pipe.disable_fast_path()
    assert torch.allclose(changed, draw(pipe), atol=1e-5)
    assert not torch.allclose(changed, before, atol=0.05)


class RepeatedCall:
    """
    What a recorded call does to memory, without a GPU: the function runs to be recorded and once more each time, reads
    its inputs from places of its own and writes the same tensors again and again.
    """

    made = 0

    def __init__(self, function, inputs, stream, pool, in_place=()):
        RepeatedCall.made += 1
        self.function = function
        self.inputs = {
            name: value
            if name in in_place
            else torch.as_tensor(value, dtype=getattr(value, "dtype", torch.float32)).clone()
            for name, value in inputs.items()
        }
        for _ in range(2):
            self.output = function(**self.inputs)

    def __call__(self, **inputs):
        for name, value in inputs.items():
            self.inputs[name].copy_(torch.as_tensor(value))
        with torch.inference_mode(False), torch.no_grad():  # a graph knows no mode but that of its record
            output = self.function(**self.inputs)
        for place, value in zip(self._tensors(self.output), self._tensors(output)):
            place.copy_(value)
        return self.output

    @staticmethod
    def _tensors(output):
        return (output,) if isinstance(output, torch.Tensor) else output


@pytest.fixture
def recorded(tiny, monkeypatch):
    """A function that makes the pipeline of given components with a fast path of recorded calls."""

    def make(compile_models=False, compile_options=EAGER, **changes):
        pipe = pipeline(tiny, **changes)
        pipe.enable_fast_path(compile_models=compile_models, compile_options=compile_options)
        pipe._fast_path._runs.clear()
        pipe._fast_path.accepts_new = pipe._fast_path.graphs = True
        for batch_size in (1, 2):
            draw(pipe, num_images_per_prompt=batch_size)
        pipe._fast_path.accepts_new = False
        return pipe

    monkeypatch.setattr(fast_path, "RecordedCall", RepeatedCall)
    monkeypatch.setattr(RepeatedCall, "made", 0)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    return make


@pytest.mark.parametrize("options", [{}, {"smooth": False}, {"top_k": 1, "smooth": False}, {"top_p": 0.7}])
def test_recorded_drawing_draws_the_same(tiny, recorded, options):
    pipe = recorded()
    for seed in range(2):
        assert torch.allclose(draw(pipe, seed=seed, **options), draw(tiny.pipe, seed=seed, **options), atol=1e-4)


def test_what_a_callback_keeps_is_not_written_over(recorded):
    pipe, kept = recorded(), []
    draw(pipe, callback_on_step_end=lambda pipe, k, side, tensors: kept.append(tensors["latents"]) or {})
    copies = [latents.clone() for latents in kept]
    draw(pipe, seed=1)
    assert all(map(torch.equal, kept, copies))


def test_calls_record_nothing_more(tiny, recorded):
    pipe = recorded()
    before = RepeatedCall.made
    assert before == 2 * (2 * len(tiny.scales) + 1)  # transformer and drawing of each scale, and the residual MLP
    for k in range(2, 5):
        assert torch.allclose(draw(pipe, top_k=k), draw(tiny.pipe, top_k=k), atol=1e-4)
    assert RepeatedCall.made == before


def test_what_inference_mode_records_serves_other_calls(tiny, recorded):
    pipe = recorded()
    pipe.transformer.fuse_qkv_projections()
    with torch.inference_mode():
        draw(pipe)  # records anew
    assert torch.allclose(draw(pipe), draw(tiny.pipe), atol=1e-4)


def test_decoding_under_autocast_is_not_what_others_get(tiny, recorded):
    pipe = recorded(compile_models=True, vae=copy.deepcopy(tiny.pipe.vae))
    with torch.no_grad():
        pipe.vae.decoder.conv_out.bias.add_(0)  # written over: to be recorded anew
    with torch.autocast("cpu", torch.bfloat16):
        draw(pipe)
    image = draw(pipe)
    assert image.dtype == torch.float32 and torch.allclose(image, draw(tiny.pipe), atol=1e-4)


def test_an_interrupted_preparation_leaves_nothing(tiny, monkeypatch):
    pipe = pipeline(tiny)

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(pipe, "_warm_up", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pipe.enable_fast_path(compile_models=False)
    assert pipe._fast_path is None


def test_drawing_by_another_scheduler_is_not_recorded(tiny, recorded):
    scheduler = RecordingScheduler(schedules=(tiny.scales,))
    scheduler.codes = []
    pipe = recorded(scheduler=scheduler)
    for _ in range(2):
        scheduler.codes.clear()
        draw(pipe)
        assert len(scheduler.codes) == len(tiny.scales)
    pipe = recorded()
    own, before = pipe.scheduler, RepeatedCall.made
    pipe.scheduler = HARTScheduler.from_config(own.config, top_k=1)
    assert torch.allclose(draw(pipe), draw(pipeline(tiny, scheduler=pipe.scheduler)), atol=1e-4)
    pipe.scheduler = own
    assert torch.allclose(draw(pipe), draw(tiny.pipe), atol=1e-4)
    assert RepeatedCall.made == before


def test_recorded_decoding_follows_the_weights(tiny, recorded):
    pipe = recorded(compile_models=True, vae=copy.deepcopy(tiny.pipe.vae))
    before = draw(pipe, num_images_per_prompt=2)
    assert torch.allclose(before, draw(tiny.pipe, num_images_per_prompt=2), atol=1e-4)
    with torch.no_grad():
        pipe.vae.decoder.conv_out.bias.add_(0.25)
    changed = draw(pipe, num_images_per_prompt=2)
    pipe.disable_fast_path()
    assert torch.allclose(changed, draw(pipe, num_images_per_prompt=2), atol=1e-4)
    assert not torch.allclose(changed, before, atol=0.05)


def test_the_picture_that_is_recorded_anew_is_right(recorded):
    """The last scale writes over keys that it has read: running it to record it must not change the picture."""
    pipe = recorded()
    draw(pipe)
    pipe.transformer.fuse_qkv_projections()
    recorded_now = draw(pipe, smooth=False)
    assert torch.equal(recorded_now, draw(pipe, smooth=False))
    pipe.disable_fast_path()
    torch.testing.assert_close(recorded_now, draw(pipe, smooth=False))
