# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from diffusers_hart import HARTPipeline
from diffusers_hart.conversion import load_hart_checkpoint
from diffusers_hart.conversion.comparison import compare, format_comparisons, pipeline_outputs


def condition_of(model) -> torch.Tensor:
    """The residual condition of the recorded generation, which the golden tensors lack; from the scale loop."""
    conditions = []
    hook = model.pipe.transformer.residual_norm.register_forward_hook(lambda _, __, output: conditions.append(output))
    side = model.scales[-1]
    model.pipe(
        prompt_embeds=model["in.prompt_embeds"],
        prompt_attention_mask=model["in.prompt_attention_mask"],
        latents=model["e2e.residual_noise"].transpose(1, 2).unflatten(2, (side, side)),
        guidance_scale=model["e2e.guidance"].item(),
        top_k=1,
        smooth=False,
        residual_temperature=0,
        output_type="latent",
    )
    hook.remove()
    return conditions[0]


def record_of(model) -> dict[str, torch.Tensor]:
    """What the original computed, as the golden tensors have it, under the names of the comparison."""
    side = model.scales[-1]
    codes = model["e2e.tokens"]
    discrete = model.pipe.vae.latents_from_codes(codes, model.scales)[-1].detach()
    return {
        "image": model["tok.image"],
        "tokenizer.latents": model["tok.latent"],
        "tokenizer.codes": model["tok.indices"],
        "tokenizer.last_scale_target": model["tok.last_scale_target"],
        "decoder.latents": model["tok.decode_in"],
        "decoder.image": model["tok.decode_out"],
        "text.embeds": model["in.prompt_embeds"],
        "text.mask": model["in.prompt_attention_mask"],
        "generation.codes": codes,
        "generation.logits": model["e2e.logits"],
        "generation.residual_condition": condition_of(model),
        "residual.sample": model["mlp.sample"],
        "residual.timestep": model["mlp.timestep"],
        "residual.condition": model["mlp.condition"],
        "residual.output": model["mlp.out"],
        "residual.latents": model["e2e.final_latent"] - discrete,
        "picture.noise": model["e2e.residual_noise"].transpose(1, 2).unflatten(2, (side, side)),
        "picture.latents": model["e2e.final_latent"],
        "picture.image": model["e2e.image"],
    }


def test_the_pipeline_agrees_with_the_original(model):
    recorded = record_of(model)
    ours = pipeline_outputs(model.pipe, recorded, model["e2e.guidance"].item())
    rows = compare(recorded, ours)
    inputs = {"image", "decoder.latents", "text.embeds", "text.mask", "picture.noise"}
    inputs |= {"residual.sample", "residual.timestep", "residual.condition"}
    assert {row.name for row in rows} == recorded.keys() - inputs
    assert all(row.passed for row in rows), format_comparisons(rows)
    assert max(row.difference for row in rows) < 3e-4


def test_other_weights_do_not_agree(tiny):
    """The recorded results are of the EMA weights; these are the trained ones."""
    recorded = record_of(tiny)
    components = load_hart_checkpoint(tiny.folder / "original", use_ema=False)
    pipe = HARTPipeline(tokenizer=None, text_encoder=None, **components)
    pipe.set_progress_bar_config(disable=True)
    rows = compare(recorded, pipeline_outputs(pipe, recorded, tiny["e2e.guidance"].item()))
    verdicts = {row.name: row.verdict for row in rows}
    for name in ("generation.logits", "generation.residual_condition", "residual.output", "picture.latents"):
        assert verdicts[name] == "FAIL"
    assert verdicts["tokenizer.codes"] == verdicts["decoder.image"] == "pass"  # the tokenizer has no EMA


def test_each_stage_can_fail():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(4, 100, generator=generator)
    codes = torch.randint(64, (4, 100), generator=generator)
    original = {"values": values, "codes": codes, "picture.image": values}
    (row,) = compare(original, {"values": values + 5e-4})
    assert row.passed and row.difference == pytest.approx(5e-4, rel=1e-2)
    (row,) = compare(original, {"values": values + 5e-3})
    assert not row.passed
    spike = values.clone()
    spike[1, 2] += 0.05
    assert not compare(original, {"values": spike})[0].passed
    assert compare(original, {"values": spike}, torch.float16)[0].passed
    assert compare(original, {"values": spike}, tolerance=0.1)[0].passed
    assert compare(original, {"picture.image": spike})[0].passed  # by the mean
    assert not compare(original, {"picture.image": values + 0.05})[0].passed
    shown_only = compare(original, {"picture.image": values + 0.05}, torch.bfloat16)[0]
    assert shown_only.passed and shown_only.verdict == "not judged"

    changed = codes.clone()
    changed[0, :2] += 1
    (row,) = compare(original, {"codes": changed})
    assert row.difference == 2 / 400 and not row.passed
    assert compare(original, {"codes": changed}, torch.float16)[0].passed


def test_results_that_cannot_be_compared():
    original = {"values": torch.zeros(2, 3)}
    (row,) = compare(original, {"values": torch.zeros(3, 2)})
    assert not row.passed and row.measure == "shape (3, 2), not (2, 3)"
    (row,) = compare(original, {"values": torch.full((2, 3), torch.nan)})
    assert not row.passed
    with pytest.raises(ValueError, match="The original has no results of other"):
        compare(original, {"other": torch.zeros(1)})


def test_the_table():
    original = {"values": torch.zeros(2), "codes": torch.zeros(2, dtype=torch.long), "picture.image": torch.zeros(2)}
    rows = compare(original, {name: tensor + 1 for name, tensor in original.items()}, torch.float16)
    lines = format_comparisons(rows).splitlines()
    assert lines[0].split() == ["stage", "measure", "difference", "tolerance", "verdict"]
    assert [line.split()[0] for line in lines[1:]] == ["values", "codes", "picture.image"]
    assert [line.endswith("FAIL") for line in lines[1:]] == [True, True, False]
