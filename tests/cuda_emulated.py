"""Runs csrc/cuda's routing kernels on the CPU: compiled by g++ against tests/cuda_emulator, called through ctypes."""

import ctypes
import functools
import os
import shutil
import subprocess
import sys
import tempfile
from ctypes import POINTER, c_bool, c_char_p, c_int, c_int64, c_size_t, c_uint, c_uint64, c_void_p
from pathlib import Path

import torch
from torch import Tensor

from dfn_kernels.cuda.pattern_route import grouped

ROOT = Path(__file__).parents[1]
EMULATOR = ROOT / "tests" / "cuda_emulator"
CSRC = ROOT / "csrc"
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


def compile_library(
    folder: Path, driver: str, sources: list[Path], operators: bool = False, objects: tuple[str, ...] = ()
) -> Path:
    """The driver of this name and the kernels' sources as a shared library; with torch's headers for `operators`.

    Each becomes an object, "<name>.o", beside it; `objects` are some that exist.
    """
    library, torch_folder = folder / f"{driver}.so", Path(torch.__file__).parent
    compiler = [shutil.which("g++"), "-std=c++20", "-O1", "-U_FORTIFY_SOURCE", "-Wall", "-Wno-unknown-pragmas", "-fPIC",
                f"-I{EMULATOR}", f"-I{CSRC}"]  # fmt: skip
    link = []
    if operators:
        compiler += ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-isystem", str(torch_folder / "include")]
        link = [f"-L{torch_folder / 'lib'}", "-ltorch_cpu"]
    made, running = list(objects), []
    for source in (EMULATOR / f"{driver}.cpp", *sources):
        made.append(str(folder / f"{source.name}.o"))
        command = [*compiler, "-c", "-x", "c++", str(source), "-o", made[-1]]
        running.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True))
    failed = [said for said, code in ((run.communicate()[1], run.returncode) for run in running) if code]
    assert not failed, "".join(failed)
    subprocess.run([compiler[0], "-shared", "-o", str(library), *made, *link], check=True)
    return library


