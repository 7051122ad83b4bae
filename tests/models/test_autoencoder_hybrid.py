# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from diffusers_hart import HybridTokenizer
from diffusers_hart.models.autoencoders.autoencoder_hybrid import phi_indices
from diffusers_hart.random_pipeline import random_pipeline


@pytest.mark.parametrize(
    ("num_scales", "expected"),
    [(10, "0011122333"), (14, "00011112222333"), (5, "01223")],
)
def test_phi_is_the_one_with_the_nearest_tick(num_scales, expected):
    assert phi_indices(num_scales, 4) == tuple(int(digit) for digit in expected)
    assert phi_indices(num_scales, 1) == (0,) * num_scales
    assert phi_indices(num_scales, num_scales) == tuple(range(num_scales))


@torch.no_grad()
def test_encode(model, assert_close):
    vae = model.pipe.vae
    encoded = vae.encode(model["tok.image"])
    last_scale = model.scales[-1] ** 2
    last_scale_target = encoded.residual.flatten(2).transpose(1, 2) + vae.embed(encoded.codes[:, -last_scale:])

    assert_close(encoded.latents, model["tok.latent"])
    assert torch.equal(encoded.codes, model["tok.indices"])
    assert_close(last_scale_target, model["tok.last_scale_target"])
    assert_close(encoded.partial_latents[-1] + encoded.residual, model["tok.latent"])


@torch.no_grad()
def test_scale_inputs_from_the_picture_and_from_its_codes(model, assert_close):
    vae = model.pipe.vae
    assert_close(vae.scale_inputs(vae.encode(model["tok.image"]).partial_latents), model["tok.scale_inputs"])
    assert_close(vae.scale_inputs(vae.latents_from_codes(model["tok.indices"])), model["tok.scale_inputs"])


@torch.no_grad()
def test_quantize_as_in_tokenizer_training(model, assert_close):
    _, partial_latents, residual = model.pipe.vae.quantize(model["tok.latent"], phi_at_last_scale=True)
    assert_close(partial_latents[-1], model["tok.discrete_latent_all_phi"])
    assert_close(partial_latents[-1], model["tok.discrete_latent_train"])
    assert_close(partial_latents[-1] + residual, model["tok.hybrid_latent"])


@torch.no_grad()
def test_decode(model, assert_close):
    vae = model.pipe.vae
    assert_close(vae.decoder(vae.post_quant_conv(model["tok.decode_in"])), model["tok.decode_preclamp"])
    assert_close(vae.decode(model["tok.decode_in"]).sample, model["tok.decode_out"])


@torch.no_grad()
def test_slicing_changes_nothing(tiny):
    vae = tiny.pipe.vae
    whole_codes, whole_image = vae.encode(tiny["tok.image"]).codes, vae.decode(tiny["tok.decode_in"]).sample
    vae.enable_slicing()
    batch_sizes = []
    hooks = [
        module.register_forward_hook(lambda module, args, output: batch_sizes.append(len(output)))
        for module in (vae.quant_conv, vae.post_quant_conv)
    ]
    try:
        assert torch.equal(vae.encode(tiny["tok.image"]).codes, whole_codes)
        assert torch.allclose(vae.decode(tiny["tok.decode_in"]).sample, whole_image, atol=1e-5)
        assert batch_sizes == [1, 1, 1, 1]
    finally:
        vae.disable_slicing()
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def test_embedding_weights_mixes_the_vectors_of_codes(tiny):
    vae = tiny.pipe.vae
    codes = torch.tensor([[3, 17]])
    weights = torch.nn.functional.one_hot(codes, vae.config.codebook_size).float()
    assert torch.allclose(vae.embed(weights), vae.embed(codes), atol=1e-6)
    mixed = vae.embed(weights.mean(dim=1, keepdim=True))
    assert torch.allclose(mixed, vae.embed(codes).mean(dim=1, keepdim=True), atol=1e-6)


