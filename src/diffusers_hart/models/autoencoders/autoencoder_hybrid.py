# SPDX-License-Identifier: Apache-2.0
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache, lru_cache

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.vae import AutoencoderMixin, Decoder, DecoderOutput, Encoder
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput
from diffusers.utils.accelerate_utils import apply_forward_hook

from ..strict_loading import StrictLoadingMixin
from .large_picture_layers import use_large_picture_layers


@dataclass
class HybridTokenizerOutput(BaseOutput):
    """
    What [`HybridTokenizer.encode`] makes of an image. `L` is the number of tokens of all `K` scales together, `P` the
    side of the latent.

    Args:
        latents (`torch.Tensor` of shape `(batch_size, latent_channels, P, P)`, float32):
            The continuous latent of the encoder.
        codes (`torch.LongTensor` of shape `(batch_size, L)`):
            The codes of all scales, coarsest first, each scale row by row.
        partial_latents (`tuple` of `K` `torch.Tensor` of shape `(batch_size, latent_channels, P, P)`, float32):
            The sum of the discrete scales after each scale; the last one is the whole discrete latent.
        residual (`torch.Tensor` of shape `(batch_size, latent_channels, P, P)`, float32):
            What the discrete scales leave over: `latents` is `partial_latents[-1] + residual`.
    """

    # Optional, since accelerate's offload hooks rebuild outputs only if the fields after the first are.
    latents: torch.Tensor
    codes: torch.LongTensor | None = None
    partial_latents: tuple[torch.Tensor, ...] | None = None
    residual: torch.Tensor | None = None


