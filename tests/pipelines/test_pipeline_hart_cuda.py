# SPDX-License-Identifier: Apache-2.0
"""The pipeline on a CUDA device; run with `pytest -m gpu`."""

import copy

import pytest
import torch

from diffusers_hart import HARTPipeline, HARTScheduler, HybridTokenizer
from diffusers_hart.models.autoencoders import large_picture_layers
from diffusers_hart.models.autoencoders.large_picture_layers import HybridTokenizerGroupNorm, group_norm_by_channels


pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def pipe(tiny):
    components = {name: copy.deepcopy(component) for name, component in tiny.pipe.components.items()}
    pipe = HARTPipeline(**components).to("cuda")
    pipe.set_progress_bar_config(disable=True)
    return pipe


class RecordingScheduler(HARTScheduler):
    def step(self, *args, **kwargs):
        output = super().step(*args, **kwargs)
        self.codes.append(output.codes)
        return output


def test_float32_gives_the_tokens_and_the_picture_of_the_original(pipe, tiny, monkeypatch):
    scheduler = pipe.scheduler
    pipe.scheduler = RecordingScheduler(schedules=(tiny.scales,))
    pipe.scheduler.codes = []
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # torch's default rounds convolutions to ten bits
    image = pipe(
        prompt_embeds=tiny["in.prompt_embeds"].cuda(),
        prompt_attention_mask=tiny["in.prompt_attention_mask"].cuda(),
        guidance_scale=tiny["e2e.guidance"].item(),
        latents=tiny["e2e.residual_noise"].transpose(1, 2).unflatten(2, (6, 6)),
        top_k=1,
        smooth=False,
        residual_temperature=0,
        output_type="pt",
    ).images
    codes, pipe.scheduler = pipe.scheduler.codes, scheduler
    assert torch.equal(torch.cat(codes, dim=1).cpu(), tiny["e2e.tokens"])
    assert torch.allclose(image.cpu(), tiny["e2e.image"], atol=1e-3)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("listed", [False, True])
