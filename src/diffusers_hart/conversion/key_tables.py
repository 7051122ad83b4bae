# SPDX-License-Identifier: Apache-2.0
"""Which parameter of the original checkpoint is which of ours: one table a model, read in both directions."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from diffusers.utils import logging

from ..models import HARTTransformer2DModel, HybridTokenizer, ResidualDiffusionMLP


logger = logging.get_logger(__name__)

# What an original checkpoint holds besides the model: constants, statistics of training, and the discriminator.
NOT_OF_THE_MODEL = re.compile(
    r"lvl_1L|attn_bias_for_masking|blocks\.\d+\.attn\.zero_k_bias|vae\.quantize\.ema_vocab_hit_SV|disc\..*"
)


@dataclass(frozen=True)
class Row:
    """
    One tensor of the original checkpoint and where it goes.

    Args:
        original (`str`): Its name there.
        ours (`tuple[str, ...]`): Our parameters, more than one where the original has them joined along dimension 0.
        leading (`int`): Number of dimensions of size one that the original has before ours.
        trailing (`int`): The same, after ours.
    """

    original: str
    ours: tuple[str, ...]
    leading: int = 0
    trailing: int = 0

    def original_shape(self, shapes: Mapping[str, torch.Size]) -> tuple[int, ...]:
        first = shapes[self.ours[0]]
        joined = (sum(shapes[name][0] for name in self.ours), *first[1:])
        return (1,) * self.leading + joined + (1,) * self.trailing


def _rows(original: str, ours: str, *parameters: str, trailing: int = 0) -> list[Row]:
    """A module's parameters, `weight` and `bias` unless named."""
    parameters = parameters or ("weight", "bias")
    return [
        Row(f"{original}.{name}", (f"{ours}.{name}",), trailing=trailing if name == "weight" else 0)
        for name in parameters
    ]


def transformer_table(transformer: HARTTransformer2DModel) -> list[Row]:
    """The transformer, `llm/` of the original without its `diffloss`."""
    config = transformer.config
    table = _rows("word_embed", "x_embedder")
    if config.num_classes is None:
        table += _rows("context_embed", "context_embedder")
        table += _rows("context_norm", "context_norm", "weight")
    else:
        table += _rows("class_emb", "class_embedder", "weight")
        table += [Row("pos_start", ("pos_start",))]
    if config.num_levels is None:
        table += _rows("lvl_embed.mlp.0", "level_embedder.embedder.linear_1")
        table += _rows("lvl_embed.mlp.2", "level_embedder.embedder.linear_2")
    else:
        table += _rows("lvl_embed", "level_embedder", "weight")
    for n in range(config.num_layers):
        theirs, ours = f"blocks.{n}", f"transformer_blocks.{n}"
        qkv = tuple(f"{ours}.attn.{name}.weight" for name in ("to_q", "to_k", "to_v"))
        table += [
            Row(f"{theirs}.attn.qkv_proj.weight", qkv),
            Row(f"{theirs}.attn.q_bias", (f"{ours}.attn.to_q.bias",)),
            Row(f"{theirs}.attn.v_bias", (f"{ours}.attn.to_v.bias",)),
        ]
        if config.qk_norm:
            table += [Row(f"{theirs}.attn.scale_mul_1H11", (f"{ours}.attn.logit_scale",), leading=1, trailing=2)]
        table += _rows(f"{theirs}.attn.proj", f"{ours}.attn.to_out.0")
        for name in ("gate_proj", "up_proj", "down_proj"):
            table += _rows(f"{theirs}.ffn.{name}", f"{ours}.ff.{name}", "weight")
        table += _rows(f"{theirs}.ln_wo_grad", f"{ours}.norm", "weight")
        if config.num_classes is not None:
            table += _rows(f"{theirs}.ada_lin.1", f"{ours}.modulation")
    table += _rows("head_nm.ln_wo_grad", "norm_out.norm", "weight")
    table += _rows("head_nm.ada_lin.1", "norm_out.linear")
    table += _rows("head", "proj_out")
    table += _rows("decoder_norm", "residual_norm", "weight")
    return table