def run_alone(script: str, library: Path) -> subprocess.CompletedProcess:
    """The script on a library in a process of its own: a broken kernel may do anything."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    command = [sys.executable, script, str(library)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=env)


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


class Plan(ctypes.Structure):
    """dfn::route::Plan."""

    _fields_ = [("splits", c_int64), ("part_columns", c_int64)]


class PatternRoute(Emulator):
    """The kernels of csrc/cuda/pattern_route*.cu on tensors of the CPU, called as torch.ops.dfn_cuda.route_tokens is.

    `gap` elements of NaN are between the rows of the operands, which begin at multiples of `align` bytes, not more;
    `splits`: not what the plan says.
    """

    def __init__(self, library: Path):
        super().__init__(library)
        self.lib.pattern_route_plan.argtypes = self.lib.pattern_route_run.argtypes = [POINTER(Problem), POINTER(Plan)]
        self.gap, self.align, self.splits = 0, None, None

    def tokens(self, left, weights, patterns, bias=None, x=None, groups=None, wide=False) -> tuple[Tensor, Tensor]:
        (T, P), K, backward = weights.shape, left.shape[1], x is not None
        N = patterns.shape[2 if backward else 1]
        left, patterns, x = (None if t is None else self.place(t, self.gap, self.align) for t in (left, patterns, x))
        weights, bias = self.place(weights), self.place(bias)
        order, tile_patterns, tile_counts = (self.place(t) for t in groups or (None, None, None))
        y = self.empty((T, N), weights.dtype if wide else left.dtype)
        if T * N == 0:
            return y, weights.new_zeros(T if backward else 0, P)
        g = Problem(
            DTYPE_CODES[left.dtype], wide, backward, T, P, K, N,
            pointer(left), left.stride(0), pointer(weights), pointer(patterns), patterns.stride(0), patterns.stride(1),
            pointer(bias), pointer(x), x.stride(0) if backward else 0, pointer(y), None,
            pointer(order), pointer(tile_patterns), pointer(tile_counts), None, None,
        )  # fmt: skip
        plan = Plan()
        self.lib.pattern_route_plan(g, plan)
        plan.splits = self.splits or plan.splits
        parts = self.empty((plan.part_columns if backward else 0, T, P), weights.dtype)
        if groups or K == 0:
            parts.zero_()
        workspace = self.empty((plan.splits, T, N), weights.dtype) if plan.splits > 1 else None
        g.parts, g.workspace = pointer(parts), pointer(workspace)
        self.lib.pattern_route_run(g, plan)
        self.check()
        return y, parts.sum(0)


@functools.cache  # operators can be registered once in a process
def operators() -> PatternRoute:
    """The kernels, with torch.ops.dfn_cuda on them for tensors of the CPU."""
    sources = sorted((CSRC / "cuda").glob("pattern_route*.cu"))
    with tempfile.TemporaryDirectory() as folder:
        library = compile_library(Path(folder), "pattern_route", sources, operators=True)
        if torch.version.cuda is None:  # else the real one is loaded
            torch.ops.load_library(str(library))
        return PatternRoute(library)


# ---- one kernel against float64 -------------------------------------------------------------------------------------
def compare(route: PatternRoute, T, P, K, N, *, dtype=torch.bfloat16, backward=False, top_k=None, gap=0, align=16,
            splits=None, order=0, multiprocessors=4) -> None:  # fmt: skip
    """Fails unless y and the gradient of the weights are right, to float32 rounding and the last bit of y's dtype."""
    real = torch.float64 if dtype == torch.float64 else torch.float32
    left, x = torch.randn(T, K).to(dtype), torch.randn(T, N).to(dtype)
    patterns = torch.randn(P, *((K, N) if backward else (N, K))).to(dtype)
    weights, bias, groups = torch.randn(T, P, dtype=real), None if backward else torch.randn(N, dtype=real), None
    if top_k:
        chosen = torch.rand(T, P).topk(top_k).indices.sort(1).values
        weights = torch.zeros_like(weights).scatter(1, chosen, weights.gather(1, chosen))
        groups = grouped(chosen, P)
    route.reset(order, multiprocessors)
    route.gap, route.align, route.splits = gap, align, splits
    y, dw = route.tokens(left, weights, patterns, bias, x if backward else None, groups)
    sums = torch.einsum("tk,pkn->tpn" if backward else "tk,pnk->tpn", left.double(), patterns.double())
    exact = torch.einsum("tp,tpn->tn", weights.double(), sums) + (0 if bias is None else bias.double())
    unit = torch.finfo(real).eps
    # Float32 sums, of 2^10 terms at most here, are off by some 10 units of their terms' size; then y is rounded once.
    size = exact.square().mean().sqrt()
    assert ((y.double() - exact).abs() <= torch.finfo(dtype).eps * exact.abs() + 50 * unit * size).all(), "y is wrong"
    if not backward and dtype in (torch.float16, torch.bfloat16):
        wide, _ = route.tokens(left, weights, patterns, bias, None, groups, wide=True)
        assert torch.equal(wide.to(dtype), y), "y is not the rounded float32 result"
    if backward:
        want = torch.einsum("tpn,tn->tp", sums, x.double())
        if top_k:
            mine = torch.zeros_like(want).scatter(1, chosen, 1.0)
            dw, want = dw * mine, want * mine
        assert ((dw.double() - want).abs() <= 50 * unit * want.square().mean().sqrt()).all(), "dw is wrong"
    assert route.lib.emulator_bank_conflicts() == 0, "ldmatrix meets conflicts of banks"


# Enough that every deliberate error in test_cuda_emulated.py shows: all sizes differ, tails everywhere, lists, splits.
MUTATION_CASES = (
    dict(T=131, P=3, K=137, N=151, gap=7, align=16),
    dict(T=131, P=3, K=137, N=151, gap=7, align=16, backward=True, order=1),
    dict(T=67, P=5, K=71, N=13, gap=1, align=2, splits=2, order=3),
    dict(T=263, P=5, K=61, N=37, top_k=2, backward=True, order=4),
)

if __name__ == "__main__":  # one library, in a process of its own: a broken kernel may do anything
    torch.manual_seed(0)
    for case in MUTATION_CASES:
        compare(PatternRoute(Path(sys.argv[1])), **case)
