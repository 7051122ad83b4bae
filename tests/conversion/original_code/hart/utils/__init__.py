# SPDX-License-Identifier: Apache-2.0
import torch

from .constants import llm_system_prompt


__all__ = ["encode_prompts", "llm_system_prompt"]


def encode_prompts(prompts, text_model, text_tokenizer, text_tokenizer_max_length, system_prompt, use_system_prompt):
    tokens = text_tokenizer(
        prompts, padding="max_length", max_length=text_tokenizer_max_length, truncation=True, return_tensors="pt"
    ).input_ids
    mask = tokens != text_tokenizer.pad_token_id
    system = torch.tensor(
        [text_tokenizer(system_prompt, truncation=True, max_length=text_tokenizer_max_length).input_ids]
    )
    system = system.expand(len(prompts), -1)
    hidden_states = text_model(
        torch.cat([system, tokens], dim=1), attention_mask=torch.cat([torch.ones_like(system), mask.long()], dim=1)
    ).last_hidden_state
    return tokens, mask, mask.cumsum(1) - 1, hidden_states[:, system.shape[1] :].float()