def residual_mlp_table(residual_mlp: ResidualDiffusionMLP) -> list[Row]:
    """The residual MLP, `diffloss` of the original's `llm/`."""
    table = _rows("diffloss.net.input_proj", "proj_in")
    table += _rows("diffloss.net.cond_embed", "condition_embedder")
    table += _rows("diffloss.net.time_embed.mlp.0", "time_embedder.linear_1")
    table += _rows("diffloss.net.time_embed.mlp.2", "time_embedder.linear_2")
    for n in range(residual_mlp.config.num_layers):
        theirs, ours = f"diffloss.net.res_blocks.{n}", f"blocks.{n}"
        table += _rows(f"{theirs}.in_ln", f"{ours}.norm")
        table += _rows(f"{theirs}.mlp.0", f"{ours}.linear_1")
        table += _rows(f"{theirs}.mlp.2", f"{ours}.linear_2")
        table += _rows(f"{theirs}.adaLN_modulation.1", f"{ours}.modulation")
    table += _rows("diffloss.net.final_layer.adaLN_modulation.1", "modulation_out")
    table += _rows("diffloss.net.final_layer.linear", "proj_out")
    return table


def tokenizer_table(tokenizer: HybridTokenizer, share_quant_resi: int) -> list[Row]:
    """
    The hybrid tokenizer, `tokenizer/` of the original, whose `share_quant_resi` decides what the phi are called there:
    0 for one each scale, 1 for one in all, otherwise their number.
    """
    config = tokenizer.config
    levels = len(config.block_out_channels)

    def resnet(theirs: str, ours: str, has_shortcut: bool) -> list[Row]:
        rows = [
            row for name in ("norm1", "conv1", "norm2", "conv2") for row in _rows(f"{theirs}.{name}", f"{ours}.{name}")
        ]
        return rows + (_rows(f"{theirs}.nin_shortcut", f"{ours}.conv_shortcut") if has_shortcut else [])

    def attention(theirs: str, ours: str) -> list[Row]:
        projections = ("to_q", "to_k", "to_v")
        return [
            *_rows(f"{theirs}.norm", f"{ours}.group_norm"),
            Row(f"{theirs}.qkv.weight", tuple(f"{ours}.{name}.weight" for name in projections), trailing=2),
            Row(f"{theirs}.qkv.bias", tuple(f"{ours}.{name}.bias" for name in projections)),
            *_rows(f"{theirs}.proj_out", f"{ours}.to_out.0", trailing=2),
        ]

    table = []
    for half in ("encoder", "decoder"):
        theirs, ours = f"vae.{half}", half
        table += _rows(f"{theirs}.conv_in", f"{ours}.conv_in")
        table += resnet(f"{theirs}.mid.block_1", f"{ours}.mid_block.resnets.0", False)
        table += attention(f"{theirs}.mid.attn_1", f"{ours}.mid_block.attentions.0")
        table += resnet(f"{theirs}.mid.block_2", f"{ours}.mid_block.resnets.1", False)
        table += _rows(f"{theirs}.norm_out", f"{ours}.conv_norm_out")
        table += _rows(f"{theirs}.conv_out", f"{ours}.conv_out")

    widths = config.block_out_channels
    for level in range(levels):
        theirs, ours = f"vae.encoder.down.{level}", f"encoder.down_blocks.{level}"
        for n in range(config.layers_per_block):
            width_changes = n == 0 and level > 0 and widths[level - 1] != widths[level]
            table += resnet(f"{theirs}.block.{n}", f"{ours}.resnets.{n}", width_changes)
            if level == levels - 1:
                table += attention(f"{theirs}.attn.{n}", f"{ours}.attentions.{n}")
        if level < levels - 1:
            table += _rows(f"{theirs}.downsample.conv", f"{ours}.downsamplers.0.conv")

        # The original counts the decoder's levels from the finest, diffusers in the order in which they run.
        theirs, ours = f"vae.decoder.up.{level}", f"decoder.up_blocks.{levels - 1 - level}"
        for n in range(config.layers_per_block + 1):
            width_changes = n == 0 and level < levels - 1 and widths[level + 1] != widths[level]
            table += resnet(f"{theirs}.block.{n}", f"{ours}.resnets.{n}", width_changes)
            if level == levels - 1:
                table += attention(f"{theirs}.attn.{n}", f"{ours}.attentions.{n}")
        if level > 0:
            table += _rows(f"{theirs}.upsample.conv", f"{ours}.upsamplers.0.conv")

    table += _rows("vae.quant_conv", "quant_conv")
    table += _rows("vae.post_quant_conv", "post_quant_conv")
    table += _rows("vae.quantize.embedding", "codebook", "weight")
    phi = {0: "quant_resi.{}", 1: "quant_resi.qresi"}.get(share_quant_resi, "quant_resi.qresi_ls.{}")
    for n in range(config.num_phi):
        table += _rows(f"vae.quantize.{phi.format(n)}", f"phi.{n}")
    return table


