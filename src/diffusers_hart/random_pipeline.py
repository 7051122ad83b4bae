# SPDX-License-Identifier: Apache-2.0
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2Model

from .models import HARTTransformer2DModel, HybridTokenizer, ResidualDiffusionMLP
from .pipelines import HARTPipeline
from .schedulers import HARTResidualScheduler, HARTScheduler


def random_pipeline(seed: int = 0) -> HARTPipeline:
    r"""
    A complete but tiny and **untrained** pipeline, which draws noise of 128 x 128 pixels in less than a second on a
    CPU. It stands in for a checkpoint where none is at hand: to see that an installation works, to try the command
    line, to test code that calls a pipeline. Prompts and seeds give different pictures; the pictures mean nothing.

    Args:
        seed (`int`, defaults to `0`): Seed of the weights. The global random state is left as it was.

    Returns:
        [`HARTPipeline`]: In float32, on the CPU, in evaluation mode.
    """
    scales = (1, 2, 3, 4, 6, 8)
    tokenizer = _byte_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # of the CPU alone, unlike torch.manual_seed
        text_encoder = Qwen2Model(
            Qwen2Config(
                vocab_size=len(tokenizer),
                hidden_size=64,
                intermediate_size=128,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                bos_token_id=None,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
        transformer = HARTTransformer2DModel(
            in_channels=8,
            codebook_size=512,
            num_layers=2,
            num_attention_heads=4,
            attention_head_dim=16,
            caption_channels=64,
            caption_length=128,
            sample_size=scales[-1],
        )
        residual_mlp = ResidualDiffusionMLP(in_channels=8, condition_dim=64, hidden_size=64, num_layers=2)
        vae = HybridTokenizer(
            latent_channels=8,
            block_out_channels=(16, 16, 32, 32, 64),
            layers_per_block=1,
            norm_num_groups=8,
            codebook_size=512,
            scales=scales,
        )
    with torch.no_grad():
        transformer.proj_out.weight.mul_(16)  # sharp enough for the prompt to decide
        vae.decoder.conv_out.weight.mul_(4)  # and for the picture to have contrast
    return HARTPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder.eval(),
        transformer=transformer.eval(),
        vae=vae.eval(),
        scheduler=HARTScheduler(schedules=(scales,)),
        residual_mlp=residual_mlp.eval(),
        residual_scheduler=HARTResidualScheduler(),
    )


def _byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte of UTF-8, so that no text is unknown to it, and one that ends and pads texts."""
    alphabet = {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|endoftext|>", padding_side="right"
    )
