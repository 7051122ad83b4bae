# SPDX-License-Identifier: Apache-2.0
"""A data set of squares on grey and a checker of their colours, with the interface of `diffusers_hart.shapes`."""

import torch
import torch.nn as nn
import torch.nn.functional as F

from diffusers_hart.training.random_draws import seeded_generator


COLORS = {"red": (0.9, -0.9, -0.9), "green": (-0.9, 0.9, -0.9), "blue": (-0.9, -0.9, 0.9)}


class Squares:
    """Captions of one colour, or with `split="held_out"` also of a size, which half of the pictures get wrong."""

    def __init__(self, seed=0, split="train", num_objects=None):
        self.key = (seed, split, num_objects)
        self.split = split

    def draws(self, index):
        return torch.rand(4, generator=seeded_generator("cpu", *self.key, index))

    def __getitem__(self, index):
        return {"caption": f"a {self.statement(index)['color']} square", "scene": self.draws(index)}

    def statement(self, index):
        statement = {"color": list(COLORS)[int(self.draws(index)[0] * 3)]}
        return statement | {"size": "small" if index % 2 else "large"} if self.split == "held_out" else statement

    def finish_batch(self, batch, device):
        images = torch.full((len(batch["scene"]), 3, 128, 128), -0.2, device=device)
        for image, (color, x, y, _) in zip(images, batch["scene"]):
            left, top = 16 + int(x * 32), 16 + int(y * 32)
            pixels = torch.tensor(COLORS[list(COLORS)[int(color * 3)]], device=device)
            image[:, top : top + 64, left : left + 64] = pixels[:, None, None]
        return {**batch, "pixel_values": images}


class ColorChecker(nn.Module):
    """Features are the means of patches; a picture is of the colour that its mean is nearest to, and always large."""

    def features(self, images):
        return F.adaptive_avg_pool2d(images, 4).flatten(1)

    def explain(self, images, statements):
        assert images.shape[1:] == (3, 128, 128)
        found = (images.mean((2, 3)) @ torch.tensor(list(COLORS.values()), device=images.device).T).argmax(1).tolist()
        verdicts = []
        for index, statement in zip(found, statements):
            verdict = {"color": list(COLORS)[index] == statement["color"]}
            verdicts.append(verdict | ({"size": statement["size"] == "large"} if "size" in statement else {}))
        return verdicts
