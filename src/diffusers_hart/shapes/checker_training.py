# SPDX-License-Identifier: Apache-2.0
import torch
import torch.nn as nn
import torch.nn.functional as F

from .checker import LAYERS, STRIDE, ShapesChecker
from .rendering import FIELD, split_scenes
from .scenes import IMAGE_SIZE, MAX_OBJECTS


CELLS = IMAGE_SIZE // STRIDE
CLASSES = ("shape", "color", "surface", "size")


def soil_images(images: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
    """
    Pictures a little blurred, noisy and off in contrast, each in its own degree, as generated ones are: the checker is
    to see what is in them all the same.
    """
    amounts = torch.rand(4, len(images), 1, 1, 1, generator=generator, device=images.device)
    blurred = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    images = torch.lerp(images, blurred, (2 * amounts[0] - 1).clamp(min=0))
    noise = torch.randn(images.shape, generator=generator, device=images.device)
    images = images + noise * (0.08 * (2 * amounts[1] - 1).clamp(min=0))
    return (images * (0.95 + 0.1 * amounts[2]) + 0.06 * (amounts[3] - 0.5)).clamp(-1, 1)


class ShapesCheckerTrainingModule(nn.Module):
    """
    One step's loss of a [`ShapesChecker`]. An object is to be found in the cell of its centre alone; what it is should
    also be known in the cells around, where a peak may come to lie.

    Args:
        checker ([`ShapesChecker`]): Trained.
    """

    def __init__(self, checker: ShapesChecker):
        super().__init__()
        self.checker = checker

    def forward(self, images: torch.Tensor, scenes: torch.Tensor) -> dict[str, torch.Tensor]:
        r"""
        The losses of one batch.

        Args:
            images (`torch.Tensor` of shape `(batch_size, 3, 128, 128)`): Pictures in [-1, 1].
            scenes (`torch.Tensor` of shape `(batch_size, SCENE_LENGTH)`): What they show, see [`encode_scene`].

        Returns:
            `dict[str, torch.Tensor]`: `loss`, to be minimised, and its parts, of shape `()`.
        """
        objects, backgrounds = split_scenes(scenes)
        output = {name: value.float() for name, value in self.checker(images).items()}

        # 1. Which cells the objects are in, and in which layer
        x, y, radius = (objects[..., FIELD[name]] for name in ("x", "y", "radius"))
        there = objects[..., FIELD["shape"]] >= 0
        apart = torch.hypot(x[:, :, None] - x[:, None], y[:, :, None] - y[:, None])
        contains = (apart < 0.75 * radius[:, :, None]) & (radius[:, :, None] > radius[:, None]) & there[:, None]
        layer = torch.where(contains.any(2), LAYERS.index("outer"), LAYERS.index("plain"))
        picture = torch.arange(len(objects), device=objects.device)[:, None].expand(-1, MAX_OBJECTS)
        column, row = (value.div(STRIDE).long().clamp(0, CELLS - 1) for value in (x, y))
        presence = torch.zeros_like(output["presence"].squeeze(2))
        presence[picture[there], layer[there], row[there], column[there]] = 1
        losses = {"presence": F.binary_cross_entropy_with_logits(output["presence"].squeeze(2), presence) * CELLS**2}

        # 2. What they are, in the cells of their centres and the ones around
        steps = torch.arange(-1, 2, device=objects.device)
        rows = (row[..., None, None] + steps[:, None]).expand(-1, -1, 3, 3)
        columns = (column[..., None, None] + steps).expand(-1, -1, 3, 3)
        used = there[..., None, None] & (rows >= 0) & (rows < CELLS) & (columns >= 0) & (columns < CELLS)
        wide = {"picture": picture, "layer": layer, "x": x, "y": y, "radius": radius}
        wide |= {name: objects[..., FIELD[name]].long() for name in CLASSES}
        wide = {name: value[..., None, None].expand_as(used)[used] for name, value in wide.items()}
        rows, columns = rows[used], columns[used]
        here = {name: output[name][wide["picture"], wide["layer"], :, rows, columns] for name in ("place", *CLASSES)}
        for name in CLASSES:
            losses[name] = F.cross_entropy(here[name], wide[name])
        place = torch.stack(
            [wide["x"] / STRIDE - columns - 0.5, wide["y"] / STRIDE - rows - 0.5, (wide["radius"] / STRIDE).log()], -1
        )
        losses["place"] = F.smooth_l1_loss(here["place"], place)

        # 3. The background's colours
        colors = torch.zeros_like(output["background"]).scatter_(1, backgrounds[:, :2].long(), 1.0)
        losses["background"] = F.binary_cross_entropy_with_logits(output["background"], colors)

        correct = torch.stack([here[name].argmax(-1) == wide[name] for name in CLASSES]).all(0).float().mean()
        parts = {f"{name}_loss": value.detach() for name, value in losses.items()}
        return {"loss": sum(losses.values()), **parts, "accuracy": correct}
