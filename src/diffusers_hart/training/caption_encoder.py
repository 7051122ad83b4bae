# SPDX-License-Identifier: Apache-2.0
from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers.utils import logging

from ..pipelines import HARTPipeline


logger = logging.get_logger(__name__)


class CaptionEncoder:
    r"""
    Embeds captions as `pipe.encode_prompt` embeds prompts, for a training: of captions that are cut it warns once, not
    each time.

    Args:
        pipe ([`HARTPipeline`]): Its tokenizer, text encoder and system prompt are used.
        caption_length (`int`): Number of tokens captions are padded and cut to.
        trained (`bool`, defaults to `False`): Whether the text encoder is trained, so that gradients must reach it.
    """

    def __init__(self, pipe: HARTPipeline, caption_length: int, trained: bool = False):
        self.pipe = pipe
        self.caption_length = caption_length
        self.trained = trained
        self.has_warned = False

    def tokenize(self, captions: list[str]) -> tuple[torch.LongTensor, list[int]]:
        """Padded and cut tokens `(batch_size, caption_length)`, on the CPU, and how many tokens each caption has."""
        tokenizer = self.pipe.tokenizer
        tokens = tokenizer(
            captions, padding="max_length", max_length=self.caption_length, truncation=True, return_tensors="pt"
        )
        lengths = tokens.attention_mask.sum(1).tolist()
        for i, length in enumerate(lengths):
            if length == self.caption_length:  # perhaps cut
                lengths[i] = len(tokenizer(captions[i]).input_ids)
        return tokens.input_ids, lengths

    def tokenized(
        self, prepare: Callable[[Any, torch.Generator], dict[str, Any]]
    ) -> Callable[[Any, torch.Generator], dict[str, Any]]:
        """A preparation of examples that leaves their tokens to the data loader's workers as well."""

        def prepare_and_tokenize(item: Any, generator: torch.Generator) -> dict[str, Any]:
            example = prepare(item, generator)
            if "prompt_embeds" in example or "caption" not in example:
                return example
            input_ids, lengths = self.tokenize([example["caption"]])
            return {**example, "input_ids": input_ids[0], "caption_tokens": lengths[0]}

        return prepare_and_tokenize

    def warn_of_cut(self, lengths: Sequence[int]) -> None:
        """Warn, the first time, if one of `lengths` is more than captions are cut to."""
        if not self.has_warned and max(lengths, default=0) > self.caption_length:
            self.has_warned = True
            logger.warning(
                f"Captions of more than {self.caption_length} tokens are cut; the first one seen has {max(lengths)}. "
                "There is no warning of others."
            )

    def encode(self, input_ids: torch.LongTensor) -> dict[str, torch.Tensor]:
        """
        Embeddings of tokens `(batch_size, caption_length)`.

        Returns:
            `dict[str, torch.Tensor]`: `prompt_embeds` `(batch_size, caption_length, caption_channels)`, float32, and
            `prompt_attention_mask` `(batch_size, caption_length)`, int64, on the text encoder's device.
        """
        with torch.set_grad_enabled(self.trained and torch.is_grad_enabled()):
            embeds, mask = self.pipe._encode_tokens(
                input_ids, self.pipe.config.system_prompt, self.pipe.text_encoder.device
            )
        return {"prompt_embeds": embeds, "prompt_attention_mask": mask}

    def __call__(self, captions: list[str]) -> dict[str, torch.Tensor]:
        """Embeddings of captions, as of [`~CaptionEncoder.encode`]."""
        input_ids, lengths = self.tokenize(captions)
        self.warn_of_cut(lengths)
        return self.encode(input_ids)
