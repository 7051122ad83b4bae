# SPDX-License-Identifier: Apache-2.0
import torch
import torch.nn as nn
import torch.nn.functional as F
from transformers import PreTrainedTokenizerBase, Qwen2Model


class TextEncoderTrainingModule(nn.Module):
    r"""
    One step's loss of a text encoder: as a causal language model whose head is its own table of embeddings, it predicts
    the next token of captions and their end; and a linear layer, which is not kept, tells from each hidden state which
    token it stands at. A small language model forgets that as soon as it does not matter for what comes next, and two
    letters of the alphabet would look the same to who draws them.

    Args:
        text_encoder (`Qwen2Model`): Trained, in float32.
        recall_weight (`float`, defaults to `1.0`): Weight of the second loss; 0 for a language model alone.
    """

    def __init__(self, text_encoder: Qwen2Model, recall_weight: float = 1.0):
        super().__init__()
        self.text_encoder = text_encoder
        self.recall_weight = recall_weight
        self.recall = None
        if recall_weight:
            self.recall = nn.Linear(text_encoder.config.hidden_size, text_encoder.config.vocab_size, bias=False)
            nn.init.zeros_(self.recall.weight)

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
            `dict[str, torch.Tensor]`: `loss`, to be minimised; its parts `next_token_loss` and, unless `recall_weight`
            is 0, `recall_loss`, cross-entropies of a token in nats; and `token_accuracy` of the next tokens. All are
            means over captions of each caption's mean, of shape `()`.
        """
        # Causal, so that padding on the right changes nothing before it.
        hidden_states = self.text_encoder(input_ids=input_ids, use_cache=False).last_hidden_state
        # Each caption counts alike, however the captions of a step are divided into batches.
        weights = mask / mask.sum(dim=1, keepdim=True).clamp(min=1)

        def cross_entropy(logits: torch.Tensor, tokens: torch.LongTensor) -> torch.Tensor:
            losses = F.cross_entropy(logits.float().transpose(1, 2), tokens, reduction="none")
            return (losses * weights).sum(dim=1).mean()

        logits = F.linear(hidden_states, self.text_encoder.get_input_embeddings().weight)
        loss = next_token_loss = cross_entropy(logits, targets)
        figures = {
            "next_token_loss": next_token_loss.detach(),
            "token_accuracy": ((logits.argmax(-1) == targets) * weights).sum(dim=1).mean(),
        }
        if self.recall is not None:
            recall_loss = cross_entropy(self.recall(hidden_states), input_ids)
            loss = loss + self.recall_weight * recall_loss
            figures["recall_loss"] = recall_loss.detach()
        return {"loss": loss, **figures}


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
