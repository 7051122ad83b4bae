# SPDX-License-Identifier: Apache-2.0
import torch

from diffusers_hart.training.random_draws import draw_per_sample, seeded_generator


def normal(generator):
    return torch.randn(3, generator=generator)


def test_a_generator_is_a_function_of_its_key():
    def draw(*key):
        return normal(seeded_generator("cpu", *key)).tolist()

    assert draw(0, "noise", 1) == draw(0, "noise", 1)
    others = [
        draw(1, "noise", 1),
        draw(0, "codes", 1),
        draw(0, "noise", 2),
        draw(0, "noise", 11),
        draw(0, "noise1", 1),
    ]
    assert all(other != draw(0, "noise", 1) for other in others)


def test_a_sample_draws_the_same_in_every_batch():
    whole = draw_per_sample(normal, "cpu", 0, "noise", range(6))
    assert whole.shape == (6, 3)
    parts = [draw_per_sample(normal, "cpu", 0, "noise", positions) for positions in ([0, 1], [2], [3, 4, 5])]
    assert torch.equal(whole, torch.cat(parts))
    assert torch.equal(whole.flip(0), draw_per_sample(normal, "cpu", 0, "noise", range(5, -1, -1)))


def test_the_global_random_state_is_left_alone():
    state = torch.get_rng_state()
    draw_per_sample(normal, "cpu", 0, "noise", range(6))
    assert torch.equal(state, torch.get_rng_state())
