from .pipeline_hart import HARTPipeline
from .pipeline_hart_class_conditional import HARTClassConditionalPipeline
from .pipeline_output import HARTPipelineOutput


__all__ = ["HARTClassConditionalPipeline", "HARTPipeline", "HARTPipelineOutput"]
