"""Gradients of an attention: generated kernels, and the recomputation in plain PyTorch that serves everywhere else."""
