from .lora_pipeline import HARTLoraLoaderMixin


__all__ = ["HARTLoraLoaderMixin"]
