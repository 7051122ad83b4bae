# SPDX-License-Identifier: Apache-2.0
"""A procedural data set of captioned pictures, a checker that reads them, and the small model that draws them."""

from .captions import caption_scene
from .checker import ShapesChecker
from .checker_training import ShapesCheckerTrainingModule
from .dataset import ShapesDataset
from .model_files import load_shapes_checker, shapes_model_path
from .rendering import encode_scene, render_scenes
from .scenes import Scene, SceneObject, StatedObject, Statement, relation_between, sample_scene
from .vocabulary import VOCABULARY, Shape, Surface, Vocabulary


__all__ = [
    "VOCABULARY",
    "Scene",
    "SceneObject",
    "Shape",
    "ShapesChecker",
    "ShapesCheckerTrainingModule",
    "ShapesDataset",
    "StatedObject",
    "Statement",
    "Surface",
    "Vocabulary",
    "caption_scene",
    "encode_scene",
    "load_shapes_checker",
    "relation_between",
    "render_scenes",
    "sample_scene",
    "shapes_model_path",
]
