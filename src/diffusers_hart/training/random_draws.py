# SPDX-License-Identifier: Apache-2.0
from collections.abc import Callable, Sequence
from hashlib import blake2b

import torch


def seeded_generator(device: torch.device | str, *key: int | str) -> torch.Generator:
    """
    A generator on `device` that is a function of `key` alone, for example `(seed, "token drop", position)`. Draws of
    different names or samples are independent of each other, whatever their number and order.
    """
    digest = blake2b("/".join(str(part) for part in key).encode(), digest_size=7).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "big"))


def draw_per_sample(
    draw: Callable[[torch.Generator], torch.Tensor],
    device: torch.device | str,
    seed: int,
    name: str,
    positions: Sequence[int],
) -> torch.Tensor:
    """
    A batch of draws, each a function of the seed, the draw's name and the sample's position in the whole run: a sample
    gets the same numbers on whichever process, in whichever batch it is seen.

    Args:
        draw (`Callable`): Makes one sample's draw of a generator.
        device (`torch.device` or `str`): Where to draw.
        seed (`int`): Seed of the run.
        name (`str`): What the draw is for.
        positions (`Sequence[int]`): How many samples the run had seen before each of these.

    Returns:
        `torch.Tensor` of shape `(batch_size, ...)`.
    """
    return torch.stack([draw(seeded_generator(device, seed, name, position)) for position in positions])
