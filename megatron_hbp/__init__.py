"""Long-context supervised fine-tuning on Megatron-LM with Hierarchical Balance Packing (arXiv 2503.07680)."""

__version__ = "0.1.0"
