# SPDX-License-Identifier: Apache-2.0
import sys

import pytest
import torch
from safetensors.torch import load_file

from diffusers_hart import HybridTokenizer
from diffusers_hart.training.adversarial_loss import AdversarialLoss, adaptive_weight
from diffusers_hart.training.codebook_usage import CodebookUsage
from diffusers_hart.training.patch_discriminator import PatchDiscriminator
from diffusers_hart.training.perceptual_loss import load_perceptual_loss
from diffusers_hart.training.random_draws import seeded_generator
from diffusers_hart.training.tokenizer_training import (
    TokenizerPhase,
    TokenizerTrainingModule,
    parse_phases,
    phase_of_step,
    quantize_for_training,
)


SCALES = (1, 2, 4, 8)


@pytest.fixture(autouse=True)
def one_thread():
    """Tensors this small are slower with more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def vae() -> HybridTokenizer:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return HybridTokenizer(
            latent_channels=8,
            block_out_channels=(16, 32),
            layers_per_block=1,
            norm_num_groups=8,
            codebook_size=64,
            scales=SCALES,
        )


@pytest.fixture
def adversarial_loss() -> AdversarialLoss:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AdversarialLoss(PatchDiscriminator(base_channels=8, num_layers=2))


@pytest.fixture
def images() -> torch.Tensor:
    coarse = torch.rand(4, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return torch.nn.functional.interpolate(coarse, size=16, mode="bilinear")


def test_the_decoder_is_trained_with_the_original_latents_and_loss(model, assert_close):
    latents = model["tok.latent"].clone().requires_grad_()
    for use_residual, name in ((False, "tok.discrete_latent_train"), (True, "tok.hybrid_latent")):
        quantized = quantize_for_training(model.pipe.vae, latents, use_residual=use_residual)
        assert_close(quantized.decoder_latents.detach(), model[name])
        assert_close(quantized.vq_loss.detach()[None], model["tok.vq_loss"])
        (gradient,) = torch.autograd.grad(quantized.decoder_latents.sum(), latents)
        assert torch.equal(gradient, torch.ones_like(latents))


@torch.no_grad()
def test_scale_residuals_are_what_the_codes_are_nearest_to(tiny):
    vae = tiny.pipe.vae
    quantized = quantize_for_training(vae, tiny["tok.latent"])
    distances = torch.cdist(quantized.scale_residuals, vae.codebook.weight[None])
    assert torch.equal(distances.argmin(-1), quantized.codes)


def test_phases():
    phases = parse_phases("continuous:3, discrete:2,alternating:1")
    assert phases == (("continuous", 3), ("discrete", 2), ("alternating", 1))
    assert [phase_of_step(phases, step)[0] for step in range(8)] == list("cccddaaa")
    assert phase_of_step([TokenizerPhase("discrete", 2)], 1) == "discrete"


@pytest.mark.parametrize("text", ["", "discrete", "discrete:", "discrete:0", "discrete:-1", "other:3", "discrete:1;"])
def test_what_is_no_phase(text):
    with pytest.raises(ValueError, match="is not a phase: expected .*continuous, discrete, joint, alternating"):
        parse_phases(text)


@pytest.mark.parametrize(
    ("phase", "parts"),
    [
        ("continuous", {"encoder", "quant_conv", "post_quant_conv", "decoder"}),
        ("discrete", {"encoder", "quant_conv", "codebook", "phi", "post_quant_conv", "decoder"}),
        ("joint", {"encoder", "quant_conv", "codebook", "phi", "post_quant_conv", "decoder"}),
        ("alternating", {"post_quant_conv", "decoder"}),
    ],
)
def test_gradients_reach_what_the_phase_trains_and_nothing_else(vae, adversarial_loss, images, phase, parts):
    training = TokenizerTrainingModule(vae)
    training.set_phase(phase)
    losses, details = training(images, 0, adversarial_loss=adversarial_loss)
    losses["loss"].backward()
    for name, parameter in vae.named_parameters():
        if name.split(".")[0] in parts:
            assert parameter.grad.abs().sum() > 0, name
        else:
            assert parameter.grad is None, name
    assert all(parameter.grad is None for parameter in adversarial_loss.parameters())

    vae.zero_grad()
    adversarial_loss(images, details["reconstructions"])["discriminator_loss"].backward()
    assert all(parameter.grad is None for parameter in vae.parameters())
    *parameters, last_bias = adversarial_loss.parameters()
    assert all(parameter.grad.abs().sum() > 0 for parameter in parameters)
    assert last_bias.grad == 0  # real and fake patches pull it apart until the first are past the hinge


def test_a_phase_that_was_frozen_goes_on(vae, images):
    training = TokenizerTrainingModule(vae)
    for phase in ("alternating", "discrete"):
        training.set_phase(phase)
        training(images, 0)[0]["loss"].backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in vae.parameters())


def test_alternating_is_decided_by_seed_and_step(vae):
    training, other = TokenizerTrainingModule(vae), TokenizerTrainingModule(vae, seed=1)
    training.set_phase("alternating")
    other.set_phase("alternating")
    decisions = [training.uses_residual(step) for step in range(400)]
    assert decisions == [training.uses_residual(step) for step in range(400)]
    assert decisions != [other.uses_residual(step) for step in range(400)]
    assert 160 < sum(decisions) < 240
    for probability, share in ((0.0, 400), (1.0, 0)):
        training.discrete_probability = probability
        assert sum(training.uses_residual(step) for step in range(400)) == share


def test_what_the_decoder_gets(vae, images):
    training = TokenizerTrainingModule(vae, seed=3)
    with torch.no_grad():
        latents = vae.quant_conv(vae.encoder(images))
        discrete = quantize_for_training(vae, latents).decoder_latents
        decoded = {name: vae.decoder(vae.post_quant_conv(x)) for name, x in (("c", latents), ("d", discrete))}
    assert not torch.allclose(decoded["c"], decoded["d"], atol=1e-3)

    seen = ""
    for phase, steps in (("continuous", 1), ("discrete", 1), ("alternating", 8)):
        training.set_phase(phase)
        for step in range(steps):
            expected = "c" if training.uses_residual(step) else "d"
            seen += expected
            losses, details = training(images, step)
            assert torch.allclose(details["reconstructions"], decoded[expected], atol=1e-5)
            expected_loss = torch.nn.functional.mse_loss(decoded[expected], images)
            if phase == "discrete":
                expected_loss = expected_loss + losses["vq_loss"]
            assert torch.allclose(losses["loss"], expected_loss, atol=1e-5)
    assert seen[:2] == "cd" and set(seen[2:]) == {"c", "d"}


class Contrast(torch.nn.Module):
    """A distance that sees nothing but the mean; one a pair, as LPIPS gives it."""

    def forward(self, reconstructions, images):
        return (reconstructions - images).mean((1, 2, 3), keepdim=True).square()


def test_the_weights_of_the_losses(vae, adversarial_loss, images):
    options = {"mse_weight": 2.0, "l1_weight": 3.0, "vq_weight": 5.0, "perceptual_weight": 7.0}
    training = TokenizerTrainingModule(
        vae, **options, adversarial_weight=11.0, adaptive_adversarial_weight=False, commitment_weight=0.0
    )
    losses, details = training(images, 0, perceptual_loss=Contrast(), adversarial_loss=adversarial_loss)
    assert losses["generator_weight"] == 11
    weighted = {"mse": 2, "l1": 3, "vq": 5, "perceptual": 7, "generator": 11}
    total = sum(weight * losses[f"{name}_loss"] for name, weight in weighted.items())
    assert torch.allclose(losses["loss"], total)
    assert torch.allclose(losses["perceptual_loss"], Contrast()(details["reconstructions"], images).mean())
    assert all(losses[f"{name}_loss"] != 0 for name in weighted)

    uncommitted = losses["vq_loss"]
    training.commitment_weight = 0.25
    assert torch.allclose(training(images, 0)[0]["vq_loss"], 1.25 * uncommitted)  # both terms have the same value


def test_the_adaptive_weight_makes_both_losses_pull_equally(vae, adversarial_loss, images):
    training = TokenizerTrainingModule(vae, adversarial_weight=0.5)
    losses, _ = training(images, 0, adversarial_loss=adversarial_loss)
    reconstructions = vae.decoder(
        vae.post_quant_conv(quantize_for_training(vae, vae.quant_conv(vae.encoder(images)))[0])
    )
    last_layer = vae.decoder.conv_out.weight
    norms = [
        torch.autograd.grad(loss, last_layer, retain_graph=True)[0].norm()
        for loss in (
            torch.nn.functional.mse_loss(reconstructions, images),
            adversarial_loss.generator_loss(reconstructions),
        )
    ]
    assert torch.allclose(losses["generator_weight"] * norms[1], 0.5 * norms[0], rtol=5e-3)

    weight = torch.ones(2, requires_grad=True)
    assert adaptive_weight(weight.sum() * 1e9, weight.sum() * 1e-9, weight) == 1e4


def test_the_discriminator_is_laid_out_like_the_original(golden):
    original = load_file(golden / "t2i_tiny" / "original" / "tokenizer" / "model.safetensors")
    shapes = {name.removeprefix("disc."): x.shape for name, x in original.items() if name.startswith("disc.")}
    # The fixture is without the large weights.
    widths = {"main.0": (64, 3), "main.2": (128, 64), "main.5": (256, 128), "main.8": (512, 256), "main.11": (1, 512)}
    shapes |= {f"{layer}.weight": (*width, 4, 4) for layer, width in widths.items()}
    discriminator = PatchDiscriminator()
    assert {name: x.shape for name, x in discriminator.state_dict().items()} == shapes
    assert discriminator(torch.zeros(2, 3, 32, 32)).shape == (2, 1, 2, 2)
    side = discriminator.smallest_side
    assert discriminator(torch.zeros(2, 3, side, side)).shape == (2, 1, 1, 1)


def test_the_discriminator_starts_small(adversarial_loss):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        main = PatchDiscriminator().main
    for layer in (main[0], main[2], main[5], main[8], main[11]):
        assert abs(layer.weight.std().item() - 0.02) < 1e-3 and abs(layer.weight.mean().item()) < 1e-3
    for layer in (main[3], main[6], main[9]):
        assert abs(layer.weight.mean().item() - 1) < 0.01 and layer.bias.abs().max() == 0


def test_hinge_loss():
    class Mean(torch.nn.Module):
        def forward(self, images):
            return images.mean((1, 2, 3), keepdim=True)

    loss = AdversarialLoss(Mean())
    for real, fake, expected in ((2.0, -2.0, 0.0), (0.0, 0.0, 1.0), (-1.0, 3.0, 3.0), (0.5, -3.0, 0.25)):
        images = torch.full((2, 3, 4, 4), real)
        reconstructions = torch.full((2, 3, 4, 4), fake, requires_grad=True)
        losses = loss(images, reconstructions)
        assert not losses["discriminator_loss"].requires_grad
        assert losses["discriminator_loss"].item() == pytest.approx(expected)
        assert losses["real_logit"] == real and losses["fake_logit"] == fake
        assert loss.generator_loss(reconstructions).item() == pytest.approx(-fake)


def test_a_perceptual_loss_without_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(ImportError, match="pip install lpips.*weight to 0"):
        load_perceptual_loss()


def test_usage_is_reported_per_scale_and_window():
    usage = CodebookUsage(8, (1, 2))
    usage.update(torch.tensor([[0, 1, 1, 2, 2], [0, 1, 3, 2, 4]]))
    usage.update(torch.tensor([[5, 1, 1, 1, 1]]))
    assert usage.report() == {"codebook_usage/1x1": 2 / 8, "codebook_usage/2x2": 4 / 8}
    usage.update(torch.tensor([[5, 1, 1, 1, 1]]))
    assert usage.report() == {"codebook_usage/1x1": 1 / 8, "codebook_usage/2x2": 1 / 8}
    assert usage.unused_steps.tolist() == [2, 0, 2, 2, 2, 0, 3, 3]

    restored = CodebookUsage(8, (1, 2))
    restored.load_state_dict(usage.state_dict())
    assert torch.equal(restored.unused_steps, usage.unused_steps)


def test_unused_codes_become_what_the_scales_were_asked_for():
    def restart(seed, steps):
        usage, codebook = CodebookUsage(8, (1, 2)), torch.nn.Embedding.from_pretrained(torch.zeros(8, 3), freeze=False)
        usage.update(torch.tensor([[0, 1, 1, 1, 1], [0, 1, 1, 1, 1]]))
        usage.update(torch.tensor([[0, 2, 2, 2, 2], [0, 2, 2, 2, 2]]))
        residuals = torch.arange(1.0, 31.0).view(2, 5, 3)
        count = usage.restart(codebook, residuals, steps, seeded_generator("cpu", seed))
        return count, codebook.weight.detach(), usage, residuals

    count, weight, usage, residuals = restart(0, steps=2)
    assert count == 5 and (weight[:3] == 0).all()
    assert usage.unused_steps.tolist() == [0, 1, 0, 0, 0, 0, 0, 0]
    assert len(weight[3:].unique(dim=0)) == 5
    places = (weight[3:, None] == residuals.flatten(0, 1)).all(-1).nonzero()[:, 1]
    assert len(places) == 5
    assert {0, 5} < set(places.tolist())  # both vectors of the coarse scale, which has fewer
    assert torch.equal(restart(0, steps=2)[1], weight)
    assert not torch.equal(restart(1, steps=2)[1], weight)
    assert restart(0, steps=3)[0] == 0
    assert restart(0, steps=1)[0] == 6


def test_no_more_codes_are_restarted_than_there_are_vectors():
    usage, codebook = CodebookUsage(8, (1,)), torch.nn.Embedding.from_pretrained(torch.zeros(8, 3), freeze=False)
    usage.update(torch.zeros(2, 1, dtype=torch.long))
    assert usage.restart(codebook, torch.ones(2, 1, 3), 1, seeded_generator("cpu", 0)) == 2
    assert (codebook.weight.detach().sum(1) == 3).sum() == 2


def test_restarts_undo_a_collapsed_codebook(vae, images):
    def train(restart_after):
        tokenizer = HybridTokenizer.from_config(vae.config)
        tokenizer.load_state_dict(vae.state_dict())
        with torch.no_grad():
            tokenizer.codebook.weight[1:].add_(100)  # only one code is anywhere near the latents
        training, usage = TokenizerTrainingModule(tokenizer), CodebookUsage(64, SCALES)
        optimizer = torch.optim.AdamW(tokenizer.parameters(), lr=2e-3, weight_decay=0)
        for step in range(30):
            losses, details = training(images, step)
            losses["loss"].backward()
            optimizer.step()
            optimizer.zero_grad()
            usage.update(details["codes"])
            if step == 19:
                usage.report()
            if restart_after:
                draws = seeded_generator("cpu", 0, "codebook restart", step)
                usage.restart(tokenizer.codebook, details["scale_residuals"], restart_after, draws)
        return usage.report(), losses["vq_loss"].item()

    naive, naive_loss = train(None)
    restarted, restarted_loss = train(3)
    assert set(naive.values()) == {1 / 64}
    assert restarted["codebook_usage/1x1"] > 0.05
    assert restarted["codebook_usage/8x8"] > 0.5
    assert restarted_loss < 0.5 * naive_loss


@torch.no_grad()
def test_quantization_stays_float32_under_autocast(tiny):
    vae = tiny.pipe.vae
    weights = torch.rand(2, 5, vae.config.codebook_size, generator=torch.Generator().manual_seed(0))
    expected = *quantize_for_training(vae, tiny["tok.latent"]), vae.embed(weights)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = *quantize_for_training(vae, tiny["tok.latent"]), vae.embed(weights)
    for value, reference in zip(actual, expected):
        assert value.dtype == reference.dtype
        assert torch.equal(value, reference)


def test_training_in_bfloat16_gives_float32_losses(vae, adversarial_loss, images):
    training = TokenizerTrainingModule(vae)
    reference, _ = training(images, 0, adversarial_loss=adversarial_loss)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses, details = training(images, 0, adversarial_loss=adversarial_loss)
    losses["loss"].backward()
    assert details["reconstructions"].dtype == torch.float32
    assert all(loss.dtype == torch.float32 for loss in losses.values())
    assert torch.allclose(losses["mse_loss"], reference["mse_loss"], rtol=0.02)
    assert all(torch.isfinite(parameter.grad).all() for parameter in vae.parameters())
