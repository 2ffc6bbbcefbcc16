"""Launchers around the CUDA C++ kernels of csrc/cuda, and what PyTorch's own products do beside them."""
