# SPDX-License-Identifier: Apache-2.0
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin, AttentionModuleMixin
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput, apply_lora_scale
from diffusers.utils.accelerate_utils import apply_forward_hook

from ..strict_loading import StrictLoadingMixin
from .joined_projections import JoinedProjections


@dataclass
class HARTTransformer2DModelOutput(BaseOutput):
    """
    Output of [`HARTTransformer2DModel`], for the `N` positions that predict something: the tokens of one scale, or,
    under teacher forcing, those of all scales (the last one without its dropped tokens).

    Args:
        logits (`torch.Tensor` of shape `(batch_size, N, codebook_size)`, float32 outside autocast):
            Scores of the codes.
        hidden_states (`torch.Tensor` of shape `(batch_size, N, inner_dim)`):
            The last block's output; [`HARTTransformer2DModel.residual_condition`] takes that of the last scale.
    """

    logits: torch.Tensor
    hidden_states: torch.Tensor | None = (
        None  # accelerate's offload hooks rebuild outputs whose later fields are optional
    )


class HARTKVLayer(NamedTuple):
    """
    Keys and values of one block, views of a [`HARTKVCache`] of shape `(batch_size, tokens, heads, head_dim)`. The last
    tokens are those of the scale being predicted: the block writes them before it attends to all.
    """

    key: torch.Tensor
    value: torch.Tensor

    def append(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the scale's keys and values; returns those of all tokens."""
        start = self.key.shape[1] - key.shape[1]
        self.key[:, start:] = key
        self.value[:, start:] = value
        return self.key, self.value


class HARTKVSlice(NamedTuple):
    """
    The same as [`HARTKVLayer`], the whole buffers of the cache with the first token of a block and the one behind its
    last. Compilers know of slices that they make how these are aligned. Of views that they are given they do not, and
    load and store element by element.
    """

    key: torch.Tensor
    value: torch.Tensor
    start: int
    end: int

    def append(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the scale's keys and values; returns those of all tokens."""
        whole = slice(self.start, self.end)
        return HARTKVLayer(self.key[:, whole], self.value[:, whole]).append(key, value)


class HARTKVCache:
    """
    What generation carries from scale to scale: the keys and values of every block and what the condition decided
    once, the modulation of the norms and where the picture's coordinates start. Filled by
    [`HARTTransformer2DModel.forward`], whose scale 0 starts it anew, dropped before decoding.

    The last scale's keys and values are not kept, and take next to no memory: each block's lie where those of the block
    before it were, which nothing reads any more. So blocks are stored in descending order, the first one at the end:
    `key` and `value` have the shape `(batch_size, 2 + num_layers * capacity + last_tokens, heads, head_dim)`. The two
    tokens before them all are there for compilers, to which a block that starts at 0 or 1 would be a case of its own.

    Args:
        sliced_by_blocks (`bool`, defaults to `False`):
            Whether blocks get the whole buffers and slice them, which is faster where they are compiled for all scales.
    """

    first_start = 2

    def __init__(self, sliced_by_blocks: bool = False):
        self.sliced_by_blocks = sliced_by_blocks
        self.key: torch.Tensor | None = None
        self.value: torch.Tensor | None = None
        self.num_layers = 0
        self.capacity = 0
        self.length = 0
        self.num_scales = 0
        self.temb: torch.Tensor | None = None
        self.offset: torch.Tensor | None = None
        self.hidden_states: torch.Tensor | None = None

    def open(
        self,
        num_layers: int,
        capacity: int,
        last_tokens: int,
        heads: int,
        like: torch.Tensor,
        temb: torch.Tensor,
        offset: torch.Tensor,
    ):
        """Start a picture: room for `capacity` tokens a block, for a batch and in the dtype of tokens `like`."""
        tokens = self.first_start + num_layers * capacity + last_tokens
        shape = (len(like), tokens, heads, like.shape[-1] // heads)
        dtype = autocast_dtype(like)
        if self.key is None or self.key.shape != shape or self.key.dtype != dtype or self.key.device != like.device:
            self.key, self.value = (torch.empty(shape, dtype=dtype, device=like.device) for _ in range(2))
        self.num_layers, self.capacity = num_layers, capacity
        self.length = self.num_scales = 0
        self.temb, self.offset = temb, offset

    def layers(self, new_tokens: int) -> list[HARTKVLayer | HARTKVSlice]:
        """What each block gets at a scale of `new_tokens` tokens."""
        starts = [self.first_start + (self.num_layers - 1 - i) * self.capacity for i in range(self.num_layers)]
        total = self.length + new_tokens
        if self.sliced_by_blocks:
            return [HARTKVSlice(self.key, self.value, start, start + total) for start in starts]
        return [
            HARTKVLayer(self.key[:, start : start + total], self.value[:, start : start + total]) for start in starts
        ]

    def close_scale(self, new_tokens: int, hidden_states: torch.Tensor):
        """Count a scale that all blocks have written; `hidden_states` is what the last one made of it."""
        self.length += new_tokens
        self.num_scales += 1
        self.hidden_states = hidden_states

    def keep_samples(self, batch_size: int):
        """Forget all but the first samples of the batch; nothing is copied."""
        self.key, self.value, self.offset = self.key[:batch_size], self.value[:batch_size], self.offset[:batch_size]
        self.temb, self.hidden_states = self.temb[:batch_size], self.hidden_states[:batch_size]


def autocast_dtype(hidden_states: torch.Tensor) -> torch.dtype:
    """What linear layers make of `hidden_states`."""
    device_type = hidden_states.device.type
    if torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return hidden_states.dtype


class HARTRotaryPosEmbed:
    """
    Rotary embeddings: one-dimensional for text, two-dimensional for the tokens of a scale. Angles are float32; cosines
    and sines have the shape `(batch_size, tokens, 1, head_dim)` and belong to a rotation of halves, in which element
    `i` pairs with `i + head_dim / 2`: the sines of the first half are negative, so that [`apply_rotary_emb`] need only
    swap the halves.
    """

    def __init__(self, head_dim: int, theta: float):
        self.head_dim = head_dim
        self.theta = theta

    def text(self, attention_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Angles of text tokens at `cumsum(attention_mask) - 1`, from a mask of shape `(batch_size, tokens)`."""
        positions = (attention_mask.long().cumsum(-1) - 1).float()
        angles = positions[..., None] * self._frequencies(self.head_dim // 2, positions.device)
        return self._cos_sin(torch.cat([angles, angles], dim=-1))

    def visual(self, coordinates: torch.Tensor, offset: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Angles of picture tokens, from rows and columns of shape `(batch_size or 1, tokens, 2)` and the text position
        `(batch_size,)` that both axes start from.
        """
        frequencies = self._frequencies(self.head_dim // 4, coordinates.device)
        rows, columns = ((coordinates + offset[:, None, None])[..., None] * frequencies).unbind(-2)
        # The first half of a head turns by its row and its partner in the second half by its column, so this is no
        # rotation; the pretrained weights were trained with it.
        return self._cos_sin(torch.cat([rows, rows, columns, columns], dim=-1))

    def _frequencies(self, count: int, device: torch.device) -> torch.Tensor:
        return self.theta ** (-torch.arange(count, device=device, dtype=torch.float32) / count)

    def _cos_sin(self, angles: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        sin = angles.sin()
        sin[..., : self.head_dim // 2].neg_()
        return angles.cos()[:, :, None], sin[:, :, None]


def token_counts(scales: Sequence[int]) -> list[int]:
    """How many tokens the scales 1 to k have together, for `k` from 0 to the last."""
    return list(itertools.accumulate((side * side for side in scales[1:]), initial=0))


def scale_coordinates(scales: Sequence[int], scale_index: int, device: torch.device) -> torch.Tensor:
    """Rows and columns `(side * side, 2)` of a scale's tokens, float32, in tokens of the last scale."""
    axis = torch.arange(scales[scale_index], device=device, dtype=torch.float32) * (scales[-1] / scales[scale_index])
    return torch.stack(torch.meshgrid(axis, axis, indexing="ij"), dim=-1).flatten(0, 1)


def apply_rotary_emb(hidden_states: torch.Tensor, rotary_emb: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    cos, sin = rotary_emb
    first, second = hidden_states.chunk(2, dim=-1)
    return torch.addcmul(hidden_states * cos, torch.cat([second, first], dim=-1), sin)


def rms_norm(hidden_states: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
    """
    RMS norm over the last dimension with float32 statistics: one fused kernel, in and out in the dtype of
    `hidden_states` under autocast too, which would write float32.
    """
    shape = hidden_states.shape[-1:]
    weight = None if weight is None else weight.to(hidden_states.dtype)
    if not torch.is_autocast_enabled(hidden_states.device.type):
        return F.rms_norm(hidden_states, shape, weight, eps)
    with torch.autocast(hidden_states.device.type, enabled=False):
        return F.rms_norm(hidden_states, shape, weight, eps)


class HARTRMSNorm(nn.RMSNorm):
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return rms_norm(hidden_states, self.weight, self.eps)


class HARTAttnProcessor:
    """
    Attention of [`HARTAttention`], causal by scale: with a cache, every token sees all that came before and its own
    scale; without, `segments` gives the lengths of the text and the scales, and each segment sees itself and those
    before it.
    """

    _attention_backend = None
    _parallel_config = None

    def __call__(
        self,
        attn: "HARTAttention",
        hidden_states: torch.Tensor,
        rotary_emb: tuple[torch.Tensor, torch.Tensor],
        segments: Sequence[int] | None = None,
        kv_cache: HARTKVLayer | HARTKVSlice | None = None,
    ) -> torch.Tensor:
        if attn.fused_projections:
            query, key, value = attn.to_qkv(hidden_states).chunk(3, dim=-1)
        else:
            query, key, value = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
        query, key, value = (tensor.unflatten(-1, (attn.heads, -1)) for tensor in (query, key, value))

        if attn.logit_scale is not None:
            # Of root mean square 1, not of length 1: the softmax scale makes up for it.
            query, key = rms_norm(query, None, eps=1e-24), rms_norm(key, None, eps=1e-24)
            query = query * attn.logit_scale.float().clamp(max=math.log(100)).exp()[:, None].to(query.dtype)
        query, key = apply_rotary_emb(query, rotary_emb), apply_rotary_emb(key, rotary_emb)

        if kv_cache is not None:
            key, value = kv_cache.append(key, value)
        outputs, end = [], key.shape[1] - query.shape[1]
        for segment in query.split(segments or query.shape[1], dim=1):
            end += segment.shape[1]
            output = dispatch_attention_fn(
                segment,
                key[:, :end],
                value[:, :end],
                scale=attn.softmax_scale,
                backend=self._attention_backend,
                parallel_config=self._parallel_config,
            )
            outputs.append(output)
        output = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)
        hidden_states = output.flatten(2).to(hidden_states.dtype)
        return attn.to_out[1](attn.to_out[0](hidden_states))


class HARTAttention(JoinedProjections, AttentionModuleMixin):
    """Self-attention with biases on query and value but not on key and, optionally, sharpened cosine similarity."""

    _joined_projection, _single_projections = "to_qkv", ("to_q", "to_k", "to_v")
    _default_processor_cls = HARTAttnProcessor
    _available_processors = [HARTAttnProcessor]

    def __init__(self, dim: int, heads: int, qk_norm: bool):
        super().__init__()
        self.heads = heads
        self.use_bias = True
        self.to_q = nn.Linear(dim, dim)
        self.to_k = nn.Linear(dim, dim, bias=False)
        self.to_v = nn.Linear(dim, dim)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim), nn.Dropout(0.0)])
        # exp(logit_scale) is the inverse temperature of a head's cosine similarities; VAR starts it at 4.
        self.logit_scale = nn.Parameter(torch.full((heads,), math.log(4.0))) if qk_norm else None
        # A quarter of the usual scale: the pretrained weights without cosine similarity were trained with it.
        self.softmax_scale = heads / dim if qk_norm else 0.25 / math.sqrt(dim // heads)
        self.set_processor(self._default_processor_cls())

    def forward(self, hidden_states: torch.Tensor, **kwargs) -> torch.Tensor:
        return self.processor(self, hidden_states, **kwargs)


class HARTFeedForward(JoinedProjections):
    _joined_projection, _single_projections = "gate_up_proj", ("gate_proj", "up_proj")

    def __init__(self, dim: int, mlp_ratio: float):
        super().__init__()
        hidden_dim = (int(dim * mlp_ratio * 2 / 3) + 255) // 256 * 256
        self.gate_proj = nn.Linear(dim, hidden_dim, bias=False)
        self.up_proj = nn.Linear(dim, hidden_dim, bias=False)
        self.down_proj = nn.Linear(hidden_dim, dim, bias=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if self.fused_projections:
            gate, up = self.gate_up_proj(hidden_states).chunk(2, dim=-1)
        else:
            gate, up = self.gate_proj(hidden_states), self.up_proj(hidden_states)
        return self.down_proj(F.silu(gate) * up)


class HARTTransformerBlock(nn.Module):
    def __init__(self, dim: int, heads: int, mlp_ratio: float, qk_norm: bool, norm_eps: float, modulated: bool):
        super().__init__()
        self.norm = HARTRMSNorm(dim, eps=norm_eps)
        self.attn = HARTAttention(dim, heads, qk_norm)
        self.ff = HARTFeedForward(dim, mlp_ratio)
        self.modulation = nn.Linear(dim, 6 * dim) if modulated else None

    def forward(
        self,
        hidden_states: torch.Tensor,
        rotary_emb: tuple[torch.Tensor, torch.Tensor],
        temb: torch.Tensor | None = None,
        segments: Sequence[int] | None = None,
        kv_cache: HARTKVLayer | HARTKVSlice | None = None,
    ) -> torch.Tensor:
        # The pretrained weights use one norm weight before the attention and before the MLP.
        attention = {"rotary_emb": rotary_emb, "segments": segments, "kv_cache": kv_cache}
        if self.modulation is None:
            hidden_states = hidden_states + self.attn(self.norm(hidden_states), **attention)
            return hidden_states + self.ff(self.norm(hidden_states))

        modulation = self.modulation(F.silu(temb))[:, None].chunk(6, dim=-1)
        attn_gate, ff_gate, attn_scale, ff_scale, attn_shift, ff_shift = modulation
        attn_output = self.attn(self.norm(hidden_states) * (1 + attn_scale) + attn_shift, **attention)
        hidden_states = hidden_states + attn_gate * attn_output
        return hidden_states + ff_gate * self.ff(self.norm(hidden_states) * (1 + ff_scale) + ff_shift)


class HARTLevelEmbedding(nn.Module):
    """Sinusoidal embedding of the index of a scale, through an MLP."""

    def __init__(self, dim: int):
        super().__init__()
        self.proj = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.embedder = TimestepEmbedding(256, dim)

    def forward(self, levels: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return self.embedder(self.proj(levels).to(dtype))


def _run_block(block: HARTTransformerBlock, *arguments) -> torch.Tensor:
    return block(*arguments)


class Float32Linear(nn.Linear):
    """A linear layer that computes in float32, outside autocast, whatever its input and its weights are kept in."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return F.linear(hidden_states.float(), self.weight.float(), self.bias.float())


class HARTAdaLayerNormOut(nn.Module):
    """`norm(x) * (1 + scale) + shift`, scale and shift from the condition, in float32 outside autocast."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.norm = HARTRMSNorm(dim, eps=eps)
        self.linear = Float32Linear(dim, 2 * dim)

    def forward(self, hidden_states: torch.Tensor, temb: torch.Tensor) -> torch.Tensor:
        scale, shift = self.linear(F.silu(temb.float()))[:, None].chunk(2, dim=-1)
        return self.norm(hidden_states.float()) * (1 + scale) + shift


class HARTTransformer2DModel(StrictLoadingMixin, ModelMixin, ConfigMixin, PeftAdapterMixin, AttentionMixin):
    r"""
    The autoregressive transformer over scales of HART ([paper](https://huggingface.co/papers/2410.10812)). It reads a
    text (or a class) and then the picture at growing scales, and predicts at every scale the codes of all its tokens
    at once. One class for both kinds of conditioning: `caption_channels` makes a text-to-image model,
    `num_classes` a class-conditional one, whose blocks are modulated by the class.

    Args:
        in_channels (`int`, defaults to `32`): Channels of the latent.
        codebook_size (`int`, defaults to `4096`): Number of codes.
        num_layers (`int`, defaults to `24`): Number of blocks.
        num_attention_heads (`int`, defaults to `24`): Number of heads.
        attention_head_dim (`int`, defaults to `64`): Width of a head, a multiple of 4.
        mlp_ratio (`float`, defaults to `4.0`):
            Width of the MLPs of the blocks, relative to a plain two-layer MLP of as many parameters.
        caption_channels (`int`, *optional*, defaults to `1536`): Width of the text embeddings.
        caption_length (`int`, defaults to `300`):
            Number of text tokens the model was trained with; what pipelines pad and cut prompts to.
        num_classes (`int`, *optional*): Number of classes; one more, the last, stands for "no class".
        qk_norm (`bool`, defaults to `True`): Whether attention goes by sharpened cosine similarity.
        num_levels (`int`, *optional*):
            Size of the table of level embeddings; without it, levels are embedded by an MLP.
        sample_size (`int`, defaults to `64`): Side of the latents the model was trained on last.
        norm_eps (`float`, defaults to `1e-6`): Epsilon of the norms.
        rope_theta (`float`, defaults to `10000.0`): Base of the rotary embeddings.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["HARTTransformerBlock"]
    _repeated_blocks = ["HARTTransformerBlock"]
    _skip_layerwise_casting_patterns = ["norm", "level_embedder", "logit_scale"]
    _keep_in_fp32_modules = ["norm_out", "proj_out", "logit_scale"]
    _skip_keys = ["kv_cache"]
    _group_offload_block_modules = ["x_embedder", "residual_norm"]  # which `residual_condition` calls

    @register_to_config
    def __init__(
        self,
        in_channels: int = 32,
        codebook_size: int = 4096,
        num_layers: int = 24,
        num_attention_heads: int = 24,
        attention_head_dim: int = 64,
        mlp_ratio: float = 4.0,
        caption_channels: int | None = 1536,
        caption_length: int = 300,
        num_classes: int | None = None,
        qk_norm: bool = True,
        num_levels: int | None = None,
        sample_size: int = 64,
        norm_eps: float = 1e-6,
        rope_theta: float = 10000.0,
    ):
        super().__init__()
        if (caption_channels is None) == (num_classes is None):
            raise ValueError(
                f"Either `caption_channels` or `num_classes` must be given, not {caption_channels=} and {num_classes=}."
            )
        if attention_head_dim % 4:
            raise ValueError(f"`attention_head_dim` must be a multiple of 4, not {attention_head_dim}.")
        if caption_length < 1 or rope_theta <= 0:
            raise ValueError(
                f"`caption_length` and `rope_theta` must be above 0, not {caption_length=}, {rope_theta=}."
            )
        self.inner_dim = num_attention_heads * attention_head_dim

        # 1. Inputs
        self.x_embedder = nn.Linear(in_channels, self.inner_dim)
        if num_levels is None:
            self.level_embedder = HARTLevelEmbedding(self.inner_dim)
        else:
            self.level_embedder = nn.Embedding(num_levels, self.inner_dim)
        if num_classes is None:
            self.context_norm = HARTRMSNorm(caption_channels, eps=norm_eps)
            self.context_embedder = nn.Linear(caption_channels, self.inner_dim)
        else:
            self.class_embedder = nn.Embedding(num_classes + 1, self.inner_dim)
            self.pos_start = nn.Parameter(torch.zeros(1, 1, self.inner_dim))
        self.rotary_embed = HARTRotaryPosEmbed(attention_head_dim, rope_theta)

        # 2. Blocks
        self.transformer_blocks = nn.ModuleList(
            [
                HARTTransformerBlock(
                    self.inner_dim,
                    num_attention_heads,
                    mlp_ratio,
                    qk_norm,
                    norm_eps,
                    modulated=num_classes is not None,
                )
                for _ in range(num_layers)
            ]
        )

        # 3. Outputs
        self.norm_out = HARTAdaLayerNormOut(self.inner_dim, norm_eps)
        self.proj_out = Float32Linear(self.inner_dim, codebook_size)
        self.residual_norm = HARTRMSNorm(self.inner_dim, eps=norm_eps)

        self.gradient_checkpointing = False

    def fuse_qkv_projections(self):
        """
        Join the projections of a block that read the same: query, key and value, and gate and up of the MLP. Raises
        `ValueError` if there are adapters on them.
        """
        modules = [module for module in self.modules() if isinstance(module, JoinedProjections)]
        for module in modules:
            module.check_projections()
        for module in modules:
            module.fuse_projections()

    def unfuse_qkv_projections(self):
        """Go back to several projections."""
        for module in self.modules():
            if isinstance(module, JoinedProjections):
                module.unfuse_projections()

    def check_projections_apart(self):
        """Raises `ValueError` if projections are joined: LoRA layers on the several would do nothing."""
        if any(module.fused_projections for module in self.modules() if isinstance(module, JoinedProjections)):
            raise ValueError(
                "The projections of this transformer are fused, so that LoRA layers on them would do nothing: call "
                "`transformer.unfuse_qkv_projections()` first."
            )

    def add_adapter(self, adapter_config: Any, adapter_name: str = "default"):
        """As in diffusers. Raises `ValueError` if projections are joined."""
        self.check_projections_apart()
        super().add_adapter(adapter_config, adapter_name)

    @apply_lora_scale("attention_kwargs")
    def forward(
        self,
        hidden_states: torch.Tensor | None,
        scales: Sequence[int],
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        class_labels: torch.LongTensor | None = None,
        scale_index: int | None = None,
        kv_cache: HARTKVCache | None = None,
        kept_tokens: torch.LongTensor | None = None,
        guidance: float | torch.Tensor | None = None,
        run_block: Callable[..., torch.Tensor] | None = None,
        attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
    ) -> HARTTransformer2DModelOutput | tuple:
        r"""
        Predict the codes of one scale from the scales before it (generation, with `scale_index` and `kv_cache`), or of
        all scales at once from their true inputs (teacher forcing, without).

        Args:
            hidden_states (`torch.Tensor` of shape `(batch_size, tokens, in_channels)`, *optional*):
                Inputs of one scale, or of the scales 1 to K - 1 or, of these, the first ones alone. `None` for scale 0,
                which has no input of its own: its one token is predicted from the condition.
            scales (`Sequence[int]`): Sides of all `K` scales in tokens.
            encoder_hidden_states (`torch.Tensor` of shape `(batch_size, text_tokens, caption_channels)`, *optional*):
                Text embeddings; needed for scale 0 and under teacher forcing.
            encoder_attention_mask (`torch.Tensor` of shape `(batch_size, text_tokens)`, *optional*):
                1 for text and 0 for padding. It decides the positions alone: padding takes part in attention.
            class_labels (`torch.LongTensor` of shape `(batch_size,)`, *optional*): Classes, in a class model.
            scale_index (`int`, *optional*): The scale to predict, counted from 0; `None` is teacher forcing.
            kv_cache ([`HARTKVCache`], *optional*): The cache that the scales before were run with.
            kept_tokens (`torch.LongTensor` of shape `(batch_size, kept)`, *optional*):
                Which tokens of the last of the given scales go through the blocks. Under teacher forcing (token drop)
                nothing is predicted for the others; in generation (token pruning) they get the last block's output of
                the nearest token of the scale before.
            guidance (`float` or `torch.Tensor` of shape `()` and dtype float32, *optional*):
                Classifier-free guidance. The batch is then the conditional half and the unconditional one, and the
                logits, of half the batch, are `(1 + guidance) * conditional - guidance * unconditional`.
            run_block (`Callable`, *optional*):
                Called as `run_block(block, *arguments)` for each block in place of `block(*arguments)`: a compiled
                function, say.
            attention_kwargs (`dict`, *optional*): `{"scale": ...}` scales LoRA layers.
            return_dict (`bool`, defaults to `True`): Whether to return a [`HARTTransformer2DModelOutput`] or a tuple.

        Returns:
            [`HARTTransformer2DModelOutput`] or `tuple`: logits and hidden states.

        Raises:
            ValueError: If `hidden_states` are not the tokens of whole scales, or the cache not that of the scales before.
        """
        # 1. The condition, once a picture
        self._check_scale_inputs(hidden_states, scales, scale_index)
        opens_sequence = not scale_index
        run_block = run_block or _run_block
        if opens_sequence:
            prefix, rotary_emb, temb, offset = self._embed_condition(
                encoder_hidden_states, encoder_attention_mask, class_labels, scales
            )
            if kv_cache is not None:
                capacity = prefix.shape[1] + sum(side * side for side in scales[1:-1])
                last_tokens = scales[-1] ** 2 if len(scales) > 1 else 0
                num_layers, heads = len(self.transformer_blocks), self.config.num_attention_heads
                kv_cache.open(num_layers, capacity, last_tokens, heads, prefix, temb, offset)
        elif kv_cache is None or kv_cache.num_scales != scale_index:
            cached = 0 if kv_cache is None else kv_cache.num_scales
            raise ValueError(f"Scale {scale_index} needs a `kv_cache` of the scales before; this one holds {cached}.")
        else:
            temb, offset = kv_cache.temb, kv_cache.offset

        # 2. The tokens of the scales
        segments = None
        if scale_index is None:
            indices = range(1, token_counts(scales).index(hidden_states.shape[1]) + 1)
            hidden_states, visual_rotary_emb, lengths = self._embed_scales(
                hidden_states, indices, scales, offset, kept_tokens
            )
            hidden_states = torch.cat([prefix, hidden_states], dim=1)
            rotary_emb = tuple(torch.cat(pair, dim=1) for pair in zip(rotary_emb, visual_rotary_emb))
            segments = [prefix.shape[1], *lengths]
        elif scale_index == 0:
            hidden_states = prefix
        else:
            hidden_states, rotary_emb, _ = self._embed_scales(
                hidden_states, [scale_index], scales, offset, kept_tokens
            )
        rotary_emb = tuple(table.to(autocast_dtype(hidden_states)) for table in rotary_emb)

        # 3. Blocks
        num_tokens = hidden_states.shape[1]
        layers = [None] * len(self.transformer_blocks) if kv_cache is None else kv_cache.layers(num_tokens)
        for block, layer in zip(self.transformer_blocks, layers):
            arguments = (hidden_states, rotary_emb, temb, segments, layer)
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                hidden_states = self._gradient_checkpointing_func(block, *arguments)
            else:
                hidden_states = run_block(block, *arguments)

        # 4. Logits. Scale 0 is predicted from the last text position, even where that is padding.
        if opens_sequence:
            hidden_states = hidden_states[:, prefix.shape[1] - 1 :]
        elif scale_index is not None and kept_tokens is not None:
            hidden_states = self._restore(hidden_states, kept_tokens, kv_cache.hidden_states, scales, scale_index)
        if kv_cache is not None:
            kv_cache.close_scale(num_tokens, hidden_states)
        normalized = self.norm_out(hidden_states, temb)
        if guidance is not None:
            # Before the projection rather than behind it, which is linear: half the work.
            conditional, unconditional = normalized.chunk(2)
            normalized = torch.lerp(unconditional, conditional, 1 + guidance)
        logits = self.proj_out(normalized)
        if not return_dict:
            return logits, hidden_states
        return HARTTransformer2DModelOutput(logits=logits, hidden_states=hidden_states)

    @apply_forward_hook
    def residual_condition(self, hidden_states: torch.Tensor, code_embeds: torch.Tensor) -> torch.Tensor:
        r"""
        The condition of the residual diffusion: what the transformer knows of a last-scale token, its code included.

        Args:
            hidden_states (`torch.Tensor` of shape `(batch_size, tokens, inner_dim)`):
                `hidden_states` of the output, for tokens of the last scale.
            code_embeds (`torch.Tensor` of shape `(batch_size, tokens, in_channels)`):
                Vectors of the codes that were sampled there.

        Returns:
            `torch.Tensor` of shape `(batch_size, tokens, inner_dim)`.
        """
        return self.residual_norm(hidden_states + self.x_embedder(code_embeds.to(hidden_states.dtype)))

    def _embed_condition(
        self,
        encoder_hidden_states: torch.Tensor | None,
        encoder_attention_mask: torch.Tensor | None,
        class_labels: torch.LongTensor | None,
        scales: Sequence[int],
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor], torch.Tensor, torch.Tensor]:
        """What the sequence opens with: its tokens, their rotary embedding, the modulation and the picture's offset."""
        if self.config.num_classes is not None:
            temb = self.class_embedder(class_labels)
            offset = torch.zeros(len(temb), device=temb.device)
            prefix = temb[:, None] + self.pos_start + self._level(0, temb)
            coordinates = scale_coordinates(scales, 0, temb.device)[None]
            return prefix, self.rotary_embed.visual(coordinates, offset), temb, offset

        text = self.context_embedder(self.context_norm(encoder_hidden_states))
        # Over all tokens and before the level embedding: the pretrained head saw padding here too.
        temb = text.amax(dim=1)
        offset = encoder_attention_mask.long().sum(-1).float() - 1
        return text + self._level(0, text), self.rotary_embed.text(encoder_attention_mask), temb, offset

    def _check_scale_inputs(
        self, hidden_states: torch.Tensor | None, scales: Sequence[int], scale_index: int | None
    ) -> None:
        if scale_index == 0:
            return
        if scale_index is None:
            expected = token_counts(scales)
            which = "the scales 1 to K - 1 or the first of them"
        else:
            expected, which = [scales[scale_index] ** 2], f"scale {scale_index}"
        if hidden_states is None or hidden_states.shape[1] not in expected:
            given = "None" if hidden_states is None else f"of shape {tuple(hidden_states.shape)}"
            tokens = " or ".join(str(count) for count in expected)
            raise ValueError(
                f"`hidden_states` must be the tokens of {which} of {tuple(scales)}, {tokens} a sample, and is {given}."
            )

    def _embed_scales(
        self,
        hidden_states: torch.Tensor,
        indices: Sequence[int],
        scales: Sequence[int],
        offset: torch.Tensor,
        kept_tokens: torch.LongTensor | None = None,
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor], list[int]]:
        """Embedded tokens of consecutive scales, their rotary embedding and how many tokens each scale has."""
        hidden_states = list(hidden_states.split([scales[k] ** 2 for k in indices], dim=1))
        coordinates = [scale_coordinates(scales, k, hidden_states[0].device)[None] for k in indices]
        if kept_tokens is not None:
            hidden_states[-1] = hidden_states[-1].gather(
                1, kept_tokens[..., None].expand(-1, -1, self.config.in_channels)
            )
            coordinates = [xy.expand(len(kept_tokens), -1, -1) for xy in coordinates]
            coordinates[-1] = coordinates[-1].gather(1, kept_tokens[..., None].expand(-1, -1, 2))
        embedded = [self.x_embedder(tokens) + self._level(k, tokens) for k, tokens in zip(indices, hidden_states)]
        rotary_emb = self.rotary_embed.visual(torch.cat(coordinates, dim=1), offset)
        return torch.cat(embedded, dim=1), rotary_emb, [tokens.shape[1] for tokens in embedded]

    def _restore(
        self,
        hidden_states: torch.Tensor,
        kept_tokens: torch.LongTensor,
        coarse: torch.Tensor,
        scales: Sequence[int],
        scale_index: int,
    ) -> torch.Tensor:
        """All tokens of a scale: `hidden_states` of the kept ones, and of the others those of the scale before."""
        side, coarse_side = scales[scale_index], scales[scale_index - 1]
        axis = (torch.arange(side, device=coarse.device) + 0.5).mul_(coarse_side / side).long()
        restored = coarse[:, (axis[:, None] * coarse_side + axis).flatten()]
        return restored.scatter(1, kept_tokens[..., None].expand_as(hidden_states), hidden_states)

    def _level(self, level: int, like: torch.Tensor) -> torch.Tensor:
        """Embedding `(1, inner_dim)` of a level: 0 for the condition, k for scale k."""
        levels = torch.full((1,), level, device=like.device)
        if self.config.num_levels is None:
            return self.level_embedder(levels, like.dtype)
        return self.level_embedder(levels)