@torch.no_grad()
def test_the_residual_makes_the_reconstruction_exact_up_to_the_decoder(tiny):
    vae = tiny.pipe.vae
    with_residual = vae(tiny["tok.image"]).sample
    without = vae(tiny["tok.image"], use_residual=False).sample
    assert torch.equal(with_residual, vae.decode(vae.encode(tiny["tok.image"]).latents).sample)
    assert not torch.allclose(with_residual, without, atol=1e-3)


@pytest.mark.parametrize("scales", [(1, 2, 4), (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)])
@torch.no_grad()
def test_other_schedules_than_the_trained_one(tiny, scales):
    vae = tiny.pipe.vae
    side = scales[-1] * vae.spatial_factor
    images = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1
    encoded = vae.encode(images, scales)
    assert encoded.codes.shape == (1, sum(side * side for side in scales))
    assert torch.allclose(vae.latents_from_codes(encoded.codes, scales)[-1], encoded.partial_latents[-1], atol=1e-5)


def test_images_that_fit_no_schedule(tiny):
    with pytest.raises(ValueError, match=r"\(1, 3, 16, 16\).*expected .*12, 12"):
        tiny.pipe.vae.encode(torch.zeros(1, 3, 16, 16))


@torch.no_grad()
def test_codes_and_latents_stay_float32_in_a_half_precision_model(tiny, assert_close):
    vae = HybridTokenizer.from_config(tiny.pipe.vae.config)
    vae.load_state_dict(tiny.pipe.vae.state_dict())
    vae.to(torch.bfloat16)
    encoded = vae.encode(tiny["tok.image"].bfloat16())
    assert encoded.latents.dtype == encoded.residual.dtype == encoded.partial_latents[-1].dtype == torch.float32
    assert vae.embed(encoded.codes).dtype == torch.float32
    assert vae.decode(encoded.latents.bfloat16()).sample.dtype == torch.bfloat16


def test_gradients_reach_codebook_phi_and_encoder(tiny):
    vae = HybridTokenizer.from_config(tiny.pipe.vae.config)
    encoded = vae.encode(tiny["tok.image"])
    (encoded.partial_latents[-1].square().mean() + encoded.residual.square().mean()).backward()
    assert vae.codebook.weight.grad.abs().sum() > 0
    assert all(phi.weight.grad.abs().sum() > 0 for phi in vae.phi[:3])
    assert vae.encoder.conv_in.weight.grad.abs().sum() > 0


@torch.no_grad()
def test_a_picture_of_1024_pixels_is_tiled():
    """Without norms, whose statistics are a tile's, tiles differ from the whole at their edges alone."""
    vae = random_pipeline().vae
    for module in list(vae.decoder.modules()):
        for name, child in module.named_children():
            if isinstance(child, torch.nn.GroupNorm):
                setattr(module, name, torch.nn.Identity())
    coarse = torch.randn(1, 8, 9, 9, generator=torch.Generator().manual_seed(0))
    latents = 4 * torch.nn.functional.interpolate(coarse, size=(64, 64), mode="bicubic")
    whole = vae.decode(latents).sample
    vae.enable_tiling()
    sides = []
    hook = vae.decoder.conv_out.register_forward_hook(lambda module, args, output: sides.append(output.shape[-2:]))
    tiled = vae.decode(latents).sample
    hook.remove()
    assert sides == [(512, 512)] * 9
    difference = (tiled - whole).abs()
    assert 0 < difference.max() < 0.1 * whole.std()
    assert difference[..., :300, :300].max() < 1e-6  # of one tile alone, far from its inner edges
    vae.enable_tiling(tile_sample_min_size=1024, tile_sample_stride=1024)  # in one piece
    assert torch.equal(vae.decode(latents).sample, whole)


@pytest.mark.parametrize(("size", "stride"), [(100, 64), (64, 100), (64, 80), (64, 0), (64, -16)])
def test_tiles_that_leave_gaps(size, stride):
    with pytest.raises(ValueError, match="must be multiples of 16 pixels"):
        random_pipeline().vae.enable_tiling(tile_sample_min_size=size, tile_sample_stride=stride)
