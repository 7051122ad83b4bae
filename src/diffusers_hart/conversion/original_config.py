# SPDX-License-Identifier: Apache-2.0
"""
The configs of the original, `llm/config.json` and `tokenizer/config.json`, and ours. The original saves what differs
from its defaults, so a missing key stands for the default.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..models import HARTTransformer2DModel, HybridTokenizer, ResidualDiffusionMLP
from ..schedulers import HARTScheduler
from .weight_files import read_json


# What may vary, and the original's defaults.
TRANSFORMER_DEFAULTS = {
    "attn_l2_norm": False,
    "context_dim": 768,
    "context_token": 77,
    "depth": 16,
    "diff_depth": 6,
    "diff_width": 1024,
    "embed_dim": 1024,
    "mlp_ratio": 4.0,
    "norm_eps": 1e-6,
    "num_heads": 16,
    "num_sampling_steps": "8",
    "patch_nums": [1, 2, 3, 4, 5, 6, 8, 10, 13, 16],
    "use_timestep_embed": False,
}
TOKENIZER_DEFAULTS = {
    "ch": 160,
    "ch_mult": [1, 1, 2, 2, 4],
    "default_qresi_counts": 0,
    "quant_resi": 0.5,
    "share_quant_resi": 4,
    "v_patch_nums": [1, 2, 3, 4, 5, 6, 8, 10, 13, 16],
    "vocab_size": 4096,
    "z_channels": 32,
}
# What changes the architecture and has but one value that our models are built for: the original's default, and this.
TRANSFORMER_FIXED = {
    "model_type": ("hart_transformer_t2i", "hart_transformer_t2i"),
    "attn_type": ("gpt2", "llama"),
    "mlp_type": ("gpt2", "llama"),
    "disable_aln": (False, True),
    "shared_aln": (False, False),
    "sep_aln_pooling_mode": ("max", "max"),
    "use_context_norm": (False, True),
    "use_cross_attn": (False, False),
    "diffusion_head_repeats": (1, 1),
    "sampler": ("iddpm", "iddpm"),
}
TOKENIZER_FIXED = {
    "model_type": ("hart_autoencoder_with_disc", "hart_autoencoder_with_disc"),
    "quantizer_type": ("var", "var_hybrid"),
    "using_znorm": (False, False),
    "quant_conv_ks": (3, 3),
    "disable_quant_resi": (False, False),
    "double_decoder": (False, False),
}
# The same in the other direction: what the original has built in.
OURS_FIXED = {
    HARTTransformer2DModel: {"num_classes": None, "rope_theta": 10000.0},
    ResidualDiffusionMLP: {"residual_scale": 0.6},
    HybridTokenizer: {"in_channels": 3, "out_channels": 3, "layers_per_block": 2, "norm_num_groups": 32},
}


@dataclass(frozen=True)
class OriginalConfig:
    """
    Both configs of an original checkpoint, complete and checked.

    Args:
        llm (`dict`): The values of `llm/config.json` that may vary.
        tokenizer (`dict`): The values of `tokenizer/config.json` that may vary.
    """

    llm: dict[str, Any]
    tokenizer: dict[str, Any]

    @classmethod
    def read(cls, checkpoint: Path) -> "OriginalConfig":
        """
        Read the configs of a checkpoint.

        Raises:
            FileNotFoundError: If one is missing.
            ValueError: If a value stands for an architecture that is not supported.
        """
        config = cls(
            llm=_read(checkpoint / "llm" / "config.json", TRANSFORMER_DEFAULTS, TRANSFORMER_FIXED),
            tokenizer=_read(checkpoint / "tokenizer" / "config.json", TOKENIZER_DEFAULTS, TOKENIZER_FIXED),
        )
        llm, tokenizer = config.llm, config.tokenizer
        steps = str(llm["num_sampling_steps"])
        problems = {
            f"`patch_nums` {llm['patch_nums']} must grow from 1": not _is_schedule(llm["patch_nums"]),
            f"`v_patch_nums` {tokenizer['v_patch_nums']} must grow from 1": not _is_schedule(
                tokenizer["v_patch_nums"]
            ),
            f"`num_sampling_steps` {steps!r} must be a number": not steps.isdecimal() or int(steps) < 1,
            f"`embed_dim` {llm['embed_dim']} must be a multiple of `num_heads` {llm['num_heads']}": llm["embed_dim"]
            % llm["num_heads"],
            f"`ch_mult` {tokenizer['ch_mult']} must begin with 1": tokenizer["ch_mult"][0] != 1,
            f"`quant_resi` {tokenizer['quant_resi']} must not be 0": abs(tokenizer["quant_resi"]) <= 1e-6,
        }
        if wrong := [problem for problem, found in problems.items() if found]:
            raise ValueError(f"The configs of {checkpoint} are not supported: {'; '.join(wrong)}.")
        return config

    @classmethod
    def of(
        cls,
        transformer: HARTTransformer2DModel,
        residual_mlp: ResidualDiffusionMLP,
        vae: HybridTokenizer,
        scheduler: HARTScheduler,
    ) -> "OriginalConfig":
        """
        The configs the original needs for these models.

        Raises:
            ValueError: If the original cannot express them.
        """
        for model in (transformer, residual_mlp, vae):
            for name, value in OURS_FIXED[type(model)].items():
                if model.config[name] != value:
                    raise ValueError(
                        f"The original code cannot express {type(model).__name__} with `{name}` "
                        f"{model.config[name]!r}: it has {value!r} built in."
                    )
        patch_nums = list(scheduler.scales(transformer.config.sample_size))
        base_width = vae.config.block_out_channels[0]
        problems = {
            "the widths of the tokenizer's levels are not multiples of the first": any(
                width % base_width for width in vae.config.block_out_channels
            ),
            "transformer, residual MLP and tokenizer differ in their latent channels": len(
                {transformer.config.in_channels, residual_mlp.config.in_channels, vae.config.latent_channels}
            )
            > 1,
            "transformer and tokenizer differ in their number of codes": transformer.config.codebook_size
            != vae.config.codebook_size,
            "the residual MLP's condition is not as wide as the transformer": residual_mlp.config.condition_dim
            != transformer.inner_dim,
            "the transformer's table of levels does not have one row for each scale": transformer.config.num_levels
            not in (None, len(patch_nums)),
        }
        if wrong := [problem for problem, found in problems.items() if found]:
            raise ValueError(f"The original code cannot express these models: {'; '.join(wrong)}.")

        llm = {
            "attn_l2_norm": transformer.config.qk_norm,
            "context_dim": transformer.config.caption_channels,
            "context_token": transformer.config.caption_length,
            "depth": transformer.config.num_layers,
            "diff_depth": residual_mlp.config.num_layers,
            "diff_width": residual_mlp.config.hidden_size,
            "embed_dim": transformer.inner_dim,
            "mlp_ratio": transformer.config.mlp_ratio,
            "norm_eps": transformer.config.norm_eps,
            "num_heads": transformer.config.num_attention_heads,
            "num_sampling_steps": str(scheduler.config.num_inference_steps),
            "patch_nums": patch_nums,
            "use_timestep_embed": transformer.config.num_levels is None,
        }
        num_phi, scales = vae.config.num_phi, list(vae.config.scales)
        # Four are shared unless the original is told otherwise, also by four scales.
        one_each = num_phi == len(scales) and num_phi not in (1, TOKENIZER_DEFAULTS["share_quant_resi"])
        tokenizer = {
            "ch": base_width,
            "ch_mult": [width // base_width for width in vae.config.block_out_channels],
            "default_qresi_counts": 0,
            "quant_resi": vae.config.phi_ratio,
            "share_quant_resi": 0 if one_each else num_phi,
            "v_patch_nums": scales,
            "vocab_size": vae.config.codebook_size,
            "z_channels": vae.config.latent_channels,
        }
        return cls(llm, tokenizer)

    def llm_file(self, dtype: torch.dtype) -> dict[str, Any]:
        """The content of `llm/config.json`."""
        fixed = {name: value for name, (_, value) in TRANSFORMER_FIXED.items()}
        return {"architectures": ["HARTForT2I"], "torch_dtype": _name(dtype), **fixed, **self.llm}

    def tokenizer_file(self, dtype: torch.dtype) -> dict[str, Any]:
        """The content of `tokenizer/config.json`."""
        fixed = {name: value for name, (_, value) in TOKENIZER_FIXED.items()}
        names = {"architectures": ["HARTAutoEncoderWithDisc"], "hybrid": True, "torch_dtype": _name(dtype)}
        return {**names, **fixed, **self.tokenizer}

    def transformer(self) -> dict[str, Any]:
        """The config of our transformer."""
        return {
            "in_channels": self.tokenizer["z_channels"],
            "codebook_size": self.tokenizer["vocab_size"],
            "num_layers": self.llm["depth"],
            "num_attention_heads": self.llm["num_heads"],
            "attention_head_dim": self.llm["embed_dim"] // self.llm["num_heads"],
            "mlp_ratio": self.llm["mlp_ratio"],
            "caption_channels": self.llm["context_dim"],
            "caption_length": self.llm["context_token"],
            "qk_norm": self.llm["attn_l2_norm"],
            "num_levels": None if self.llm["use_timestep_embed"] else len(self.llm["patch_nums"]),
            "sample_size": self.llm["patch_nums"][-1],
            "norm_eps": self.llm["norm_eps"],
        }

    def residual_mlp(self) -> dict[str, Any]:
        """The config of our residual MLP."""
        return {
            "in_channels": self.tokenizer["z_channels"],
            "condition_dim": self.llm["embed_dim"],
            "hidden_size": self.llm["diff_width"],
            "num_layers": self.llm["diff_depth"],
        }

    def vae(self) -> dict[str, Any]:
        """The config of our tokenizer. It gets the transformer's schedule: its own may be that of a smaller size."""
        share = self.tokenizer["share_quant_resi"]
        return {
            "latent_channels": self.tokenizer["z_channels"],
            "block_out_channels": [self.tokenizer["ch"] * factor for factor in self.tokenizer["ch_mult"]],
            "codebook_size": self.tokenizer["vocab_size"],
            "num_phi": share or self.tokenizer["default_qresi_counts"] or len(self.tokenizer["v_patch_nums"]),
            "phi_ratio": abs(self.tokenizer["quant_resi"]),
            "scales": self.llm["patch_nums"],
        }

    def scheduler(self) -> dict[str, Any]:
        """The config of our scheduler: all published schedules if the checkpoint's own is one, else that alone."""
        published = [list(schedule) for schedule in HARTScheduler().config.schedules]
        own = list(self.llm["patch_nums"])
        return {
            "schedules": published if own in published else [own],
            "num_inference_steps": int(self.llm["num_sampling_steps"]),
        }


def _read(path: Path, defaults: dict[str, Any], fixed: dict[str, tuple[Any, Any]]) -> dict[str, Any]:
    given = read_json(path)
    for name, (default, supported) in fixed.items():
        value = given.get(name, default)
        if value != supported:
            missing = "" if name in given else " (the default: the key is missing)"
            raise ValueError(f"{path} has `{name}` {value!r}{missing}; only {supported!r} is supported.")
    for name, default in defaults.items():
        if name in given and not _is_like(given[name], default):
            raise ValueError(f"{path} has `{name}` {given[name]!r}, which is not a value like {default!r}.")
    return {name: given.get(name, default) for name, default in defaults.items()}


def _is_like(value: Any, default: Any) -> bool:
    if isinstance(default, bool):
        return isinstance(value, bool)
    if isinstance(default, list):
        return isinstance(value, list) and bool(value) and all(_is_like(item, 1) for item in value)
    if isinstance(default, str):
        return isinstance(value, (str, int))
    return isinstance(value, (int, type(default))) and not isinstance(value, bool)


def _is_schedule(scales: list[int]) -> bool:
    return scales[0] == 1 and all(a < b for a, b in zip(scales, scales[1:]))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
