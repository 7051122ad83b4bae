# SPDX-License-Identifier: Apache-2.0
"""
The half of `verify_conversion.py` that runs the original implementation and writes down what it computes. It is
started by that script, in the Python that the original runs in, and imports nothing of this package.
"""

import json
import os
import sys

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoTokenizer


# So little that the best code alone is left: the original draws codes, and has no other way not to.
GREEDY_TOP_P = 1e-9


def main(settings_file):
    with open(settings_file) as file:
        settings = json.load(file)
    sys.path.insert(0, settings["original_code"])
    from hart.modules.models.transformer import HARTForT2I
    from hart.utils import encode_prompts, llm_system_prompt

    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    device, dtype = settings["device"], getattr(torch, settings["dtype"])
    autocast = torch.autocast(device.split(":")[0], dtype=dtype, enabled=dtype != torch.float32)
    llm = os.path.join(settings["checkpoint_path"], "llm")
    model = HARTForT2I.from_pretrained(llm)
    if settings["use_ema"]:
        weights = torch.load(os.path.join(llm, "ema_model.bin"), map_location="cpu", weights_only=True)
        model.load_state_dict(weights)
    model = model.to(device).eval()
    text_model = AutoModel.from_pretrained(settings["text_encoder_path"]).to(device).eval()
    text_tokenizer = AutoTokenizer.from_pretrained(settings["text_encoder_path"])
    record = {"image": load_file(settings["image"])["image"]}

    with torch.no_grad():
        record.update(tokenizer_results(model, record["image"].to(device)))
        with autocast:
            _, mask, positions, embeds = encode_prompts(
                settings["prompts"], text_model, text_tokenizer, model.context_token, llm_system_prompt, True
            )
            record.update({"text.embeds": embeds, "text.mask": mask.long()})
            record.update(generation_results(model, embeds, mask, positions, settings))
    save_file({name: tensor.cpu().contiguous() for name, tensor in record.items()}, settings["record"])


def tokenizer_results(model, image):
    vae = model.vae_proxy[0]
    latents = vae.quant_conv(vae.encoder(image))
    *codes, target = vae.quantize.f_to_idxBl_and_frest(latents, v_patch_nums=model.patch_nums)
    return {
        "tokenizer.latents": latents,
        "tokenizer.codes": torch.cat(codes, dim=1),
        "tokenizer.last_scale_target": target,
        "decoder.latents": latents.clone(),
        "decoder.image": vae.fhat_to_img(latents),
    }


def generation_results(model, embeds, mask, positions, settings):
    vae, guidance_scale, batch_size = model.vae_proxy[0], settings["guidance_scale"], len(embeds)
    hidden_states, logits, codes, latents = [], [], [], []
    hooks = [
        model.head_nm.register_forward_pre_hook(lambda _, inputs: hidden_states.append(inputs[0])),
        model.head.register_forward_hook(lambda _, inputs, output: logits.append(output.float())),
        vae.quantize.embedding.register_forward_pre_hook(lambda _, inputs: codes.append(inputs[0])),
        vae.post_quant_conv.register_forward_pre_hook(lambda _, inputs: latents.append(inputs[0].clone())),
    ]
    # The final stage is told to leave the residual out: its noise cannot be given or switched off there.
    model.autoregressive_infer_cfg(
        B=batch_size,
        label_B=embeds,
        g_seed=0,
        cfg=guidance_scale,
        top_p=GREEDY_TOP_P,
        more_smooth=False,
        context_position_ids=positions,
        context_mask=mask,
        final_stage=1,
    )
    for hook in hooks:
        hook.remove()

    scales = model.patch_nums
    guided = []
    for k, side in enumerate(scales):
        # The last scale has the guidance of the one before; the first is read off the last text position.
        guidance = guidance_scale * min(k, len(scales) - 2) / (len(scales) - 1)
        conditional, unconditional = logits[k][:, -side * side :].chunk(2)
        guided.append((1 + guidance) * conditional - guidance * unconditional)
    guidance = guidance_scale * (len(scales) - 2) / (len(scales) - 1)

    last_codes = model.word_embed(vae.quantize.embedding(codes[-1])).repeat(2, 1, 1)
    condition = model.decoder_norm(hidden_states[-1].to(last_codes.dtype) + last_codes)
    flat_condition = condition.flatten(0, 1)
    num_tokens, channels = len(flat_condition) // 2, latents[-1].shape[1]

    # The original draws the first noise on the CPU from the global generator: the same seed gives it away.
    torch.manual_seed(0)
    noise = torch.randn(num_tokens, channels)
    torch.manual_seed(0)
    residual = model.diffloss.sample(z=flat_condition, temperature=0.0, cfg=guidance)[:num_tokens]
    side = scales[-1]

    def as_latents(tokens):
        return tokens.reshape(batch_size, side * side, channels).transpose(1, 2).reshape(-1, channels, side, side)

    final_latents = latents[-1] + as_latents(residual)
    sample_condition = flat_condition[: min(64, num_tokens)]
    sample = noise[: len(sample_condition)].to(sample_condition)
    timestep = torch.linspace(0, 999, len(sample), device=sample.device).long()
    return {
        "generation.codes": torch.cat(codes, dim=1),
        "generation.logits": torch.cat(guided, dim=1),
        "generation.residual_condition": condition,
        "residual.sample": sample,
        "residual.timestep": timestep,
        "residual.condition": sample_condition.clone(),
        "residual.output": model.diffloss.net(sample, timestep, sample_condition),
        "residual.latents": as_latents(residual),
        "picture.noise": as_latents(noise),
        "picture.latents": final_latents,
        "picture.image": vae.fhat_to_img(final_latents).float().add(1).mul(0.5),
    }


if __name__ == "__main__":
    main(sys.argv[1])
