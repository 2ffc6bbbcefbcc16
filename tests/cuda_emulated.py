"""Runs csrc/cuda's routing kernels on the CPU: compiled by g++ against tests/cuda_emulator, called through ctypes."""

import ctypes
import shutil
import subprocess
from ctypes import POINTER, c_bool, c_char_p, c_int, c_int64, c_size_t, c_uint, c_uint64, c_void_p
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).parents[1]
EMULATOR = ROOT / "tests" / "cuda_emulator"
CSRC = ROOT / "csrc"
ROWS = 128  # of a tile
DTYPE_CODES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2, torch.float64: 3}


class Problem(ctypes.Structure):
    """dfn::route::Problem of csrc/cuda/pattern_route.h."""

    _fields_ = [
        ("dtype", c_int), ("wide", c_bool), ("backward", c_bool),
        ("T", c_int64), ("P", c_int64), ("K", c_int64), ("N", c_int64),
        ("left", c_void_p), ("left_stride", c_int64), ("weights", c_void_p),
        ("patterns", c_void_p), ("pattern_stride", c_int64), ("row_stride", c_int64),
        ("bias", c_void_p), ("x", c_void_p), ("x_stride", c_int64), ("y", c_void_p), ("parts", c_void_p),
        ("order", c_void_p), ("tile_patterns", c_void_p), ("tile_counts", c_void_p),
        ("workspace", c_void_p), ("stream", c_void_p),
    ]  # fmt: skip


def compile_library(folder: Path, driver: str, sources: list[Path]) -> Path:
    """The driver of this name and the kernels' sources as a shared library."""
    library = folder / f"{driver}.so"
    command = [
        shutil.which("g++"), "-std=c++20", "-O1", "-U_FORTIFY_SOURCE", "-Wall", "-Wno-unknown-pragmas", "-fPIC", "-shared",
        f"-I{EMULATOR}", f"-I{CSRC}", "-o", str(library), str(EMULATOR / f"{driver}.cpp"), "-x", "c++",
        *map(str, sources),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return library


class Emulator:
    """A compiled driver. `multiprocessors` is what launchers are told; `order` is the priority of warps."""

    def __init__(self, library: Path):
        lib = self.lib = ctypes.CDLL(str(library))
        lib.emulator_allocate.restype = c_void_p
        lib.emulator_allocate.argtypes = [c_size_t, c_size_t]
        lib.emulator_reset.argtypes = [c_uint, c_int]
        lib.emulator_error.restype = c_char_p
        lib.emulator_bank_conflicts.restype = lib.emulator_launches.restype = c_uint64
        self.reset()

    def reset(self, order: int = 0, multiprocessors: int = 4) -> None:
        self.lib.emulator_reset(order, multiprocessors)

    def check(self) -> None:
        error = self.lib.emulator_error().decode()
        assert not error, error

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype, align: int = 16) -> Tensor:
        """NaN up to a page that cannot be accessed."""
        size = torch.empty((), dtype=dtype).element_size()
        count = 1
        for n in shape:
            count *= n
        if count == 0:
            return torch.empty(shape, dtype=dtype)
        address = self.lib.emulator_allocate(count * size, align)
        memory = (ctypes.c_char * (count * size)).from_address(address)
        return torch.frombuffer(memory, dtype=dtype).view(shape)

    def place(self, x: Tensor | None, gap: int = 0, align: int | None = None) -> Tensor | None:
        """A copy of x that ends at such a page, its rows `gap` elements apart; there is NaN between them."""
        if x is None:
            return None
        *lead, size = x.shape
        rows = x.numel() // size if size else 0
        count = max(0, rows * (size + gap) - gap)
        memory = self.empty((count,), x.dtype, align or x.element_size())
        strides, step = [1], size + gap
        for n in reversed(lead):
            strides.append(step)
            step *= n
        out = memory.as_strided(x.shape, strides[::-1])
        return out.copy_(x)


def pointer(x: Tensor | None) -> int | None:
    return None if x is None or x.numel() == 0 else x.data_ptr()


class PatternRoute(Emulator):
    """The kernels of csrc/cuda/pattern_route*.cu on tensors of the CPU."""

    def __init__(self, library: Path):
        super().__init__(library)
        self.lib.pattern_route_plan.argtypes = [POINTER(Problem), POINTER(c_int64), POINTER(c_int64)]
        self.lib.pattern_route_run.argtypes = [POINTER(Problem), c_int64, c_int64]

    def tokens(self, left, weights, patterns, bias=None, x=None, groups=None, *, wide=False, splits=None):
        """(y, the sums for the gradient of weights); backward where x is given."""
        (T, P), backward = weights.shape, x is not None
        N = patterns.shape[2 if backward else 1]
        order, tile_patterns, tile_counts = groups or (None, None, None)
        y = self.empty((T, N), torch.float32 if wide else left.dtype)
        g = Problem(
            DTYPE_CODES[left.dtype], wide, backward, T, P, left.shape[1], N,
            pointer(left), left.stride(0), pointer(weights), pointer(patterns), patterns.stride(0), patterns.stride(1),
            pointer(bias), pointer(x), x.stride(0) if backward else 0, pointer(y), None,
            pointer(order), pointer(tile_patterns), pointer(tile_counts), None, None,
        )  # fmt: skip
        planned, columns = c_int64(), c_int64()
        self.lib.pattern_route_plan(g, planned, columns)
        splits = splits or planned.value
        parts = self.empty((columns.value, T, P), torch.float32) if backward else None
        if backward and (groups or left.shape[1] == 0):
            parts.zero_()
        workspace = self.empty((splits, T, N), torch.float32) if splits > 1 else None
        g.parts, g.workspace = pointer(parts), pointer(workspace)
        self.lib.pattern_route_run(g, splits, columns)
        self.check()
        return y, parts.sum(0) if backward else None
