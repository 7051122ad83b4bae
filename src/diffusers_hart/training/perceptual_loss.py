# SPDX-License-Identifier: Apache-2.0
import torch.nn as nn


def load_perceptual_loss(net: str = "vgg") -> nn.Module:
    r"""
    LPIPS of the package `lpips`. The first use downloads the weights of its network.

    Args:
        net (`str`, defaults to `"vgg"`): Its network: `"vgg"`, `"alex"` or `"squeeze"`.

    Returns:
        `nn.Module`: Takes two batches of images in [-1, 1] and gives one distance a pair. It is frozen.

    Raises:
        ImportError: If `lpips` is not installed.
    """
    try:
        import lpips
    except ImportError as error:
        raise ImportError(
            "A perceptual loss needs the package lpips (pip install lpips), and its weights, which are downloaded when "
            "it is first used. Set its weight to 0 to train without it."
        ) from error
    return lpips.LPIPS(net=net, verbose=False).requires_grad_(False)
