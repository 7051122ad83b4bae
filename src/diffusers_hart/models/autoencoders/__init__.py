from .autoencoder_hybrid import HybridTokenizer, HybridTokenizerOutput


__all__ = ["HybridTokenizer", "HybridTokenizerOutput"]
