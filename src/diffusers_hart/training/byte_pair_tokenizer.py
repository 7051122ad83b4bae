# SPDX-License-Identifier: Apache-2.0
from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast


END_OF_TEXT = "<|endoftext|>"


def train_byte_pair_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    r"""
    A tokenizer of byte pairs, from the texts it is for. All bytes are in its vocabulary, so no text is unknown to it;
    one special token ends and, on the right, pads texts.

    Args:
        texts (`Iterable[str]`): What to learn the pairs from.
        vocab_size (`int`): Number of tokens, at least 257; fewer come out where the texts have no more pairs.

    Raises:
        ValueError: If the bytes do not fit the vocabulary.
    """
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size < len(alphabet) + 1:
        raise ValueError(
            f"A vocabulary of {vocab_size} is too small: the bytes and the end of text take {len(alphabet) + 1}."
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=sorted(alphabet),
        special_tokens=[END_OF_TEXT],
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT, padding_side="right"
    )
