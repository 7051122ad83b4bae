# SPDX-License-Identifier: Apache-2.0
from collections.abc import Mapping
from typing import Any

from diffusers.pipelines.pipeline_loading_utils import LOADABLE_CLASSES
from diffusers.utils.constants import DIFFUSERS_DYNAMIC_MODULE_NAME

from .code_bundle import bundle_source


PACKAGE = __name__.partition(".")[0]
# Classes of components; under these names a folder that brings its code along has them too.
COMPONENTS = (
    "HARTResidualScheduler",
    "HARTScheduler",
    "HARTTransformer2DModel",
    "HybridTokenizer",
    "ResidualDiffusionMLP",
)


def is_remote_code(loaded_class: type) -> bool:
    """Whether a class came with a checkpoint."""
    return loaded_class.__module__.partition(".")[0] == DIFFUSERS_DYNAMIC_MODULE_NAME


def self_contained_code(
    pipeline_class: type, component_classes: Mapping[str, type]
) -> tuple[dict[str, str], dict[str, list[str]]]:
    r"""
    What a saved pipeline needs besides its weights to be loaded where this package is not installed.

    Args:
        pipeline_class (`type`): Its class.
        component_classes (`Mapping[str, type]`): The classes of its components, by their names.

    Returns:
        `tuple`: code by its path in the folder, that of the pipeline and, beside its weights, that of each component
        that is not of another library; and the entries of `model_index.json` that name it.

    Raises:
        ValueError: If the code of a component is neither in this package nor in one that diffusers loads from.
    """
    code = {f"{_stem(pipeline_class)}.py": bundle_source(pipeline_class)}
    index = {"_class_name": [_stem(pipeline_class), pipeline_class.__name__]}
    for name, component_class in component_classes.items():
        library = component_class.__module__.partition(".")[0]
        if library in (PACKAGE, DIFFUSERS_DYNAMIC_MODULE_NAME):
            code[f"{name}/{_stem(component_class)}.py"] = bundle_source(component_class)
            index[name] = [_stem(component_class), component_class.__name__]
        elif library not in LOADABLE_CLASSES:
            raise ValueError(
                f"`{name}` is a {component_class.__name__} of {component_class.__module__}, whose code cannot be "
                "written beside its weights: save the pipeline with `self_contained=False`."
            )
    return code, index


def installed_index(index: Mapping[str, Any]) -> dict[str, Any]:
    """
    A `model_index.json` with the classes of this package in the place of those that a folder brings along, or that
    earlier versions named by the module that they were in. Nothing that a folder brings along is run then.
    """
    index = dict(index)
    if isinstance(index.get("_class_name"), list):
        index["_class_name"] = index["_class_name"][-1]
    for name, value in index.items():
        if isinstance(value, list) and len(value) == 2 and value[1] in COMPONENTS:
            index[name] = [PACKAGE, value[1]]
    return index


def _stem(bundled_class: type) -> str:
    return bundled_class.__module__.rpartition(".")[2]
