# SPDX-License-Identifier: Apache-2.0
"""HART, the Hybrid Autoregressive Transformer, as a diffusers pipeline. Importing it makes diffusers know HART."""

import diffusers
import transformers
from diffusers import ModelMixin, SchedulerMixin  # noqa: F401  (diffusers looks for these names in a library)
from diffusers.pipelines.pipeline_loading_utils import LOADABLE_CLASSES

from .models import HARTKVCache, HARTTransformer2DModel, HybridTokenizer, ResidualDiffusionMLP
from .pipelines import HARTClassConditionalPipeline, HARTPipeline, HARTPipelineOutput
from .schedulers import HARTResidualScheduler, HARTScheduler
from .shapes import shapes_model_path


__version__ = "0.1.0.dev0"

__all__ = [
    "HARTClassConditionalPipeline",
    "HARTKVCache",
    "HARTPipeline",
    "HARTPipelineOutput",
    "HARTResidualScheduler",
    "HARTScheduler",
    "HARTTransformer2DModel",
    "HybridTokenizer",
    "ResidualDiffusionMLP",
    "shapes_model_path",
]

# Without this a pipeline that was pushed cannot be loaded back by its Hub id.
LOADABLE_CLASSES.setdefault("diffusers_hart", {})
# This lets DiffusionPipeline find the pipelines by the name that a checkpoint gives.
for _pipeline in (HARTPipeline, HARTClassConditionalPipeline):
    setattr(diffusers, _pipeline.__name__, _pipeline)
# And this AutoPipelineForText2Image. Its module imports every pipeline there is, some of which make transformers warn
# of optional packages that HART has no use for.
_verbosity = transformers.logging.get_verbosity()
transformers.logging.set_verbosity_error()
from diffusers.pipelines.auto_pipeline import AUTO_TEXT2IMAGE_PIPELINES_MAPPING


transformers.logging.set_verbosity(_verbosity)
AUTO_TEXT2IMAGE_PIPELINES_MAPPING.setdefault("hart", HARTPipeline)
del _pipeline, _verbosity
