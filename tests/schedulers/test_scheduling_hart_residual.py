# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler

from diffusers_hart import HARTResidualScheduler


def sample(model, scheduler, **options):
    """The guided sampling of the golden tensors, on tokens `(N, channels)`."""
    mlp, condition = model.pipe.residual_mlp, model["diffsample.condition"]
    guidance = model["diffsample.guidance"].item()
    noisy = model["diffsample.init_noise"]
    for i, timestep in enumerate(scheduler.timesteps):
        output = mlp(torch.cat([noisy, noisy]), timestep, condition).sample
        (conditional, variance), (unconditional, _) = (half.chunk(2, dim=-1) for half in output.chunk(2))
        guided = torch.cat([(1 + guidance) * conditional - guidance * unconditional, variance], dim=-1)
        noise = model["diffsample.step_noise"][i][: len(noisy)]
        noisy = scheduler.step(guided, timestep, noisy, variance_noise=noise, **options).prev_sample
    return noisy * mlp.config.residual_scale


@torch.no_grad()
def test_sampling(model, assert_close):
    scheduler = HARTResidualScheduler()
    scheduler.set_timesteps(8)
    assert torch.equal(scheduler.timesteps, model["diffsample.timesteps"])
    assert torch.equal(scheduler.step_betas, model["diffsample.betas"])
    assert_close(sample(model, scheduler), model["diffsample.out"], atol=3e-4)


@torch.no_grad()
def test_adding_noise(model, assert_close):
    noisy = HARTResidualScheduler().add_noise(model["difftrain.x0"], model["difftrain.noise"], model["mlp.timestep"])
    assert_close(noisy, model["difftrain.x_t"])


def test_temperature_scales_the_noise_of_a_step():
    """Over many draws: the mean does not depend on the temperature, the deviation is proportional to it."""
    scheduler = HARTResidualScheduler()
    scheduler.set_timesteps(8)
    timestep = scheduler.timesteps[2]
    generator = torch.Generator().manual_seed(0)
    noisy, output = torch.full((200_000, 1), 0.3), torch.tensor([[0.2, 0.5]]).expand(200_000, 2)
    mean = scheduler.step(output, timestep, noisy, temperature=0).prev_sample
    assert torch.allclose(mean, mean[:1], atol=1e-6)
    drawn = {t: scheduler.step(output, timestep, noisy, generator, temperature=t).prev_sample for t in (0.5, 1.0)}
    for values in drawn.values():
        assert values.mean() == pytest.approx(mean[0].item(), abs=0.01)
    assert drawn[0.5].std() / drawn[1.0].std() == pytest.approx(0.5, rel=0.01)

    # The learned variance: its logarithm lies at 0.75 between the posterior variance and beta of this chain.
    alphas = scheduler.alphas_cumprod[scheduler.timesteps].double()
    beta = 1 - alphas[2] / alphas[3]
    posterior = beta * (1 - alphas[3]) / (1 - alphas[2])
    expected = (beta.log() * 0.375 + posterior.log() * 0.125).exp()
    assert drawn[1.0].std().item() == pytest.approx(expected.item(), rel=0.01)


@pytest.mark.parametrize("steps", [1, 2, 7, 21, 50, 1000])
def test_timesteps_descend_from_the_last_to_the_first(steps):
    scheduler = HARTResidualScheduler()
    scheduler.set_timesteps(steps)
    timesteps = scheduler.timesteps.tolist()
    assert len(timesteps) == steps and timesteps[-1] == 0
    assert timesteps == sorted(set(timesteps), reverse=True)
    if steps > 1:
        assert timesteps[0] == 999


def test_agrees_with_ddpm_of_diffusers_up_to_its_float32_tables():
    ours, theirs = (
        HARTResidualScheduler(),
        DDPMScheduler.from_config(HARTResidualScheduler().config, variance_type="learned_range"),
    )
    generator = torch.Generator().manual_seed(0)
    ours.set_timesteps(8)
    theirs.set_timesteps(8)
    assert torch.equal(ours.timesteps, theirs.timesteps)
    a = b = torch.randn(64, 4, 3, 3, generator=generator)
    for i, timestep in enumerate(ours.timesteps):
        output = torch.randn(64, 8, 3, 3, generator=generator)
        a = ours.step(output, timestep, a, generator=torch.Generator().manual_seed(i)).prev_sample
        b = theirs.step(output, timestep, b, generator=torch.Generator().manual_seed(i)).prev_sample
    assert torch.allclose(a, b, atol=1e-3)


@pytest.mark.parametrize("other", [DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler])
def test_config_carries_over_and_back_without_the_variance_type(other, caplog):
    swapped = other.from_config(HARTResidualScheduler(clip_sample_range=1.5).config)
    assert swapped.config.get("variance_type") not in ("learned", "learned_range")
    assert torch.allclose(swapped.alphas_cumprod, HARTResidualScheduler().alphas_cumprod, atol=1e-5)
    back = HARTResidualScheduler.from_config(swapped.config)
    assert back.config.clip_sample_range == 1.5
    assert not caplog.records


def test_save_and_load(tmp_path):
    HARTResidualScheduler(clip_sample_range=2.0).save_pretrained(tmp_path)
    assert HARTResidualScheduler.from_pretrained(tmp_path).config.clip_sample_range == 2.0


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_inference_steps": 0}, "between 1 and 1000, not 0"),
        ({"num_inference_steps": 1001}, "between 1 and 1000, not 1001"),
        ({}, "either `num_inference_steps` or `timesteps`"),
        ({"num_inference_steps": 8, "timesteps": [5, 0]}, "either `num_inference_steps` or `timesteps`"),
        ({"timesteps": [0, 5]}, "must descend"),
        ({"timesteps": [1000, 5]}, r"within \[0, 1000\)"),
    ],
)
def test_bad_timesteps(kwargs, message):
    with pytest.raises(ValueError, match=message):
        HARTResidualScheduler().set_timesteps(**kwargs)


def test_bad_step():
    scheduler = HARTResidualScheduler()
    scheduler.set_timesteps(8)
    with pytest.raises(ValueError, match="8 channels in dimension 1 for a sample of 4, not 4"):
        scheduler.step(torch.zeros(2, 4), 999, torch.zeros(2, 4))
    with pytest.raises(ValueError, match="Timestep 998 is not one of"):
        scheduler.step(torch.zeros(2, 8), 998, torch.zeros(2, 4))
    with pytest.raises(ValueError, match="`beta_schedule` must be 'squaredcos_cap_v2'"):
        HARTResidualScheduler(beta_schedule="linear")
