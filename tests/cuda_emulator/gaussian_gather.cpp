// The operators of the gather in the emulator, for tests/kernels/test_cuda_emulated_gather.py: torch loads this library.
#include "emulator.h"