def test_generators_of_either_device_repeat_themselves(pipe, device, listed):
    def draw(seed):
        generator = torch.Generator(device).manual_seed(seed)
        return pipe("a red circle", generator=[generator] if listed else generator, output_type="pt").images

    assert torch.equal(draw(0), draw(0))
    assert not torch.equal(draw(0), draw(1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(tiny, tmp_path, dtype):
    tiny.pipe.save_pretrained(tmp_path)
    pipe = HARTPipeline.from_pretrained(tmp_path, dtype=dtype).to("cuda")
    pipe.set_progress_bar_config(disable=True)
    image = pipe("a red circle", generator=torch.Generator("cuda").manual_seed(0), output_type="pt").images
    assert image.dtype == dtype and image.isfinite().all()


def test_model_offload_gives_the_same_picture(tiny, pipe):
    def draw(pipe):
        return pipe("a red circle", generator=torch.Generator("cpu").manual_seed(0), output_type="pt").images.cpu()

    expected = draw(pipe)
    components = {name: copy.deepcopy(component) for name, component in tiny.pipe.components.items()}
    for enable in ("enable_model_cpu_offload", "enable_sequential_cpu_offload"):
        offloaded = HARTPipeline(**copy.deepcopy(components))
        offloaded.set_progress_bar_config(disable=True)
        getattr(offloaded, enable)()
        assert torch.allclose(draw(offloaded), expected, atol=1e-3)


def test_blocks_compile_as_one_graph_and_not_anew_for_a_second_picture(tiny):
    transformer = copy.deepcopy(tiny.pipe.transformer).cuda()
    arguments = (
        tiny["tok.scale_inputs"].cuda(),
        tiny.scales,
        tiny["in.prompt_embeds"].cuda(),
        tiny["in.prompt_attention_mask"].cuda(),
    )
    with torch.no_grad():
        expected = transformer(*arguments).logits
        transformer.compile_repeated_blocks(fullgraph=True)
        assert torch.allclose(transformer(*arguments).logits, expected, atol=1e-3)
        with torch.compiler.set_stance("fail_on_recompile"):
            transformer(*arguments)


def on_cpu_noise(pipe, **options):
    generator = torch.Generator("cpu").manual_seed(0)
    return pipe("a red circle", generator=generator, output_type="pt", smooth=False, **options).images.cpu()


def copy_of(tiny):
    copied = HARTPipeline(**{name: copy.deepcopy(component) for name, component in tiny.pipe.components.items()})
    copied.set_progress_bar_config(disable=True)
    return copied


@pytest.mark.parametrize("use_stream", [False, True])
@pytest.mark.parametrize("offload_type", ["block_level", "leaf_level"])
def test_group_offload_gives_the_same_picture(tiny, pipe, offload_type, use_stream):
    expected = on_cpu_noise(pipe)
    offloaded = copy_of(tiny)
    offloaded.enable_group_offload(
        torch.device("cuda"), offload_type=offload_type, num_blocks_per_group=1, use_stream=use_stream
    )
    for _ in range(2):
        assert torch.allclose(on_cpu_noise(offloaded), expected, atol=1e-3)


def test_model_offload_moves_nothing_between_scales(tiny):
    offloaded = copy_of(tiny)
    offloaded.enable_model_cpu_offload()
    devices = []

    def note(pipe, scale_index, side, tensors):
        devices.append([next(model.parameters()).device.type for model in (pipe.transformer, pipe.vae)])
        return {}

    on_cpu_noise(offloaded, callback_on_step_end=note)
    assert devices[:-1] == [["cuda", "cuda"]] * (len(devices) - 1)


def test_a_failed_call_leaves_nothing_on_the_device(tiny):
    offloaded = copy_of(tiny)
    offloaded.enable_model_cpu_offload()
    expected = on_cpu_noise(offloaded)

    def fail(pipe, scale_index, side, tensors):
        raise torch.OutOfMemoryError("by the callback")

    with pytest.raises(torch.OutOfMemoryError, match="by the callback"):
        on_cpu_noise(offloaded, callback_on_step_end=fail)
    for name in ("text_encoder", "transformer", "residual_mlp", "vae"):
        assert next(getattr(offloaded, name).parameters()).device.type == "cpu"
    assert torch.allclose(on_cpu_noise(offloaded), expected, atol=1e-3)


def test_a_device_map_gives_the_same_picture(tiny, pipe, tmp_path):
    tiny.pipe.save_pretrained(tmp_path)
    for device_map in ("cuda", "balanced"):
        mapped = HARTPipeline.from_pretrained(tmp_path, device_map=device_map)
        mapped.set_progress_bar_config(disable=True)
        assert torch.allclose(on_cpu_noise(mapped), on_cpu_noise(pipe), atol=1e-3)


def test_float8_storage_saves_memory_and_draws(tiny):
    stored = copy_of(tiny)
    before = stored.transformer.get_memory_footprint()
    stored.transformer.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    assert stored.transformer.get_memory_footprint() < before
    assert on_cpu_noise(stored.to("cuda")).isfinite().all()


def copied(tiny, **changes):
    pipe = HARTPipeline(**{**{name: copy.deepcopy(part) for name, part in tiny.pipe.components.items()}, **changes})
    pipe.set_progress_bar_config(disable=True)
    return pipe.to("cuda")


def golden_arguments(tiny):
    return {
        "prompt_embeds": tiny["in.prompt_embeds"].cuda(),
        "prompt_attention_mask": tiny["in.prompt_attention_mask"].cuda(),
        "guidance_scale": tiny["e2e.guidance"].item(),
        "latents": tiny["e2e.residual_noise"].transpose(1, 2).unflatten(2, (6, 6)),
        "top_k": 1,
        "smooth": False,
        "residual_temperature": 0,
        "output_type": "pt",
    }


@pytest.mark.parametrize("options", [{"compile_models": False}, {}])
def test_the_fast_path_gives_the_tokens_and_the_picture_of_the_original(tiny, monkeypatch, options):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    scheduler = RecordingScheduler(schedules=(tiny.scales,))
    pipe = copied(tiny, scheduler=scheduler)
    scheduler.codes = []
    arguments = golden_arguments(tiny)
    batch_size, tokens = arguments["prompt_embeds"].shape[:2]
    pipe.enable_fast_path(batch_sizes=batch_size, max_sequence_length=tokens, **options)
    assert pipe._fast_path is not None
    for prompt_embeds in (torch.randn_like(arguments["prompt_embeds"]), arguments["prompt_embeds"]):
        scheduler.codes.clear()
        with torch.compiler.set_stance("fail_on_recompile"):
            image = pipe(**{**arguments, "prompt_embeds": prompt_embeds}).images
    assert torch.equal(torch.cat(scheduler.codes, dim=1).cpu(), tiny["e2e.tokens"])
    assert torch.allclose(image.cpu(), tiny["e2e.image"], atol=1e-3)


@pytest.mark.parametrize("compile_models", [False, True])
def test_recorded_drawing_and_decoding_give_the_plain_picture(tiny, monkeypatch, compile_models):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    plain, fast = copied(tiny), copied(tiny)
    fast.enable_fast_path(compile_models=compile_models)
    for seed in range(3):
        # Smoothing divides by a small temperature, which amplifies rounding.
        pictures = [
            pipe("a red circle", generator=torch.Generator("cuda").manual_seed(seed), output_type="pt").images
            for pipe in (plain, fast)
        ]
        assert torch.allclose(*pictures, atol=0.02)


def test_recorded_graphs_follow_adapters_and_early_ends_of_guidance(tiny):
    config = {"schedules": (tiny.scales,), "guidance_interval": (0.0, 0.6), "kept_fractions": (0.5, 0.5)}
    plain, fast = (copied(tiny, scheduler=HARTScheduler(**config)) for _ in range(2))
    fast.enable_fast_path(compile_models=False)

    def draw(pipe):
        generator = torch.Generator("cuda").manual_seed(0)
        return pipe("a red circle", generator=generator, output_type="pt", smooth=False).images

    for _ in range(2):
        assert torch.allclose(draw(fast), draw(plain), atol=1e-3)
    for pipe in (plain, fast):
        pipe.transformer.fuse_qkv_projections()
    assert torch.allclose(draw(fast), draw(plain), atol=1e-3)


@pytest.mark.parametrize("fast", [False, True])
def test_nothing_waits_for_the_device_between_the_prompt_and_the_picture(tiny, fast, monkeypatch):
    pipe = copied(tiny)
    # Whether embeddings that are given are finite is waited for.
    monkeypatch.setattr(pipe, "check_inputs", lambda *args, **kwargs: None)
    arguments = golden_arguments(tiny) | {"top_k": None, "smooth": True, "residual_temperature": 1.0}
    del arguments["latents"]
    if fast:
        batch_size, tokens = arguments["prompt_embeds"].shape[:2]
        pipe.enable_fast_path(batch_sizes=batch_size, max_sequence_length=tokens, compile_models=False)
    generator = torch.Generator("cuda").manual_seed(0)
    pipe(**arguments, generator=generator)  # tables that are kept are made here
    torch.cuda.set_sync_debug_mode("error")
    try:
        pipe(**arguments, generator=generator)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.fixture
def norms_by_channels(monkeypatch):
    """Shapes of what was normalized by channels."""
    shapes = []

    def recording(hidden_states, *arguments):
        shapes.append(tuple(hidden_states.shape))
        return group_norm_by_channels(hidden_states, *arguments)

    monkeypatch.setattr(large_picture_layers, "group_norm_by_channels", recording)
    return shapes


@pytest.mark.parametrize("batch_size", [1, 2])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@torch.no_grad()
def test_group_norm_of_large_pictures(batch_size, layout, dtype, norms_by_channels):
    norm = HybridTokenizerGroupNorm(32, 64).to("cuda", dtype)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    hidden_states = (3 * torch.randn(batch_size, 64, 256, 256, device="cuda") + 2).to(dtype)
    hidden_states = hidden_states.contiguous(memory_format=layout)
    expected = torch.nn.functional.group_norm(
        hidden_states.double(), 32, norm.weight.double(), norm.bias.double(), 1e-5
    )
    result = norm(hidden_states)
    assert len(norms_by_channels) == (dtype != torch.float32)
    assert torch.allclose(result.double(), expected, rtol=0.01, atol=0.05)


@torch.no_grad()
def test_large_pictures_are_decoded_as_with_plain_group_norms(monkeypatch, norms_by_channels):
    torch.manual_seed(0)
    vae = HybridTokenizer(block_out_channels=(32, 32, 64), layers_per_block=1, codebook_size=16).eval()
    vae = vae.to("cuda", torch.bfloat16)
    latents = torch.randn(2, 32, 64, 64, device="cuda", dtype=torch.bfloat16)
    decoded = vae.decode(latents).sample
    assert norms_by_channels
    monkeypatch.setattr(HybridTokenizerGroupNorm, "forward", torch.nn.GroupNorm.forward)
    assert torch.allclose(decoded, vae.decode(latents).sample, atol=0.1)
