# SPDX-License-Identifier: Apache-2.0
import json
import os
from pathlib import Path

import torch
from accelerate import init_empty_weights
from diffusers import ModelMixin
from safetensors.torch import save_file

from ..models import HARTTransformer2DModel, HybridTokenizer, ResidualDiffusionMLP
from ..schedulers import HARTScheduler
from .key_tables import check_keys, residual_mlp_table, to_original, tokenizer_table, transformer_table
from .original_config import OriginalConfig
from .output_folder import check_output_folder, new_folder
from .weight_files import find_weights, read_json, read_weights


WEIGHT_FILES = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")


def convert_diffusers_to_hart(model_path: str | os.PathLike, dump_path: str | os.PathLike) -> Path:
    r"""
    Write the original layout of a HART pipeline that was saved to a folder: `llm/` and `tokenizer/`, each with its
    config. Weights keep the type they are stored in, bit for bit; `llm/model.safetensors` and `llm/ema_model.bin` hold
    the same ones. The original's buffers are made anew. The text encoder and the system prompt have no place in that
    layout, and the training discriminator is gone.

    Args:
        model_path (`str` or `os.PathLike`): The folder of the pipeline.
        dump_path (`str` or `os.PathLike`): The folder to write, new or empty.

    Returns:
        `Path`: The folder that was written.

    Raises:
        FileNotFoundError: If a file is missing.
        FileExistsError: If `dump_path` is a file, or a folder that is not empty.
        ValueError: If a file is damaged, weights do not fit their config, or the original cannot express the models.
            Nothing has been written then.
    """
    dump_path = check_output_folder(dump_path)
    model_path = Path(model_path)
    transformer, transformer_weights = _load(model_path / "transformer", HARTTransformer2DModel)
    residual_mlp, residual_mlp_weights = _load(model_path / "residual_mlp", ResidualDiffusionMLP)
    vae, vae_weights = _load(model_path / "vae", HybridTokenizer)
    scheduler = HARTScheduler.from_config(read_json(model_path / "scheduler" / "scheduler_config.json"))
    config = OriginalConfig.of(transformer, residual_mlp, vae, scheduler)

    llm = to_original(transformer_weights, transformer_table(transformer))
    llm |= to_original(residual_mlp_weights, residual_mlp_table(residual_mlp))
    dtype = llm["word_embed.weight"].dtype
    llm |= _transformer_buffers(config)
    tokenizer = to_original(vae_weights, tokenizer_table(vae, config.tokenizer["share_quant_resi"]))
    tokenizer["vae.quantize.ema_vocab_hit_SV"] = torch.zeros(
        len(config.tokenizer["v_patch_nums"]), config.tokenizer["vocab_size"]
    )

    with new_folder(dump_path) as folder:
        for name, file, weights in (
            ("llm", config.llm_file(dtype), llm),
            ("tokenizer", config.tokenizer_file(tokenizer["vae.quant_conv.weight"].dtype), tokenizer),
        ):
            (folder / name).mkdir()
            (folder / name / "config.json").write_text(json.dumps(file, indent=2, sort_keys=True) + "\n")
            save_file(weights, folder / name / "model.safetensors", metadata={"format": "pt"})
        torch.save(llm, folder / "llm" / "ema_model.bin")
    return dump_path


def _load(folder: Path, model_class: type[ModelMixin]) -> tuple[ModelMixin, dict[str, torch.Tensor]]:
    """An empty model, and its weights as they are stored: `from_pretrained` would change their type."""
    config = read_json(folder / "config.json")
    if config.get("_class_name") != model_class.__name__:
        raise ValueError(f"{folder} holds a {config.get('_class_name')}, expected a {model_class.__name__}.")
    with init_empty_weights():
        model = model_class.from_config(config)
    file = find_weights(folder, WEIGHT_FILES)
    weights = read_weights(file)
    check_keys(weights, {name: parameter.shape for name, parameter in model.state_dict().items()}, str(file))
    return model, weights


def _transformer_buffers(config: OriginalConfig) -> dict[str, torch.Tensor]:
    """The constants that the original stores beside the weights of its transformer."""
    sides, text_tokens = config.llm["patch_nums"], config.llm["context_token"]
    lengths = torch.tensor([text_tokens, *(side * side for side in sides[1:])])
    levels = torch.arange(len(sides)).repeat_interleave(lengths)
    hidden = levels[:, None] < levels[None]
    bias = torch.zeros(hidden.shape).masked_fill_(hidden, -torch.inf)
    buffers = {"lvl_1L": levels[None], "attn_bias_for_masking": bias[None, None]}
    for n in range(config.llm["depth"]):
        buffers[f"blocks.{n}.attn.zero_k_bias"] = torch.zeros(config.llm["embed_dim"])
    return buffers
