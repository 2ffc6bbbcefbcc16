"""Triton kernels and their launchers. Each launcher has the signature of the C++ function of the same name."""