def check_keys(
    given: Mapping[str, torch.Tensor],
    expected: Mapping[str, Sequence[int]],
    source: str,
    allow_extra_keys: bool = False,
) -> None:
    """
    Compare weights with the shapes they should have.

    Raises:
        ValueError: If keys are missing, have the wrong shape or, unless allowed, are unknown; it names them.
    """

    def listed(items: Sequence[str]) -> str:
        return ", ".join(items[:8]) + (f" and {len(items) - 8} more" if len(items) > 8 else "")

    problems = []
    if missing := [name for name in expected if name not in given]:
        problems.append(f"{len(missing)} missing: {listed(missing)}")
    mis_shaped = [
        f"{name} is {tuple(given[name].shape)}, expected {tuple(shape)}"
        for name, shape in expected.items()
        if name in given and tuple(given[name].shape) != tuple(shape)
    ]
    if mis_shaped:
        problems.append(f"{len(mis_shaped)} of the wrong shape: {listed(mis_shaped)}")
    if extra := [name for name in given if name not in expected]:
        if allow_extra_keys:
            logger.warning(f"{source}: {len(extra)} unknown keys are left out: {listed(extra)}")
        else:
            problems.append(f"{len(extra)} unknown: {listed(extra)}")
    if problems:
        raise ValueError(f"{source} does not fit its config. Keys " + "; keys ".join(problems) + ".")


def check_original(
    original: Mapping[str, torch.Tensor],
    table: Sequence[Row],
    shapes: Mapping[str, torch.Size],
    source: str,
    allow_extra_keys: bool = False,
) -> None:
    """[`check_keys`] of an original checkpoint with a table and the `shapes` of our parameters."""
    check_keys(original, {row.original: row.original_shape(shapes) for row in table}, source, allow_extra_keys)


def to_ours(
    original: Mapping[str, torch.Tensor], table: Sequence[Row], shapes: Mapping[str, torch.Size]
) -> dict[str, torch.Tensor]:
    """Our state dict from an original one that [`check_original`] has passed; values are not changed."""
    state_dict = {}
    for row in table:
        sizes = [shapes[name][0] for name in row.ours]
        joined = original[row.original].reshape(sum(sizes), *shapes[row.ours[0]][1:])
        parts = joined.split(sizes)
        for name, part in zip(row.ours, parts):
            # Copies, so that the parts of a joined tensor can be moved and changed one without the other.
            state_dict[name] = part.clone() if len(parts) > 1 else part.contiguous()
    return state_dict


def to_original(ours: Mapping[str, torch.Tensor], table: Sequence[Row]) -> dict[str, torch.Tensor]:
    """The original's state dict from ours; values are not changed."""
    shapes = {name: tensor.shape for name, tensor in ours.items()}
    return {
        row.original: torch.cat([ours[name] for name in row.ours]).reshape(row.original_shape(shapes)) for row in table
    }
