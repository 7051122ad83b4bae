# SPDX-License-Identifier: Apache-2.0
"""Do the original implementation and ours compute the same, stage by stage?"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from ..pipelines import HARTPipeline


# Largest difference allowed, relative to the largest value of the original (or to 1, if that is more).
TOLERANCES = {torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 1e-1}
# Share of codes that may differ: where two are almost equally good, rounding decides.
CODE_TOLERANCES = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 5e-2}
# Here each implementation reads its own earlier results, codes that differ and steps of diffusion, and goes its own way.
# The mean difference still tells one picture from another, but in 16 bits it is no sign of a mistake.
FREE_RUNNING = ("residual.latents", "picture.latents", "picture.image")


@dataclass(frozen=True)
class Comparison:
    """
    One stage, compared.

    Args:
        name (`str`): The stage.
        measure (`str`): How the difference was measured.
        difference (`float`): The difference.
        tolerance (`float`, *optional*): How large it may be; `None` if the difference is shown and not judged.
    """

    name: str
    measure: str
    difference: float
    tolerance: float | None

    @property
    def passed(self) -> bool:
        return self.tolerance is None or self.difference <= self.tolerance  # false for NaN

    @property
    def verdict(self) -> str:
        if self.tolerance is None:
            return "not judged"
        return "pass" if self.passed else "FAIL"


def compare(
    original: Mapping[str, torch.Tensor],
    ours: Mapping[str, torch.Tensor],
    dtype: torch.dtype = torch.float32,
    tolerance: float | None = None,
) -> list[Comparison]:
    r"""
    Compare the results of two implementations.

    Args:
        original (`Mapping[str, torch.Tensor]`): Results of the original, by stage.
        ours (`Mapping[str, torch.Tensor]`): Our results, for all or some of these stages.
        dtype (`torch.dtype`, defaults to `torch.float32`): What was computed in; it decides the tolerances.
        tolerance (`float`, *optional*): Relative tolerance of values, instead of that of the dtype.

    Returns:
        `list[Comparison]`: One for each of our results. A difference in shape is infinite.

    Raises:
        ValueError: If the original has no result of a stage.
    """
    if unknown := [name for name in ours if name not in original]:
        raise ValueError(f"The original has no results of {', '.join(unknown)}.")
    tolerance = TOLERANCES[dtype] if tolerance is None else tolerance
    rows = []
    for name, result in ours.items():
        expected = original[name]
        if result.shape != expected.shape:
            shapes = f"shape {tuple(result.shape)}, not {tuple(expected.shape)}"
            rows.append(Comparison(name, shapes, float("inf"), 0.0))
        elif not expected.is_floating_point():
            share = (result != expected).double().mean().item()
            rows.append(Comparison(name, "share that differs", share, CODE_TOLERANCES[dtype]))
        else:
            expected = expected.double()
            difference = (result.double() - expected).abs()
            allowed = tolerance * max(1.0, expected.abs().max().item())
            if name in FREE_RUNNING:
                allowed = allowed if dtype == torch.float32 else None
                rows.append(Comparison(name, "mean abs difference", difference.mean().item(), allowed))
            else:
                rows.append(Comparison(name, "max abs difference", difference.max().item(), allowed))
    return rows


def format_comparisons(rows: Sequence[Comparison]) -> str:
    """The comparisons as a table in plain text."""
    cells = [("stage", "measure", "difference", "tolerance", "verdict")]
    for row in rows:
        tolerance = "-" if row.tolerance is None else f"{row.tolerance:.3g}"
        cells.append((row.name, row.measure, f"{row.difference:.3g}", tolerance, row.verdict))
    widths = [max(len(line[column]) for line in cells) for column in range(5)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in cells)


@torch.no_grad()
def pipeline_outputs(
    pipe: HARTPipeline,
    original: Mapping[str, torch.Tensor],
    guidance_scale: float,
    prompts: list[str] | None = None,
    system_prompt: str | None = None,
) -> dict[str, torch.Tensor]:
    r"""
    What the pipeline makes of the inputs the original had. Every stage starts from the original's results of the stage
    before, so that one difference is counted once; `picture.*` alone runs from text to picture.

    Args:
        pipe ([`HARTPipeline`]): The converted pipeline.
        original (`Mapping[str, torch.Tensor]`): Inputs and results of the original, `B` pictures of `L` tokens:
            - `image` `(B, 3, H, W)` in [-1, 1]; its `tokenizer.latents` `(B, c, P, P)`, `tokenizer.codes` `(B, L)` and
              `tokenizer.last_scale_target` `(B, P * P, c)`
            - `decoder.latents` `(B, c, P, P)` and `decoder.image` in [-1, 1]
            - `text.embeds` `(B, T, width)` and `text.mask` `(B, T)`
            - greedy generation from that text: `generation.codes` `(B, L)`, guided `generation.logits` `(B, L, V)`
              and, of both branches, `generation.residual_condition` `(2 * B, P * P, C)`
            - `residual.sample` `(N, c)`, `residual.timestep` `(N,)`, `residual.condition` `(N, C)` and
              `residual.output` `(N, 2 * c)`
            - the residual diffusion at temperature 0 from `picture.noise` `(B, c, P, P)`: `residual.latents`, and with
              the codes `picture.latents` and `picture.image` in [0, 1]
        guidance_scale (`float`): The guidance.
        prompts (`list[str]`, *optional*): What `text.embeds` are the embeddings of; without them text is not compared.
        system_prompt (`str`, *optional*): The text that went before these prompts.

    Returns:
        `dict[str, torch.Tensor]`: Our results under the same names, on the CPU.
    """
    device = pipe.transformer.device
    original = {name: tensor.to(device) for name, tensor in original.items()}
    scales = pipe.scheduler.scales(pipe.transformer.config.sample_size)
    ours = {}
    if prompts is not None:
        ours["text.embeds"], ours["text.mask"], _, _ = pipe.encode_prompt(
            prompts, do_classifier_free_guidance=False, system_prompt=system_prompt or ""
        )
    ours |= _tokenizer_outputs(pipe, original, scales)
    ours |= _generation_outputs(pipe, original, scales, guidance_scale)
    ours |= _residual_outputs(pipe, original, scales, guidance_scale)
    ours |= _picture_outputs(pipe, original, guidance_scale)
    return {name: tensor.cpu() for name, tensor in ours.items()}


def _tokenizer_outputs(
    pipe: HARTPipeline, original: Mapping[str, torch.Tensor], scales: tuple[int, ...]
) -> dict[str, torch.Tensor]:
    latents = original["tokenizer.latents"]
    codes, partial_latents, _ = pipe.vae.quantize(latents, scales)
    return {
        "tokenizer.latents": pipe.vae.encode(original["image"].to(pipe.vae.dtype), scales).latents,
        "tokenizer.codes": codes,
        "tokenizer.last_scale_target": (latents - partial_latents[-2]).flatten(2).transpose(1, 2),
        "decoder.image": pipe.vae.decode(original["decoder.latents"].to(pipe.vae.dtype)).sample,
    }


def _generation_outputs(
    pipe: HARTPipeline, original: Mapping[str, torch.Tensor], scales: tuple[int, ...], guidance_scale: float
) -> dict[str, torch.Tensor]:
    dtype, codes = pipe.transformer.dtype, original["generation.codes"]
    embeds, mask, negative_embeds, negative_mask = pipe.encode_prompt(
        None, prompt_embeds=original["text.embeds"], prompt_attention_mask=original["text.mask"]
    )
    inputs = pipe.vae.scale_inputs(pipe.vae.latents_from_codes(codes, scales), scales)
    output = pipe.transformer(
        inputs.to(dtype).repeat(2, 1, 1),
        scales,
        encoder_hidden_states=torch.cat([embeds, negative_embeds]).to(dtype),
        encoder_attention_mask=torch.cat([mask, negative_mask]),
    )
    lengths = [side * side for side in scales]
    guidances = [pipe.scheduler.guidance(guidance_scale, k, len(scales)) for k in range(len(scales))]
    guidance = torch.tensor(guidances).repeat_interleave(torch.tensor(lengths)).to(output.logits.device)[:, None]
    conditional, unconditional = output.logits.chunk(2)
    logits = (1 + guidance) * conditional - guidance * unconditional

    last_codes = pipe.vae.embed(codes[:, -lengths[-1] :]).repeat(2, 1, 1)
    condition = pipe.transformer.residual_condition(output.hidden_states[:, -lengths[-1] :], last_codes)
    return {
        "generation.logits": logits,
        "generation.codes": logits.argmax(-1),
        "generation.residual_condition": condition,
    }


def _residual_outputs(
    pipe: HARTPipeline, original: Mapping[str, torch.Tensor], scales: tuple[int, ...], guidance_scale: float
) -> dict[str, torch.Tensor]:
    dtype = pipe.residual_mlp.dtype
    output = pipe.residual_mlp(
        original["residual.sample"].to(dtype), original["residual.timestep"], original["residual.condition"].to(dtype)
    ).sample
    latents = pipe.sample_residual(
        original["generation.residual_condition"].to(dtype),
        original["picture.noise"],
        guidance=pipe.scheduler.guidance(guidance_scale, len(scales) - 1, len(scales)),
        num_inference_steps=pipe.scheduler.config.num_inference_steps,
        temperature=0,
        generator=None,
    )
    return {"residual.output": output, "residual.latents": latents}


def _picture_outputs(
    pipe: HARTPipeline, original: Mapping[str, torch.Tensor], guidance_scale: float
) -> dict[str, torch.Tensor]:
    latents = pipe(
        prompt_embeds=original["text.embeds"],
        prompt_attention_mask=original["text.mask"],
        latents=original["picture.noise"],
        guidance_scale=guidance_scale,
        top_k=1,
        smooth=False,
        residual_temperature=0,
        output_type="latent",
    ).images
    images = pipe.vae.decode(latents.to(pipe.vae.dtype)).sample
    return {"picture.latents": latents, "picture.image": images.float() / 2 + 0.5}
