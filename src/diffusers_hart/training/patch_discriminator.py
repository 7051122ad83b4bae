# SPDX-License-Identifier: Apache-2.0
import torch
import torch.nn as nn


class PatchDiscriminator(nn.Module):
    r"""
    Tells pictures from reconstructions, patch by patch (PatchGAN, [1611.07004](https://huggingface.co/papers/1611.07004)).
    Images must be `smallest_side` pixels wide and high at least. Its state dict is laid out like the discriminator that original checkpoints keep under `disc.`.

    Args:
        in_channels (`int`, defaults to `3`): Channels of the images.
        base_channels (`int`, defaults to `64`): Width of the first layer; each layer doubles it, up to eight times.
        num_layers (`int`, defaults to `3`): Layers that halve the resolution.
    """

    def __init__(self, in_channels: int = 3, base_channels: int = 64, num_layers: int = 3):
        super().__init__()
        self.smallest_side = 3 * 2**num_layers
        widths = [base_channels * min(2**i, 8) for i in range(num_layers + 1)]
        layers = [nn.Conv2d(in_channels, widths[0], 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for i in range(1, num_layers + 1):
            stride = 2 if i < num_layers else 1
            layers += [
                nn.Conv2d(widths[i - 1], widths[i], 4, stride=stride, padding=1, bias=False),
                nn.BatchNorm2d(widths[i]),
                nn.LeakyReLU(0.2),
            ]
        layers.append(nn.Conv2d(widths[-1], 1, 4, padding=1))
        self.main = nn.Sequential(*layers)

        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight, 1.0, 0.02)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        r"""
        Args:
            images (`torch.Tensor` of shape `(batch_size, in_channels, height, width)`): Images in [-1, 1].

        Returns:
            `torch.Tensor` of shape `(batch_size, 1, rows, columns)`: a logit for each patch, large for real ones.
        """
        return self.main(images)
