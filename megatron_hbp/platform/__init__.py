"""Megatron-LM on a machine without CUDA. Import `megatron_hbp.platform.cpu` only where there is no CUDA device."""
