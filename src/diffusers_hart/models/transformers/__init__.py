from .transformer_hart import HARTKVCache, HARTTransformer2DModel, HARTTransformer2DModelOutput


__all__ = ["HARTKVCache", "HARTTransformer2DModel", "HARTTransformer2DModelOutput"]
