# SPDX-License-Identifier: Apache-2.0
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

    def __call__(self, captions: list[str]) -> dict[str, torch.Tensor]:
        """
        Returns:
            `dict[str, torch.Tensor]`: `prompt_embeds` `(batch_size, caption_length, caption_channels)`, float32, and
            `prompt_attention_mask` `(batch_size, caption_length)`, int64, on the text encoder's device.
        """
        tokenizer = self.pipe.tokenizer
        tokens = tokenizer(
            captions, padding="max_length", max_length=self.caption_length, truncation=True, return_tensors="pt"
        )
        if not self.has_warned:
            full = [caption for caption, mask in zip(captions, tokens.attention_mask) if mask.all()]
            lengths = [len(ids) for ids in tokenizer(full).input_ids] if full else []
            if max(lengths, default=0) > self.caption_length:
                self.has_warned = True
                logger.warning(
                    f"Captions of more than {self.caption_length} tokens are cut; the first one seen has {max(lengths)}. "
                    "There is no warning of others."
                )
        with torch.set_grad_enabled(self.trained and torch.is_grad_enabled()):
            embeds, mask = self.pipe._encode_tokens(
                tokens.input_ids, self.pipe.config.system_prompt, self.pipe.text_encoder.device
            )
        return {"prompt_embeds": embeds, "prompt_attention_mask": mask}
