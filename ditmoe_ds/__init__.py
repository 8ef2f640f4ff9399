"""Distributed training of Mixture-of-Experts diffusion transformers on DeepSpeed-MoE."""

__version__ = "0.1.0"
