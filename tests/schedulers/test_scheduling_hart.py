# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from diffusers_hart import HARTScheduler


@pytest.fixture
def logits():
    return torch.randn(2, 5, 40, generator=torch.Generator().manual_seed(0)) * 3


@pytest.mark.parametrize("scale_index", [3, 9, 13])
@torch.no_grad()
def test_top_k_and_smoothing_of_a_step(model, assert_close, scale_index):
    scheduler = HARTScheduler()
    masked = scheduler.mask_logits(model["draw.guided_logits"], scale_index)
    assert torch.equal((masked > -torch.inf).sum(-1), model[f"draw.kept_{scale_index}_of_14"])

    weights = scheduler.smooth_weights(masked, model["draw.gumbel"], scale_index, 14)
    assert_close(model.pipe.vae.embed(weights), model[f"draw.embedding_{scale_index}_of_14"])


def test_top_p_alone(model):
    logits = model["draw.guided_logits"]
    masked = HARTScheduler().mask_logits(logits, 0, top_k=logits.shape[-1], top_p=0.9)
    assert torch.equal(masked > -torch.inf, model["draw.kept_top_p_0.9"])


def test_a_step_leaves_its_input_alone(logits):
    before = logits.clone()
    HARTScheduler().step(logits, 3, 14, top_k=4, top_p=0.5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(logits, before)


@pytest.mark.parametrize("options", [{}, {"top_k": 7, "smooth": False}, {"top_k": 1}])
def test_a_step_draws_with_the_noise_it_is_given(logits, options):
    def generator():
        return torch.Generator().manual_seed(0)

    scheduler = HARTScheduler()
    noise = scheduler.draw_noise(logits.shape, logits.device, 3, **options, generator=generator())
    given = scheduler.step(logits, 3, 14, **options, noise=noise)
    drawn = scheduler.step(logits, 3, 14, **options, generator=generator())
    assert torch.equal(given.codes, drawn.codes)
    assert (given.weights is None and drawn.weights is None) or torch.equal(given.weights, drawn.weights)


def test_guidance_ramps_up_and_repeats_itself_at_the_last_scale():
    scheduler = HARTScheduler()
    ramp = [scheduler.guidance(4.5, k, 14) for k in range(14)]
    assert ramp[0] == 0
    assert ramp[12] == ramp[13] == pytest.approx(4.5 * 12 / 13)
    assert all(earlier < later for earlier, later in zip(ramp[:12], ramp[1:13]))
    assert scheduler.guidance(4.5, 0, 1) == 0


def test_schedules():
    scheduler = HARTScheduler()
    assert [len(scheduler.scales(side)) for side in (16, 32, 64)] == [10, 10, 14]
    with pytest.raises(ValueError, match="side 20; known sides: 16, 32, 64"):
        scheduler.scales(20)
    for schedule in ((), (8,), (2, 8), (1, 4, 4)):
        with pytest.raises(ValueError, match="must grow from a scale of side 1"):
            HARTScheduler(schedules=(schedule,))


@pytest.mark.parametrize(("top_k", "top_p"), [(40, 1.0), (7, 1.0), (40, 0.6), (7, 0.6)])
def test_codes_are_drawn_from_the_softmax_of_the_masked_logits(logits, top_k, top_p):
    """Frequencies over many draws against the exact probabilities, which are computed here by another way."""
    draws = 20_000
    row = logits[0, 0]
    order = row.argsort(descending=True)
    probabilities = torch.zeros_like(row)
    best = order[:top_k]
    mass = row[best].softmax(0)
    kept = mass.cumsum(0) - mass < top_p
    probabilities[best[kept]] = row[best[kept]].softmax(0)

    step = HARTScheduler().step(row.expand(1, draws, -1), 0, 14, top_k, top_p, False, torch.Generator().manual_seed(1))
    frequencies = step.codes[0].bincount(minlength=len(row)) / draws
    assert frequencies[probabilities == 0].sum() == 0
    deviation = (probabilities * (1 - probabilities) / draws).sqrt()
    assert ((frequencies - probabilities).abs() <= 5 * deviation + 1e-9).all()
    assert step.weights is None


def test_smoothed_weights_follow_the_gumbel_max_rule(logits):
    """The largest weight falls on code i with the probability of i under `softmax(logits * (1 + ratio))`."""
    draws, scale_index, num_scales = 20_000, 6, 14
    scheduler = HARTScheduler()
    row = logits[1, 2]
    generator = torch.Generator().manual_seed(2)
    weights = scheduler.step(row.expand(1, draws, -1), scale_index, num_scales, generator=generator).weights
    assert torch.allclose(weights.sum(-1), torch.ones(1, draws), atol=1e-4)

    probabilities = (row * (1 + scale_index / 13)).softmax(0)
    frequencies = weights[0].argmax(-1).bincount(minlength=len(row)) / draws
    deviation = (probabilities * (1 - probabilities) / draws).sqrt()
    assert ((frequencies - probabilities).abs() <= 5 * deviation + 1e-3).all()


def test_top_k_of_one_takes_the_best_code(logits):
    step = HARTScheduler().step(logits, 5, 14, top_k=1, smooth=False)
    assert torch.equal(step.codes, logits.argmax(-1))


def test_a_list_of_generators_draws_sample_by_sample(logits):
    scheduler = HARTScheduler()

    def seeded(seed):
        return torch.Generator().manual_seed(seed)

    together = scheduler.step(logits, 4, 14, generator=[seeded(5), seeded(6)])
    for i, seed in enumerate((5, 6)):
        alone = scheduler.step(logits[i : i + 1], 4, 14, generator=[seeded(seed)])
        assert torch.equal(together.codes[i], alone.codes[0])
        assert torch.equal(together.weights[i], alone.weights[0])
    again = scheduler.step(logits, 4, 14, generator=[seeded(5), seeded(6)], return_dict=False)
    assert torch.equal(again[0], together.codes)


def test_without_a_generator_draws_differ_and_with_one_the_global_state_is_left_alone(logits):
    scheduler = HARTScheduler()
    state = torch.get_rng_state()
    scheduler.step(logits, 4, 14, generator=torch.Generator().manual_seed(0))
    assert torch.equal(torch.get_rng_state(), state)
    first, second = (scheduler.step(logits, 4, 14).weights for _ in range(2))
    assert not torch.equal(first, second)


def test_logits_that_are_no_numbers_draw_codes_that_exist(logits):
    codes = HARTScheduler().step(torch.full_like(logits, torch.nan), 3, 14, smooth=False).codes
    assert codes.min() >= 0 and codes.max() < logits.shape[-1]


def test_soft_weights_fall_on_the_codes_of_the_draw_alone(logits):
    step = HARTScheduler().step(logits, 3, 14, top_k=4, generator=torch.Generator().manual_seed(0))
    best = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, logits.topk(4).indices, True)
    assert not step.weights[~best].any()
    assert torch.allclose(step.weights.sum(-1), torch.ones(2, 5))
    assert best.gather(-1, step.codes[..., None]).all()


