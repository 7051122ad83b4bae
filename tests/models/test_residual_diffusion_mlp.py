# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from diffusers_hart import HybridTokenizer, ResidualDiffusionMLP


@torch.no_grad()
def test_forward(model, assert_close):
    output = model.pipe.residual_mlp(model["mlp.sample"], model["mlp.timestep"], model["mlp.condition"])
    assert_close(output.sample, model["mlp.out"])


@torch.no_grad()
def test_one_timestep_for_all_tokens_and_any_leading_dimensions(tiny, assert_close):
    sample, condition = tiny["mlp.sample"], tiny["mlp.condition"]
    mlp = tiny.pipe.residual_mlp
    expected = mlp(sample, torch.full((len(sample),), 143), condition).sample
    for timestep in (143, torch.tensor(143), 143.0):
        assert_close(mlp(sample, timestep, condition, return_dict=False)[0], expected, atol=1e-6)
    batched = mlp(sample.unflatten(0, (2, 3)), torch.full((2, 3), 143), condition.unflatten(0, (2, 3))).sample
    assert_close(batched.flatten(0, 1), expected, atol=1e-6)


def test_published_sizes():
    with torch.device("meta"):
        mlp, tokenizer = ResidualDiffusionMLP(), HybridTokenizer()
    assert round(sum(parameter.numel() for parameter in mlp.parameters()) / 1e6, 1) == 36.6
    assert round(sum(parameter.numel() for parameter in tokenizer.parameters()) / 1e6, 1) == 108.9


@torch.no_grad()
def test_a_condition_embedded_beforehand(model):
    mlp, sample, timestep = model.pipe.residual_mlp, model["mlp.sample"], model["mlp.timestep"]
    embeds = mlp.embed_condition(model["mlp.condition"])
    expected = mlp(sample, timestep, model["mlp.condition"]).sample
    assert torch.equal(mlp(sample, timestep, condition_embeds=embeds).sample, expected)
    with pytest.raises(ValueError, match="either `condition` or `condition_embeds`, not neither"):
        mlp(sample, timestep)
    with pytest.raises(ValueError, match="either `condition` or `condition_embeds`, not both"):
        mlp(sample, timestep, model["mlp.condition"], condition_embeds=embeds)
