# SPDX-License-Identifier: Apache-2.0
import math
from collections.abc import Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin

from .scenes import IMAGE_SIZE, Scene, SceneObject, Statement
from .vocabulary import VOCABULARY, Vocabulary


STRIDE = 8
PRESENT = -1.5  # logit of a cell that holds a centre; low, since a centre on an edge is half in either cell
LAYERS = ("outer", "plain")  # objects with another one inside, and all others: their centres may be in one cell


class ResidualBlock(nn.Module):
    def __init__(self, channels: int, dilation: int = 1):
        super().__init__()
        self.norm1 = nn.GroupNorm(8, channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=dilation, dilation=dilation)
        self.norm2 = nn.GroupNorm(8, channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        residual = self.conv1(F.silu(self.norm1(hidden_states)))
        return hidden_states + self.conv2(F.silu(self.norm2(residual)))


class ShapesChecker(ModelMixin, ConfigMixin):
    r"""
    Reads a picture of the procedural data set back into a [`Scene`]: a small convolutional network that looks, in each
    cell of 8 x 8 pixels, for the centre of an object and says what it is. Trained on true renderings by
    `examples/train_shapes_checker.py`. Its features measure Fréchet distances.

    Args:
        shapes, colors, surfaces, sizes, backgrounds (`tuple[str, ...]`):
            The names it tells apart, those of the [`Vocabulary`] it is trained with.
        channels (`tuple[int, int, int]`, defaults to `(32, 64, 96)`): Widths at a half, a quarter and an eighth.
    """

    @register_to_config
    def __init__(
        self,
        shapes: tuple[str, ...] = tuple(VOCABULARY.shapes),
        colors: tuple[str, ...] = tuple(VOCABULARY.colors),
        surfaces: tuple[str, ...] = tuple(VOCABULARY.surfaces),
        sizes: tuple[str, ...] = tuple(VOCABULARY.sizes),
        backgrounds: tuple[str, ...] = tuple(VOCABULARY.backgrounds),
        channels: tuple[int, int, int] = (32, 64, 96),
    ):
        super().__init__()
        half, quarter, eighth = channels
        self.fine = nn.Sequential(
            nn.Conv2d(3, half, 5, stride=2, padding=2),
            ResidualBlock(half),
            nn.Conv2d(half, quarter, 3, stride=2, padding=1),
            ResidualBlock(quarter),
            ResidualBlock(quarter),
        )
        self.coarse = nn.Sequential(
            nn.Conv2d(quarter, eighth, 3, stride=2, padding=1),
            *(ResidualBlock(eighth, dilation) for dilation in (1, 2, 4, 1, 2, 4)),
            nn.GroupNorm(8, eighth),
            nn.SiLU(),
        )
        # For each layer: whether a centre is here, where in the cell, the logarithm of its radius, and what it is
        outputs = {"presence": 1, "place": 3, "shape": len(shapes), "color": len(colors)}
        outputs |= {"surface": len(surfaces), "size": len(sizes)}
        self.heads = nn.ModuleDict({name: nn.Conv2d(eighth, len(LAYERS) * n, 1) for name, n in outputs.items()})
        self.background = nn.Linear(eighth, len(backgrounds))
        nn.init.constant_(self.heads["presence"].bias, -5.0)  # nearly all cells are empty

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        r"""
        Look at pictures.

        Args:
            images (`torch.Tensor` of shape `(batch_size, 3, 128, 128)`): Pictures in [-1, 1].

        Returns:
            `dict[str, torch.Tensor]`: for each of `presence`, `place`, `shape`, `color`, `surface` and `size` logits of
            shape `(batch_size, layers, classes, 16, 16)`, for `background` `(batch_size, backgrounds)`.
        """
        features = self.coarse(self.fine(images))
        found = {name: head(features).unflatten(1, (len(LAYERS), -1)) for name, head in self.heads.items()}
        return {**found, "background": self.background(features.mean((2, 3)))}

    @torch.no_grad()
    def features(self, images: torch.Tensor) -> torch.Tensor:
        """
        Features `(batch_size, F)`, float32, of pictures `(batch_size, 3, height, width)` in [-1, 1], for Fréchet
        distances: means over the picture of a fine layer, which sees patterns and edges, and of the last one. Pictures
        of another size are resized.
        """
        if images.shape[-2:] != (IMAGE_SIZE, IMAGE_SIZE):
            images = F.interpolate(images, size=(IMAGE_SIZE, IMAGE_SIZE), mode="bilinear", antialias=True)
        fine = self.fine(images.to(self.dtype))
        return torch.cat([fine.mean((2, 3)), self.coarse(fine).mean((2, 3))], dim=1).float()

    @torch.no_grad()
    def read(self, images: torch.Tensor) -> list[Scene]:
        r"""
        Read pictures back into scenes.

        Args:
            images (`torch.Tensor` of shape `(batch_size, 3, 128, 128)`): Pictures in [-1, 1].

        Returns:
            `list[Scene]`: The objects found, without the details of their patterns.

        Raises:
            ValueError: If the pictures have another size.
        """
        if images.ndim != 4 or tuple(images.shape[1:]) != (3, IMAGE_SIZE, IMAGE_SIZE):
            raise ValueError(
                f"The checker reads pictures of shape (batch_size, 3, {IMAGE_SIZE}, {IMAGE_SIZE}), not "
                f"{tuple(images.shape)}."
            )
        output = {name: value.float() for name, value in self(images.to(self.device, self.dtype)).items()}
        presence = output["presence"].squeeze(2)
        peaks = (presence > PRESENT) & (presence == F.max_pool2d(presence, 3, stride=1, padding=1))
        places = output["place"].cpu()
        names = {"shape": self.config.shapes, "color": self.config.colors}
        names |= {"surface": self.config.surfaces, "size": self.config.sizes}
        best = {name: output[name].argmax(2).cpu() for name in names}
        objects = [[] for _ in images]
        for picture, layer, row, column in peaks.nonzero().tolist():
            attributes = {name: names[name][found[picture, layer, row, column]] for name, found in best.items()}
            dx, dy, log_radius = places[picture, layer, :, row, column].tolist()
            x, y = (column + 0.5 + dx) * STRIDE, (row + 0.5 + dy) * STRIDE
            objects[picture].append(SceneObject(**attributes, x=x, y=y, radius=STRIDE * math.exp(log_radius)))
        backgrounds = self._read_backgrounds(output["background"])
        return [Scene(tuple(found), background) for found, background in zip(objects, backgrounds)]

    def accepts(self, images: torch.Tensor, statements: Sequence[Statement]) -> list[bool]:
        """Whether each picture, as in [`~ShapesChecker.read`], is right in all that its statement says."""
        return [statement.holds(scene) for statement, scene in zip(statements, self.read(images))]

    def explain(self, images: torch.Tensor, statements: Sequence[Statement]) -> list[dict[str, bool]]:
        """For each picture which of the stated attributes are right, see [`Statement.explain`]."""
        return [statement.explain(scene) for statement, scene in zip(statements, self.read(images))]

    def extended(self, vocabulary: Vocabulary) -> "ShapesChecker":
        """A checker that also knows the new names of an extended vocabulary, once its heads are trained on them."""
        names = {"shapes": vocabulary.shapes, "colors": vocabulary.colors, "surfaces": vocabulary.surfaces}
        names |= {"sizes": vocabulary.sizes, "backgrounds": vocabulary.backgrounds}
        for name, known in names.items():
            if tuple(known)[: len(self.config[name])] != tuple(self.config[name]):
                raise ValueError(
                    f"The vocabulary's {name} must begin with those the checker knows: {self.config[name]}."
                )
        checker = type(self)(**{name: tuple(known) for name, known in names.items()}, channels=self.config.channels)
        weights = checker.state_dict()
        for name, value in self.state_dict().items():
            if value.shape == weights[name].shape:
                weights[name] = value
            elif name.startswith("heads."):
                wide, narrow = (w.unflatten(0, (len(LAYERS), -1)) for w in (weights[name].zero_(), value))
                wide[:, : narrow.shape[1]] = narrow
            else:
                weights[name].zero_()[: len(value)] = value
        checker.load_state_dict(weights)
        return checker.to(self.device, self.dtype)

    def _read_backgrounds(self, logits: torch.Tensor) -> list[tuple[str, ...]]:
        """The colours that are there, at most two and at least one."""
        ranked = logits.topk(2, dim=1)
        return [
            tuple(self.config.backgrounds[i] for i in (indices if second > 0 else indices[:1]))
            for indices, (_, second) in zip(ranked.indices.tolist(), ranked.values.tolist())
        ]
