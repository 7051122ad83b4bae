from .hart import HARTClassConditionalPipeline, HARTPipeline, HARTPipelineOutput


__all__ = ["HARTClassConditionalPipeline", "HARTPipeline", "HARTPipelineOutput"]