def without_autocast(device: torch.device) -> AbstractContextManager:
    """Where operations keep the float32 of what they are given, inside `torch.autocast` too."""
    if not torch.amp.is_autocast_available(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


class HybridTokenizerPhi(nn.Conv2d):
    """`(1 - r) * h + r * conv(h)`, the learned correction of an upsampled scale, always in float32."""

    def __init__(self, channels: int, ratio: float):
        super().__init__(channels, channels, kernel_size=3, padding=1)
        self.ratio = ratio

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        hidden_states = hidden_states.float()
        with without_autocast(hidden_states.device):
            convolved = self._conv_forward(hidden_states, self.weight.float(), self.bias.float())
        return (1 - self.ratio) * hidden_states + self.ratio * convolved


@lru_cache
def phi_indices(num_scales: int, num_phi: int) -> tuple[int, ...]:
    """
    Which of the shared `phi` corrects which scale: the one whose tick is nearest to `k / (K - 1)`. In float64, since
    there are near-ties that float32 decides wrongly.
    """
    # The pretrained tokenizers were trained with thirds for four phi and with halves for any other number.
    margin = 1 / (3 * num_phi) if num_phi == 4 else 1 / (2 * num_phi)
    ticks = np.linspace(margin, 1 - margin, num_phi)
    return tuple(int(np.argmin(np.abs(ticks - k / max(num_scales - 1, 1)))) for k in range(num_scales))


@cache  # recorded graphs read it where it is
@torch.inference_mode(False)
@torch.no_grad()
def bicubic_matrix(source: int, target: int, device: torch.device) -> torch.Tensor:
    """
    PyTorch's bicubic interpolation of `source` values to `target` as a matrix `(target, source)`, float32. Its kernel
    for CUDA goes through all pictures and channels one after the other in each of `target * target` threads, which for
    small latents is a hundred times slower than two products with this.
    """
    columns = torch.eye(source, device=device)[None, :, :, None]
    return F.interpolate(columns, size=(target, 1), mode="bicubic")[0, :, :, 0].T.contiguous()


@cache  # recorded graphs read it where it is
@torch.inference_mode(False)
@torch.no_grad()
def area_matrix(source: int, target: int, device: torch.device) -> torch.Tensor:
    """
    PyTorch's area interpolation of `source` values to `target` as a matrix `(target, source)`, float32: means over
    windows that grow as `source / target` does. For a small target its kernel for CUDA has few threads, each of which
    adds up much of the latent alone.
    """
    rows = torch.eye(source, device=device)[:, None]
    return F.interpolate(rows, size=target, mode="area")[:, 0].T.contiguous()


class HybridTokenizer(StrictLoadingMixin, ModelMixin, AutoencoderMixin, ConfigMixin):
    r"""
    HART's hybrid tokenizer (section 3.1 of the [paper](https://huggingface.co/papers/2410.10812)): a convolutional
    autoencoder whose latent is split into the discrete codes of `K` growing scales and a continuous residual.

    It is the only place that knows how a latent is put together from scales: [`~HybridTokenizer.embed`] turns codes
    into latent vectors, [`~HybridTokenizer.accumulate`] adds a scale to the running latent, and
    [`~HybridTokenizer.next_scale_input`] makes of that latent what the transformer reads next.

    Images are in [-1, 1]; latents, codes and residuals are handled in float32 whatever the model's dtype.

    Args:
        in_channels (`int`, defaults to `3`): Channels of the images that are encoded.
        out_channels (`int`, defaults to `3`): Channels of the images that are decoded.
        latent_channels (`int`, defaults to `32`): Channels of the latent and width of a code's vector.
        block_out_channels (`tuple[int, ...]`, defaults to `(160, 160, 320, 320, 640)`):
            Channels of each resolution level, the finest first. Every level but the last halves the resolution.
        layers_per_block (`int`, defaults to `2`):
            Residual blocks a level in the encoder; the decoder has one more.
        norm_num_groups (`int`, defaults to `32`): Groups of the group norms.
        codebook_size (`int`, defaults to `4096`): Number of codes.
        num_phi (`int`, defaults to `4`):
            Number of corrections that are shared over the scales: `1` for all, the number of scales for one each.
        phi_ratio (`float`, defaults to `0.5`): Share of the convolution in a correction.
        scales (`tuple[int, ...]`, defaults to the schedule of 1024 px images):
            Sides of the scales, in tokens, that are used when a method gets none.
    """

    _supports_gradient_checkpointing = True
    _keep_in_fp32_modules = ["codebook", "phi"]
    _skip_layerwise_casting_patterns = ["codebook", "phi", "norm"]
    _no_split_modules = ["ResnetBlock2D", "Attention"]
    # What is called other than by the `forward` of the module it belongs to; lists of modules are found by themselves.
    _group_offload_block_modules = [
        "encoder",
        "quant_conv",
        "codebook",
        "post_quant_conv",
        "decoder",
        "conv_in",
        "mid_block",
        "conv_norm_out",
        "conv_out",
    ]

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        latent_channels: int = 32,
        block_out_channels: tuple[int, ...] = (160, 160, 320, 320, 640),
        layers_per_block: int = 2,
        norm_num_groups: int = 32,
        codebook_size: int = 4096,
        num_phi: int = 4,
        phi_ratio: float = 0.5,
        scales: tuple[int, ...] = (1, 2, 3, 4, 5, 7, 9, 12, 16, 21, 27, 36, 48, 64),
    ):
        super().__init__()
        plain_levels = len(block_out_channels) - 1
        self.encoder = Encoder(
            in_channels=in_channels,
            out_channels=latent_channels,
            down_block_types=("DownEncoderBlock2D",) * plain_levels + ("AttnDownEncoderBlock2D",),
            block_out_channels=tuple(block_out_channels),
            layers_per_block=layers_per_block,
            norm_num_groups=norm_num_groups,
            double_z=False,
        )
        self.quant_conv = nn.Conv2d(latent_channels, latent_channels, 3, padding=1)

        self.codebook = nn.Embedding(codebook_size, latent_channels)
        self.phi = nn.ModuleList([HybridTokenizerPhi(latent_channels, phi_ratio) for _ in range(num_phi)])

        self.post_quant_conv = nn.Conv2d(latent_channels, latent_channels, 3, padding=1)
        self.decoder = Decoder(
            in_channels=latent_channels,
            out_channels=out_channels,
            up_block_types=("AttnUpDecoderBlock2D",) + ("UpDecoderBlock2D",) * plain_levels,
            block_out_channels=tuple(block_out_channels),
            layers_per_block=layers_per_block,
            norm_num_groups=norm_num_groups,
        )
        use_large_picture_layers(self.encoder, self.decoder)

        self.use_slicing = False
        self.use_tiling = False
        self.spatial_factor = 2**plain_levels
        # Of pictures in pixels: sides of a tile, and how far apart tiles start. Smaller ones are handled whole.
        self.tile_sample_min_size = 512
        self.tile_sample_stride = 384

    def enable_tiling(self, tile_sample_min_size: int | None = None, tile_sample_stride: int | None = None):
        r"""
        Decode large pictures tile by tile, which takes less memory and more time. Neighbouring tiles overlap and are
        blended, so that no seams show; the picture is not quite the same, since norms of the large levels see one tile
        at a time. Pictures of one tile and encoding, whose codes must not change, are not tiled.

        Args:
            tile_sample_min_size (`int`, *optional*, 512 at first): Side of a tile in pixels.
            tile_sample_stride (`int`, *optional*, 384 at first): Distance of neighbouring tiles in pixels.

        Raises:
            ValueError: If these are no multiples of a latent position's pixels, or tiles leave gaps.
        """
        size = self.tile_sample_min_size if tile_sample_min_size is None else tile_sample_min_size
        stride = self.tile_sample_stride if tile_sample_stride is None else tile_sample_stride
        if size % self.spatial_factor or stride % self.spatial_factor or not 0 < stride <= size:
            raise ValueError(
                f"`tile_sample_min_size`={size} and `tile_sample_stride`={stride} must be multiples of "
                f"{self.spatial_factor} pixels, and tiles must be no smaller than their distance."
            )
        self.tile_sample_min_size, self.tile_sample_stride = size, stride
        super().enable_tiling()

    @apply_forward_hook
    def encode(
        self, images: torch.Tensor, scales: Sequence[int] | None = None, return_dict: bool = True
    ) -> HybridTokenizerOutput | tuple:
        r"""
        Encode images into a latent, the codes of every scale and the continuous residual.

        Args:
            images (`torch.Tensor` of shape `(batch_size, in_channels, height, width)`): Images in [-1, 1].
            scales (`Sequence[int]`, *optional*): Sides of the scales; the last one must be the side of the latent.
            return_dict (`bool`, defaults to `True`): Whether to return a [`HybridTokenizerOutput`] or a tuple.

        Returns:
            [`HybridTokenizerOutput`] or `tuple`.

        Raises:
            ValueError: If the images do not give a latent of the side of the last scale.
        """
        scales = self.config.scales if scales is None else scales
        side = scales[-1] * self.spatial_factor
        if images.ndim != 4 or tuple(images.shape[-2:]) != (side, side):
            raise ValueError(
                f"`images` of shape {tuple(images.shape)} do not fit the scales {tuple(scales)}: expected "
                f"(batch_size, {self.config.in_channels}, {side}, {side}). Resize the images or pass other `scales`."
            )
        slices = images.split(1) if self.use_slicing else [images]
        latents = torch.cat([self.quant_conv(self.encoder(image)) for image in slices]).float()
        codes, partial_latents, residual = self.quantize(latents, scales)
        if not return_dict:
            return latents, codes, partial_latents, residual
        return HybridTokenizerOutput(latents, codes, partial_latents, residual)

    @apply_forward_hook
    def quantize(
        self,
        latents: torch.Tensor,
        scales: Sequence[int] | None = None,
        phi_at_last_scale: bool = False,
        mistakes: torch.LongTensor | None = None,
    ) -> tuple[torch.LongTensor, tuple[torch.Tensor, ...], torch.Tensor]:
        r"""
        Split a latent into codes, scale by scale: every scale takes the codes nearest to what is still missing.

        Args:
            latents (`torch.Tensor` of shape `(batch_size, latent_channels, P, P)`): The latent.
            scales (`Sequence[int]`, *optional*): Sides of the scales, the last one `P`.
            phi_at_last_scale (`bool`, defaults to `False`):
                Whether the last scale is corrected like the others. The tokenizer itself is trained so; the
                transformer's targets and generation go without.
            mistakes (`torch.LongTensor` of shape `(batch_size, L)`, *optional*):
                Codes to go on with instead of the nearest ones, which the scales behind then have to make up for; -1
                where there is none.

        Returns:
            `tuple`: `codes`, the nearest ones, `partial_latents` and `residual` as in [`HybridTokenizerOutput`].
            Gradients flow into the codebook, the corrections and, through the residual, the latent; the choice of codes
            has none.
        """
        scales = self.config.scales if scales is None else scales
        rest = latents.float()
        partial_latents = [torch.zeros_like(rest)]
        codes = []
        taken = [None] * len(scales) if mistakes is None else mistakes.split([side * side for side in scales], dim=1)
        for k, side in enumerate(scales):
            codes.append(self._nearest_codes(self._pool(rest, side)))
            used = codes[-1] if mistakes is None else torch.where(taken[k] < 0, codes[-1], taken[k])
            scale_latents = self._spread(self.embed(used), k, scales, phi_at_last_scale)
            partial_latents.append(partial_latents[-1] + scale_latents)
            rest = rest - scale_latents
        return torch.cat(codes, dim=1), tuple(partial_latents[1:]), rest

    @apply_forward_hook
    def embed(self, codes: torch.Tensor) -> torch.Tensor:
        r"""
        The latent vectors of codes, or of soft weights over the codebook.

        Args:
            codes (`torch.LongTensor` of shape `(batch_size, N)` or `torch.Tensor` of shape `(batch_size, N, V)`):
                Codes, or weights over all `V` codes that sum to one.

        Returns:
            `torch.Tensor` of shape `(batch_size, N, latent_channels)`, float32.
        """
        if not codes.is_floating_point():
            return self.codebook(codes).float()
        with without_autocast(codes.device):
            return codes.float() @ self._codebook_table(codes.device)

    @apply_forward_hook
    def accumulate(
        self, latents: torch.Tensor, code_embeds: torch.Tensor, scale_index: int, scales: Sequence[int] | None = None
    ) -> torch.Tensor:
        r"""
        Add one scale to the running latent.

        Args:
            latents (`torch.Tensor` of shape `(batch_size, latent_channels, P, P)`): The sum of the scales before.
            code_embeds (`torch.Tensor` of shape `(batch_size, side * side, latent_channels)`): The scale's vectors.
            scale_index (`int`): Which scale it is, counted from 0.
            scales (`Sequence[int]`, *optional*): Sides of the scales.

        Returns:
            `torch.Tensor` of shape `(batch_size, latent_channels, P, P)`, float32.
        """
        scales = self.config.scales if scales is None else scales
        return latents + self._spread(code_embeds, scale_index, scales)

    def next_scale_input(
        self, latents: torch.Tensor, scale_index: int, scales: Sequence[int] | None = None
    ) -> torch.Tensor:
        r"""
        What the transformer reads at a scale: the running latent of the scales before, pooled to its size.

        Args:
            latents (`torch.Tensor` of shape `(batch_size, latent_channels, P, P)`): The sum of the scales before.
            scale_index (`int`): The scale that is to be predicted, counted from 0, at least 1.
            scales (`Sequence[int]`, *optional*): Sides of the scales.

        Returns:
            `torch.Tensor` of shape `(batch_size, side * side, latent_channels)`.
        """
        scales = self.config.scales if scales is None else scales
        return self._pool(latents, scales[scale_index]).flatten(2).transpose(1, 2)

    @apply_forward_hook
    def latents_from_codes(
        self, codes: torch.LongTensor, scales: Sequence[int] | None = None
    ) -> tuple[torch.Tensor, ...]:
        r"""
        The running latents of given codes.

        Args:
            codes (`torch.LongTensor` of shape `(batch_size, L)`): The codes of all scales.
            scales (`Sequence[int]`, *optional*): Sides of the scales.

        Returns:
            `tuple` of `torch.Tensor` of shape `(batch_size, latent_channels, P, P)`: the sum after each scale. The last
            one decodes to the picture without its residual.
        """
        scales = self.config.scales if scales is None else scales
        latents = codes.new_zeros(len(codes), self.config.latent_channels, scales[-1], scales[-1], dtype=torch.float32)
        partial_latents = []
        for k, scale_codes in enumerate(codes.split([side * side for side in scales], dim=1)):
            latents = self.accumulate(latents, self.embed(scale_codes), k, scales)
            partial_latents.append(latents)
        return tuple(partial_latents)

    def scale_inputs(
        self, partial_latents: Sequence[torch.Tensor], scales: Sequence[int] | None = None
    ) -> torch.Tensor:
        r"""
        What the transformer reads under teacher forcing: the inputs of the scales 1 to K - 1, one after the other.

        Args:
            partial_latents (`Sequence[torch.Tensor]` of shape `(batch_size, latent_channels, P, P)`):
                The sum after each scale.
            scales (`Sequence[int]`, *optional*): Sides of the scales.

        Returns:
            `torch.Tensor` of shape `(batch_size, L - 1, latent_channels)`.
        """
        scales = self.config.scales if scales is None else scales
        inputs = [self.next_scale_input(partial_latents[k - 1], k, scales) for k in range(1, len(scales))]
        return torch.cat(inputs, dim=1)

    @apply_forward_hook
    def decode(self, latents: torch.Tensor, return_dict: bool = True) -> DecoderOutput | tuple:
        r"""
        Decode latents into images.

        Args:
            latents (`torch.Tensor` of shape `(batch_size, latent_channels, height, width)`):
                Latents in the model's dtype.
            return_dict (`bool`, defaults to `True`): Whether to return a `DecoderOutput` or a tuple.

        Returns:
            `DecoderOutput` or `tuple`: images of shape `(batch_size, out_channels, height * f, width * f)`, clamped to
            [-1, 1]; `f` is `spatial_factor`, 16 for the published tokenizer.
        """
        slices = latents.split(1) if self.use_slicing else [latents]
        images = torch.cat([self._decode(latent) for latent in slices]).clamp(-1, 1)
        if not return_dict:
            return (images,)
        return DecoderOutput(sample=images)

    def forward(
        self, images: torch.Tensor, scales: Sequence[int] | None = None, use_residual: bool = True
    ) -> DecoderOutput:
        r"""
        Reconstruct images.

        Args:
            images (`torch.Tensor` of shape `(batch_size, in_channels, height, width)`): Images in [-1, 1].
            scales (`Sequence[int]`, *optional*): Sides of the scales; the last one must be the side of the latent.
            use_residual (`bool`, defaults to `True`):
                Whether the decoder sees the whole latent or its discrete part alone.

        Returns:
            `DecoderOutput`: the reconstruction, of the images' shape.
        """
        encoded = self.encode(images, scales)
        latents = encoded.latents if use_residual else encoded.partial_latents[-1]
        return self.decode(latents.to(images.dtype))

    def _decode(self, latents: torch.Tensor) -> torch.Tensor:
        latents = self.post_quant_conv(latents)
        if self.use_tiling and max(latents.shape[-2:]) * self.spatial_factor > self.tile_sample_min_size:
            return self._tiled_decode(latents)
        return self.decoder(latents)

    def _tiled_decode(self, latents: torch.Tensor) -> torch.Tensor:
        """
        The mean of decoded tiles, weighted by ramps that fall to the edges where tiles overlap. Only the last three
        levels are tiled: those before are a small part of the memory and hold the attention, which sees the picture.
        """
        decoder = self.decoder
        num_whole = max(len(decoder.up_blocks) - 3, 0)
        hidden_states = decoder.mid_block(decoder.conv_in(latents))
        for up_block in decoder.up_blocks[:num_whole]:
            hidden_states = up_block(hidden_states)

        factor = self.spatial_factor // 2**num_whole  # pixels of a position, along a side
        size, stride = self.tile_sample_min_size // factor, self.tile_sample_stride // factor
        height, width = hidden_states.shape[-2:]
        # The last tile ends with the picture, so that none is a sliver.
        rows, columns = ([*range(0, max(side - size, 0), stride), max(side - size, 0)] for side in (height, width))
        images = latents.new_zeros(
            len(latents), self.config.out_channels, height * factor, width * factor, dtype=torch.float32
        )
        weights = torch.zeros_like(images[0, 0])
        for top in rows:
            for left in columns:
                tile = hidden_states[:, :, top : top + size, left : left + size]
                for up_block in decoder.up_blocks[num_whole:]:
                    tile = up_block(tile)
                tile = decoder.conv_out(decoder.conv_act(decoder.conv_norm_out(tile)))
                ramps = [self._tile_ramp(side, tile.device) for side in tile.shape[-2:]]
                weight = ramps[0][:, None] * ramps[1]
                y, x = top * factor, left * factor
                images[:, :, y : y + tile.shape[-2], x : x + tile.shape[-1]] += tile * weight
                weights[y : y + tile.shape[-2], x : x + tile.shape[-1]] += weight
        return (images / weights).to(latents.dtype)

    def _tile_ramp(self, length: int, device: torch.device) -> torch.Tensor:
        """Weights `(length,)` of a tile's pixels along a side: 1, and falling towards both ends over the overlap."""
        overlap = self.tile_sample_min_size - self.tile_sample_stride
        from_edge = torch.arange(length, device=device, dtype=torch.float32) + 0.5
        from_edge = torch.minimum(from_edge, from_edge.flip(0))
        return (from_edge / max(overlap, 1)).clamp(max=1)

    def _codebook_table(self, device: torch.device) -> torch.Tensor:
        # Looked up rather than read from the parameter: offloading brings weights to the device in a module's forward.
        return self.codebook(torch.arange(self.config.codebook_size, device=device)).float()

    @torch.no_grad()
    def _nearest_codes(self, latents: torch.Tensor) -> torch.LongTensor:
        table = self._codebook_table(latents.device)
        tokens = latents.flatten(2).transpose(1, 2)
        with without_autocast(latents.device):
            distances = table.square().sum(-1) - 2 * (tokens @ table.T)  # without the token's own norm: same order
        return distances.argmin(-1)

    def _pool(self, latents: torch.Tensor, side: int) -> torch.Tensor:
        if side == latents.shape[-1]:
            return latents
        pool = area_matrix(latents.shape[-1], side, latents.device)
        with without_autocast(latents.device):
            return pool @ latents.float() @ pool.T

    def _spread(
        self, code_embeds: torch.Tensor, scale_index: int, scales: Sequence[int], phi_at_last_scale: bool = False
    ) -> torch.Tensor:
        side, last = scales[scale_index], len(scales) - 1
        scale_latents = code_embeds.transpose(1, 2).unflatten(2, (side, side)).float()
        if scale_index < last:
            upsample = bicubic_matrix(side, scales[-1], scale_latents.device)
            with without_autocast(scale_latents.device):
                scale_latents = upsample @ scale_latents @ upsample.T
        elif not phi_at_last_scale:
            return scale_latents  # the pretrained transformers saw no phi at the last scale
        return self.phi[phi_indices(len(scales), self.config.num_phi)[scale_index]](scale_latents)
