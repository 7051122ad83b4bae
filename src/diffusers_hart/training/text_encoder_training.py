# SPDX-License-Identifier: Apache-2.0
import torch
import torch.nn as nn
import torch.nn.functional as F
from transformers import PreTrainedTokenizerBase, Qwen2Model


class TextEncoderTrainingModule(nn.Module):
    r"""
    One step's loss of a text encoder: as a causal language model whose head is its own table of embeddings, it predicts
    the next token of captions and their end.

    Args:
        text_encoder (`Qwen2Model`): Trained, in float32.
    """

    def __init__(self, text_encoder: Qwen2Model):
        super().__init__()
        self.text_encoder = text_encoder

    def forward(
        self, input_ids: torch.LongTensor, targets: torch.LongTensor, mask: torch.BoolTensor
    ) -> dict[str, torch.Tensor]:
        r"""
        The loss of one batch.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, tokens)`): Captions, padded on the right.
            targets (`torch.LongTensor` of shape `(batch_size, tokens)`): What comes after each token.
            mask (`torch.BoolTensor` of shape `(batch_size, tokens)`): True where that is to be predicted.

        Returns:
            `dict[str, torch.Tensor]`: `loss`, to be minimised, the cross-entropy of a token in nats, and
            `token_accuracy`, both the mean over captions of each caption's mean, of shape `()`.
        """
        # Causal, so that padding on the right changes nothing before it.
        hidden_states = self.text_encoder(input_ids=input_ids, use_cache=False).last_hidden_state
        logits = F.linear(hidden_states, self.text_encoder.get_input_embeddings().weight).float()
        losses = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
        # Each caption counts alike, however the captions of a step are divided into batches.
        weights = mask / mask.sum(dim=1, keepdim=True).clamp(min=1)
        return {
            "loss": (losses * weights).sum(dim=1).mean(),
            "token_accuracy": ((logits.argmax(-1) == targets) * weights).sum(dim=1).mean(),
        }


def language_model_inputs(
    tokenizer: PreTrainedTokenizerBase, captions: list[str], caption_length: int
) -> dict[str, torch.Tensor]:
    """
    Arguments of [`TextEncoderTrainingModule`] for captions, of which `caption_length` tokens are read at most. The last
    token of a caption that is not cut has to predict the end of the text, with which the tokenizer pads.
    """
    tokens = tokenizer(captions, padding=True, max_length=caption_length + 1, truncation=True, return_tensors="pt")
    missing = max(1, 2 - tokens.input_ids.shape[1])  # at least the end of the longest caption
    ids = F.pad(tokens.input_ids.long(), (0, missing), value=tokenizer.eos_token_id)[:, : caption_length + 1]
    mask = F.pad(tokens.attention_mask.bool(), (0, missing))[:, : ids.shape[1] - 1]
    return {"input_ids": ids[:, :-1], "targets": ids[:, 1:], "mask": mask}
