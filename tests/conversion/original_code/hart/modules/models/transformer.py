# SPDX-License-Identifier: Apache-2.0
"""
A stand-in for the original implementation: the interface that `run_original.py` uses, on our own models. It shows that
the comparison is put together right, not that the implementations agree; the golden tensors show that.
"""

from pathlib import Path
from types import SimpleNamespace

import torch

from diffusers_hart import HARTKVCache, HARTPipeline
from diffusers_hart.conversion import load_hart_checkpoint
from diffusers_hart.conversion.key_tables import residual_mlp_table, to_ours, transformer_table


class DiffusionLoss(torch.nn.Module):
    def __init__(self, pipe):
        super().__init__()
        self.pipe = (pipe,)

    def net(self, x, t, c):
        return self.pipe[0].residual_mlp(x, t, c).sample

    def sample(self, z, temperature=1.0, cfg=1.5):
        pipe, channels = self.pipe[0], self.pipe[0].vae.config.latent_channels
        noise = torch.randn(len(z) // 2, channels)
        pipe._guidance_scale = cfg
        residual = pipe.sample_residual(
            z.unflatten(0, (2, -1)),
            noise.T[None, :, :, None],
            cfg,
            pipe.scheduler.config.num_inference_steps,
            temperature,
            None,
        )
        return residual[0, :, :, 0].T.repeat(2, 1)


class HARTForT2I(torch.nn.Module):
    @classmethod
    def from_pretrained(cls, path):
        return cls(Path(path).parent)

    def __init__(self, checkpoint):
        super().__init__()
        pipe = HARTPipeline(tokenizer=None, text_encoder=None, **load_hart_checkpoint(checkpoint, use_ema=False))
        self.transformer, self.residual_mlp = pipe.transformer, pipe.residual_mlp
        self.vae, self.scheduler = pipe.vae, pipe.scheduler
        self.head_nm, self.head = self.transformer.norm_out, self.transformer.proj_out
        self.word_embed, self.decoder_norm = self.transformer.x_embedder, self.transformer.residual_norm
        self.patch_nums = tuple(self.vae.config.scales)
        self.context_token = self.transformer.config.caption_length
        self.diffloss = DiffusionLoss(pipe)
        self.vae_proxy = (
            SimpleNamespace(
                encoder=self.vae.encoder,
                quant_conv=self.vae.quant_conv,
                post_quant_conv=self.vae.post_quant_conv,
                quantize=SimpleNamespace(embedding=self.vae.codebook, f_to_idxBl_and_frest=self.codes_and_last_target),
                fhat_to_img=lambda latents: self.vae.decode(latents).sample,
            ),
        )

    def load_state_dict(self, weights):
        for model, table in (
            (self.transformer, transformer_table(self.transformer)),
            (self.residual_mlp, residual_mlp_table(self.residual_mlp)),
        ):
            shapes = {name: parameter.shape for name, parameter in model.state_dict().items()}
            model.load_state_dict(to_ours(weights, table, shapes))

    def codes_and_last_target(self, latents, v_patch_nums):
        codes, partial_latents, _ = self.vae.quantize(latents, v_patch_nums)
        target = (latents - partial_latents[-2]).flatten(2).transpose(1, 2)
        return [*codes.split([side * side for side in v_patch_nums], dim=1), target]

    def autoregressive_infer_cfg(
        self, B, label_B, g_seed, cfg, top_p, more_smooth, context_position_ids, context_mask, final_stage
    ):
        assert final_stage == 1 and not more_smooth
        scales = self.patch_nums
        unconditional_mask = torch.zeros_like(context_mask)
        unconditional_mask[:, 0] = 1
        cache, scale_input = HARTKVCache(), None
        latents = torch.zeros(B, self.vae.config.latent_channels, scales[-1], scales[-1])
        for k in range(len(scales)):
            output = self.transformer(
                scale_input,
                scales,
                encoder_hidden_states=torch.cat([label_B, torch.zeros_like(label_B)]),
                encoder_attention_mask=torch.cat([context_mask, unconditional_mask]).long(),
                scale_index=k,
                kv_cache=cache,
            )
            conditional, unconditional = output.logits.chunk(2)
            t = self.scheduler.guidance(cfg, k, len(scales))
            generator = torch.Generator().manual_seed(g_seed)
            logits = (1 + t) * conditional - t * unconditional
            codes = self.scheduler.step(logits, k, len(scales), top_p=top_p, smooth=False, generator=generator).codes
            latents = self.vae.accumulate(latents, self.vae.codebook(codes), k, scales)
            if k < len(scales) - 1:
                scale_input = self.vae.next_scale_input(latents, k + 1, scales).repeat(2, 1, 1)
        return self.vae.decode(latents).sample.add(1).mul(0.5)