def test_guidance_within_an_interval():
    scheduler = HARTScheduler(guidance_interval=(0.2, 0.8))
    ramp = [scheduler.guidance(4.5, k, 14) for k in range(14)]
    whole = [HARTScheduler().guidance(4.5, k, 14) for k in range(14)]
    assert [k for k in range(14) if ramp[k]] == list(range(3, 11))
    assert ramp[3:11] == whole[3:11]
    assert [scheduler.is_guided_from(k, 14) for k in (0, 10, 11)] == [True, True, False]


def test_numbers_of_kept_tokens():
    scheduler, scales = HARTScheduler(kept_fractions=(0.5, 0.25)), (1, 2, 3, 4, 6)
    assert [scheduler.num_kept_tokens(k, scales) for k in range(5)] == [None, None, None, 8, 9]
    assert HARTScheduler().num_kept_tokens(4, scales) is None


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"guidance_interval": (0.5, 0.2)}, r"`guidance_interval` must be .start, end. within .0, 1., not .0.5, 0.2."),
        ({"guidance_interval": (0.0, 1.5)}, "`guidance_interval` must be"),
        ({"kept_fractions": (0.5, 0.0)}, r"`kept_fractions` must be above 0 and at most 1, not .0.5, 0.0."),
    ],
)
def test_shares_out_of_range(config, message):
    with pytest.raises(ValueError, match=message):
        HARTScheduler(**config)
