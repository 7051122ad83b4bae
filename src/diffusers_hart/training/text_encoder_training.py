# SPDX-License-Identifier: Apache-2.0
import torch
import torch.nn as nn
import torch.nn.functional as F
from transformers import PreTrainedTokenizerBase, Qwen2Model


class TextEncoderTrainingModule(nn.Module):
    r"""
    One step's loss of a text encoder: as a causal language model whose head is its own table of embeddings, it predicts
    the next token of captions and their end; and linear layers, which are not kept, tell from each hidden state which
    token it stands at and which tokens came before it. A small language model forgets both as soon as they do not matter
    for what comes next. Then two letters of the alphabet look the same to who draws them, and so does an object that is
    above another to one that is below.

    Args:
        text_encoder (`Qwen2Model`): Trained, in float32.
        recall_weight (`float`, defaults to `1.0`): Weight of telling the token; 0 for none.
        history_weight (`float`, defaults to `0.125`): Weight of telling the tokens before it; 0 for none.
    """

    def __init__(self, text_encoder: Qwen2Model, recall_weight: float = 1.0, history_weight: float = 0.125):
        super().__init__()
        self.text_encoder = text_encoder
        self.recall_weight = recall_weight
        self.history_weight = history_weight
        self.recall = self._zero_linear() if recall_weight else None
        self.history = self._zero_linear() if history_weight else None

    def _zero_linear(self) -> nn.Linear:
        linear = nn.Linear(self.text_encoder.config.hidden_size, self.text_encoder.config.vocab_size)
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)
        return linear

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
            `dict[str, torch.Tensor]`: `loss`, to be minimised; its parts `next_token_loss` and, unless their weights are
            0, `recall_loss`, cross-entropies of a token in nats, and `history_loss`, the sum over the vocabulary of the
            binary cross-entropies of whether a token came before; and `token_accuracy` of the next tokens. All are means
            over captions of each caption's mean, of shape `()`.
        """
        # Causal, so that padding on the right changes nothing before it.
        hidden_states = self.text_encoder(input_ids=input_ids, use_cache=False).last_hidden_state
        # Each caption counts alike, however the captions of a step are divided into batches.
        weights = mask / mask.sum(dim=1, keepdim=True).clamp(min=1)

        def mean(losses: torch.Tensor) -> torch.Tensor:
            return (losses * weights).sum(dim=1).mean()

        def cross_entropy(logits: torch.Tensor, tokens: torch.LongTensor) -> torch.Tensor:
            return mean(F.cross_entropy(logits.float().transpose(1, 2), tokens, reduction="none"))

        logits = F.linear(hidden_states, self.text_encoder.get_input_embeddings().weight)
        loss = next_token_loss = cross_entropy(logits, targets)
        figures = {
            "next_token_loss": next_token_loss.detach(),
            "token_accuracy": mean(logits.argmax(-1) == targets),
        }
        if self.recall is not None:
            recall_loss = cross_entropy(self.recall(hidden_states), input_ids)
            loss = loss + self.recall_weight * recall_loss
            figures["recall_loss"] = recall_loss.detach()
        if self.history is not None:
            here = F.one_hot(input_ids, self.text_encoder.config.vocab_size)
            before = (here.cumsum(dim=1) > here).float()
            told = self.history(hidden_states).float()
            history_loss = mean(F.binary_cross_entropy_with_logits(told, before, reduction="none").sum(-1))
            loss = loss + self.history_weight * history_loss
            figures["history_loss"] = history_loss.detach()
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
