"""Triton kernels and their launchers. Each launcher has the signature of the C++ function of the same name."""

import torch

# Left alone, ptxas sometimes spills a few bytes to save registers that nobody needs (8 bytes at 64 registers on sm_80).
# A stated limit ends that; the compiler for AMD does not know the option.
NO_SPILLS = {} if torch.version.hip else {"maxnreg": 128}
