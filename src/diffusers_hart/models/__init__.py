from .autoencoders import HybridTokenizer
from .residual_diffusion_mlp import ResidualDiffusionMLP
from .transformers import HARTKVCache, HARTTransformer2DModel


__all__ = ["HARTKVCache", "HARTTransformer2DModel", "HybridTokenizer", "ResidualDiffusionMLP"]
