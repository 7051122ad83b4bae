# SPDX-License-Identifier: Apache-2.0
import os
from pathlib import Path

import torch
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..pipelines import HARTPipeline
from .hart_checkpoint import checkpoint_files, load_hart_checkpoint
from .model_card import write_model_card
from .output_folder import check_output_folder, new_folder


def convert_hart_to_diffusers(
    checkpoint_path: str | os.PathLike,
    text_encoder_path: str | os.PathLike,
    dump_path: str | os.PathLike,
    use_ema: bool = True,
    dtype: torch.dtype | None = None,
    system_prompt: str | None = None,
    allow_extra_keys: bool = False,
    license: str | None = None,
    base_model: str | None = None,
    repo_id: str | None = None,
    self_contained: bool = False,
) -> Path:
    r"""
    Convert an original HART checkpoint into a folder that [`HARTPipeline`] loads, with a model card.

    Args:
        checkpoint_path (`str` or `os.PathLike`): The checkpoint, a folder with `llm/` and `tokenizer/`.
        text_encoder_path (`str` or `os.PathLike`):
            The language model that encodes prompts, with its tokenizer: a folder or a Hub id.
        dump_path (`str` or `os.PathLike`): The folder to write, new or empty.
        use_ema (`bool`, defaults to `True`): Whether to convert the EMA weights or those that were trained.
        dtype (`torch.dtype`, *optional*): Floating-point type to store, by default that of the files; see
            [`load_hart_checkpoint`].
        system_prompt (`str`, *optional*):
            Text that goes before each prompt; [`read_system_prompt`] finds it in files.
        allow_extra_keys (`bool`, defaults to `False`): Whether to leave out weights of unknown names, with a warning.
        license, base_model, repo_id (`str`, *optional*): For the model card, see [`write_model_card`].
        self_contained (`bool`, defaults to `False`):
            Whether to write the code of the pipeline beside the weights, see [`HARTPipeline.save_pretrained`].

    Returns:
        `Path`: The folder that was written.

    Raises:
        FileNotFoundError: If a file is missing.
        FileExistsError: If `dump_path` is a file, or a folder that is not empty.
        ValueError: If the checkpoint is damaged, of an architecture that is not supported or does not fit its config,
            or the text encoder does not fit it. Nothing has been written then.
    """
    dump_path = check_output_folder(dump_path)
    components = load_hart_checkpoint(checkpoint_path, use_ema, dtype, allow_extra_keys)
    tokenizer, text_encoder = _load_text_encoder(
        text_encoder_path, components["transformer"].config.caption_channels, dtype
    )
    pipe = HARTPipeline(tokenizer=tokenizer, text_encoder=text_encoder, system_prompt=system_prompt, **components)

    llm_file, tokenizer_file = (
        f"`{file.parent.name}/{file.name}`" for file in checkpoint_files(Path(checkpoint_path), use_ema)
    )
    weights = f"{llm_file} ({'EMA' if use_ema else 'trained'} weights)"
    # A folder's path is not for others to read.
    encoder = Path(text_encoder_path).resolve().name if os.path.isdir(text_encoder_path) else text_encoder_path
    sources = {
        "transformer": weights,
        "residual_mlp": weights,
        "vae": tokenizer_file,
        "text_encoder": f"`{encoder}`",
    }
    with new_folder(dump_path) as folder:
        pipe.save_pretrained(folder, self_contained=self_contained)
        write_model_card(
            folder, pipe, sources, license, base_model, repo_id, dtype is not None, self_contained=self_contained
        )
    return dump_path


def _load_text_encoder(
    path: str | os.PathLike, width: int, dtype: torch.dtype | None
) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    """A language model whose hidden states have some width, and its tokenizer."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        text_encoder = AutoModel.from_pretrained(path, dtype=dtype or "auto").eval()
    except (OSError, ValueError) as error:
        raise ValueError(f"No text encoder with its tokenizer can be loaded from {path}: {error}") from error
    hidden_size = getattr(text_encoder.config, "hidden_size", None)
    if hidden_size != width:
        raise ValueError(
            f"The text encoder {path} ({type(text_encoder).__name__}) has hidden states of width {hidden_size}; the "
            f"checkpoint was trained on a language model of width {width} (`context_dim`)."
        )
    if not tokenizer("a").input_ids:
        raise ValueError(
            f"{path} has no tokenizer: its files (`tokenizer.json`, ...) must lie beside the text encoder's."
        )
    if tokenizer.pad_token_id is None:
        raise ValueError(
            f"The tokenizer of {path} has no pad token, which tells text from padding: name one as `pad_token` in its "
            "`tokenizer_config.json`."
        )
    return tokenizer, text_encoder
