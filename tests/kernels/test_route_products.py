"""pattern_route on CUDA beside PyTorch's products, without a GPU: scaled rows, sums, pieces, launches, who takes what.

The kernels run in tests/cuda_emulator; what that shows, and what not: test_cuda_emulated.py.
"""

import ctypes
import importlib
import shutil
import subprocess
import sys
from ctypes import POINTER, c_int, c_int64, c_void_p
from pathlib import Path

import cuda_emulated
import pytest
import torch
from cuda_emulated import CSRC, DTYPE_CODES, Emulator, compile_library, pointer, run_alone
from helpers import DEVICE, DTYPES, INTERPRETED, same_bits
from torch.utils._python_dispatch import TorchDispatchMode

from dfn_kernels import _backends, _native
from dfn_kernels.cuda import pattern_route as launcher

SOURCE = CSRC / "cuda" / "pattern_route_products.cu"
emulated = pytest.mark.skipif(
    INTERPRETED or DEVICE != "cpu" or shutil.which("g++") is None, reason="wants g++ and tensors on the CPU"
)
with_operators = pytest.mark.skipif(torch.version.cuda is not None, reason="torch.ops.dfn_cuda is the real one")


class Scaling(ctypes.Structure):
    """dfn::route::Scaling of csrc/cuda/pattern_route.h."""

    _fields_ = [("dtype", c_int), ("T", c_int64), ("P", c_int64), ("E", c_int64), ("rows", c_void_p),
                ("rows_stride", c_int64), ("weights", c_void_p), ("weights_stride", c_int64), ("out", c_void_p),
                ("stream", c_void_p)]  # fmt: skip


class Combination(ctypes.Structure):
    """dfn::route::Combination, there."""

    _fields_ = [("dtype", c_int), ("T", c_int64), ("P", c_int64), ("N", c_int64), ("sums", c_void_p),
                ("weights", c_void_p), ("bias", c_void_p), ("x", c_void_p), ("x_stride", c_int64), ("y", c_void_p),
                ("parts", c_void_p), ("parts_stride", c_int64), ("stream", c_void_p)]  # fmt: skip


def load(library: Path) -> Emulator:
    kernels = Emulator(library)
    kernels.lib.scale_rows.argtypes = [POINTER(Scaling)]
    kernels.lib.combine_products.argtypes = [POINTER(Combination)]
    return kernels


def real_of(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


# ---- the kernels ----------------------------------------------------------------------------------------------------
def check_scaling(kernels: Emulator, T, P, E, *, dtype, gap=0, skip=0, order=0) -> None:
    """Each product is rounded once: PyTorch's bits. Rows begin `skip` elements behind a multiple of 16 bytes."""
    kernels.reset(order)
    rows = kernels.place(torch.randn(T, skip + E).to(dtype), gap, 16)[:, skip:]
    weights = kernels.place(torch.randn(T, P, dtype=real_of(dtype)), gap=2)  # some columns of a wider tensor
    out = kernels.empty((T, P, E), dtype)
    code, step = DTYPE_CODES[dtype], weights.stride(0)
    kernels.lib.scale_rows(
        Scaling(code, T, P, E, pointer(rows), rows.stride(0), pointer(weights), step, pointer(out), None)
    )
    kernels.check()
    assert same_bits(out, (weights[:, :, None] * rows[:, None, :].to(real_of(dtype))).to(dtype))


def check_combination(kernels: Emulator, T, P, N, *, dtype, backward, gap=0, order=0) -> None:
    """Against float64, to the rounding of y's dtype and of so many sums; rows are a slice of more tokens."""
    kernels.reset(order)
    real, strips, more = real_of(dtype), -(-N // 512), 3
    sums, weights, bias = (torch.randn(shape, dtype=real) for shape in ((P, T, N), (T, P), (N,)))
    x = kernels.place(torch.randn(T, N).to(dtype), gap) if backward else None
    placed = [kernels.place(t) for t in (sums, weights)]
    bias = None if backward else kernels.place(bias)
    y = kernels.empty((T, N), dtype)
    parts = kernels.empty((strips, T + more, P), real) if backward else None
    kernels.lib.combine_products(Combination(
        DTYPE_CODES[dtype], T, P, N, *map(pointer, placed), pointer(bias), pointer(x), x.stride(0) if backward else 0,
        pointer(y), pointer(parts), (T + more) * P, None,
    ))  # fmt: skip
    kernels.check()
    exact = torch.einsum("tp,ptn->tn", weights.double(), sums.double()) + (0 if bias is None else bias.double())
    unit = torch.finfo(real).eps
    size = exact.square().mean().sqrt()
    assert ((y.double() - exact).abs() <= torch.finfo(dtype).eps * exact.abs() + 8 * unit * size).all(), "y is wrong"
    if backward:
        assert parts[:, T:].isnan().all(), "rows of others were written"
        products = sums.double() * x.double()
        want = torch.stack([part.sum(-1).t() for part in products.split(512, dim=-1)])
        size = products.square().sum(-1).mean().sqrt()
        assert ((parts[:, :T].double() - want).abs() <= 8 * unit * size).all(), "dw is wrong"


SCALINGS = [dict(T=131, P=3, E=40), dict(T=37, P=5, E=1), dict(T=1, P=1, E=16, gap=3), dict(T=67, P=7, E=24, gap=8),
            dict(T=67, P=2, E=24, gap=3), dict(T=67, P=2, E=32, skip=4, gap=4), dict(T=29, P=9, E=521),
            dict(T=37, P=2, E=13, gap=3)]  # fmt: skip
COMBINATIONS = [dict(T=67, P=3, N=131), dict(T=5, P=7, N=1031, gap=5), dict(T=1, P=1, N=1), dict(T=17, P=2, N=512),
                dict(T=3, P=11, N=513, gap=1)]  # fmt: skip


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    return load(compile_library(tmp_path_factory.mktemp("products"), "pattern_route_products", [SOURCE]))


@emulated
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", SCALINGS, ids=str)
def test_scaled_rows(kernels, sizes, dtype):
    check_scaling(kernels, **sizes, dtype=dtype, order=sizes["P"])


@emulated
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", COMBINATIONS, ids=str)
def test_sums_of_products(kernels, sizes, dtype, backward):
    check_combination(kernels, **sizes, dtype=dtype, backward=backward, order=sizes["P"])


SWAPS = {
    "weights of another token": ("(g.weights) + t * g.P;", "(g.weights) + g.P;"),
    "weights as if dense": ("t * g.weights_stride", "t * g.P"),
    "rows as if dense": ("t * g.rows_stride", "t * g.E"),
    "x as if dense": ("t * g.x_stride", "t * g.N"),
    "too wide a copy": ("g.E % kUnit == 0 && ", ""),
    "strides not asked": ("(g.T == 1 || g.rows_stride % kUnit == 0)", "true"),
    "starts not asked": ("reinterpret_cast<uintptr_t>(g.rows) % 16 == 0 && ", ""),
    "patterns overlap": ("out + p * g.E", "out + p * (g.E - 1)"),
    "tail of T": ("if (t >= g.T) return;\n  const int64_t e", "const int64_t e"),
    "sums of another token": ("(p * g.T + t) * g.N", "p * g.T * g.N"),
    "tail of N": ("n0 + i * kWarp < g.N ? sums[n0 + i * kWarp] : A(0)", "sums[n0 + i * kWarp]"),
    "half a warp": ("step = kWarp / 2", "step = kWarp / 4"),
    "strips in one place": ("strip * g.parts_stride", "strip * g.T * g.P"),
    "columns of the first strip": ("strip * kStrip + threadIdx.x % kWarp", "threadIdx.x % kWarp"),
    "no bias": ("bias ? __ldg(bias + n) : A(0)", "A(0)"),
    "a warp too few": ("ceil_div(g.N, kStrip), kThreads / kWarp)", "ceil_div(g.N, kStrip), kThreads)"),
}  # fmt: skip


def outcome(folder: Path, text: str) -> subprocess.CompletedProcess:
    (folder / SOURCE.name).write_text(text)
    library = compile_library(folder, "pattern_route_products", [folder / SOURCE.name])
    return run_alone(__file__, library)


@emulated
@pytest.mark.slow
def test_unchanged_kernels_pass_what_the_errors_must_not(tmp_path):
    done = outcome(tmp_path, SOURCE.read_text())
    assert done.returncode == 0, done.stderr


@emulated
@pytest.mark.slow
@pytest.mark.parametrize("error", SWAPS)
def test_deliberate_errors_show(error, tmp_path):
    text, (old, new) = SOURCE.read_text(), SWAPS[error]
    assert text.count(old) == 1, f"{error}: what is to be replaced is there {text.count(old)} times"
    done = outcome(tmp_path, text.replace(old, new))
    assert done.returncode != 0, "nothing noticed"
    print(done.stderr.strip().splitlines()[-1])


# ---- pieces ---------------------------------------------------------------------------------------------------------
class Calls(TorchDispatchMode):
    """What runs on the device: names of the operators, without views and allocations."""

    FREE = {"empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided"}

    def __init__(self):
        super().__init__()
        self.names, self.largest = [], 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        returns = function._schema.returns
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in returns)
        if not is_view and function._schema.name.split("::")[1] not in self.FREE:
            self.names.append(function._schema.name)
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.untyped_storage().nbytes())
        return out


@pytest.fixture
def operators():
    route = cuda_emulated.operators()
    route.reset()
    yield route
    route.check()


@emulated
@with_operators
@pytest.mark.parametrize("O, I", [(67, 37), (37, 67), (41, 41)])
def test_pieces(operators, monkeypatch, O, I):  # noqa: E741
    """Of what could be [T, P, O], [T, P * I] or [P, T, N] there is never more than the scratch memory holds."""
    T, P, scratch = 131, 7, 80_000
    monkeypatch.setattr(launcher, "SCRATCH_BYTES", scratch)
    x, grad, patterns, weights = torch.randn(T, I), torch.randn(T, O), torch.randn(P, O, I), torch.randn(T, P)
    assert T * P * min(O, I) * 4 > scratch > max(t.numel() for t in (x, grad, patterns, weights)) * 4
    with Calls() as calls:
        y, _ = launcher._products(x, weights, patterns, None, None, False)
        dx, dw = launcher._products(grad, weights, patterns, None, x, False)
        dp = launcher.gradient_of_patterns(grad, x, weights)
    assert calls.largest <= scratch
    assert calls.names.count("dfn_cuda::scale_rows") >= 2 and calls.names.count("dfn_cuda::combine_products") > 2
    w, p, left, g = (t.double() for t in (weights, patterns, x, grad))
    for ours, exact in (
        (y, torch.einsum("tp,poi,ti->to", w, p, left)), (dx, torch.einsum("tp,poi,to->ti", w, p, g)),
        (dw, torch.einsum("poi,to,ti->tp", p, g, left)), (dp, torch.einsum("tp,to,ti->poi", w, g, left)),
    ):  # fmt: skip
        assert (ours - exact).norm() < 1e-6 * exact.norm()


@emulated
@with_operators
@pytest.mark.parametrize("O, I", [(1, 37), (37, 1), (7, 7), (15, 64)])
def test_few_channels_sum_in_float32(operators, O, I):  # noqa: E741
    """A sum over many tokens that a GPU splits is rounded once, where it is handed over."""
    T, P = 1031, 5
    x, grad, weights = torch.randn(T, I).bfloat16(), torch.randn(T, O).bfloat16(), torch.randn(T, P)
    with Calls() as calls:
        dp = launcher.gradient_of_patterns(grad, x, weights)
    wide, narrow = (x, grad) if O <= I else (grad, x)
    scaled = (weights[:, :, None] * narrow[:, None].float()).bfloat16().double()
    exact = torch.einsum("tpo,ti->poi" if O <= I else "tpi,to->poi", scaled, wide.double())
    assert dp.dtype == torch.bfloat16 and "aten::copy_" in calls.names
    assert ((dp.double() - exact).abs() <= 2.0**-8 * exact.abs() + 1e-4).all()


# ---- launches -------------------------------------------------------------------------------------------------------
def calls_of(run) -> list[str]:
    with Calls() as calls:
        run()
    return calls.names


@pytest.mark.parametrize("way", ["kernel", "kernel, patterns divided", "products", "wide rows"])
@emulated
@with_operators
def test_calls_of_the_launcher(operators, monkeypatch, way):
    """At most 2 forward and 6 backward: launches of ours, and PyTorch's calls that do work."""
    T, P, O, I = 131, 64 if "divided" in way else 3, 24, 600 if way == "wide rows" else 40  # noqa: E741
    operators.reset(0, multiprocessors=64 if "divided" in way else 1)
    monkeypatch.setattr(launcher, "_left_to_products", lambda *_: way in ("products", "wide rows"))
    dtype = torch.float32 if way in ("products", "wide rows") else torch.bfloat16  # PyTorch's CPU product casts half
    x, grad, patterns = (torch.randn(shape).to(dtype) for shape in ((T, I), (T, O), (P, O, I)))
    weights, bias = torch.randn(T, P), torch.randn(O)
    before = operators.lib.emulator_launches()
    names = calls_of(lambda: launcher.pattern_route(x, weights, patterns, bias, None, False))
    launches = operators.lib.emulator_launches() - before
    others = [name for name in names if not name.startswith("dfn_cuda::")]
    assert launches + len(others) <= 2 and launches == (2 if "divided" in way else 1), (launches, names)

    before = operators.lib.emulator_launches()
    names = calls_of(lambda: launcher.pattern_route_backward(grad, x, weights, patterns, None, True, True, True))
    launches = operators.lib.emulator_launches() - before
    others = [name for name in names if not name.startswith("dfn_cuda::")]
    assert launches + len(others) <= 6 and launches == (3 if "divided" in way else 2), (launches, names)


@pytest.mark.skipif(not INTERPRETED, reason="Triton's launcher on tensors of the CPU")
def test_calls_of_the_triton_launcher(monkeypatch):
    from dfn_kernels.triton import pattern_route as ours

    launches = []
    for name in ("tokens_kernel", "patterns_kernel"):
        counted = {"__getitem__": lambda self, grid, name=name: lambda *args, **tile: launches.append(name)}
        monkeypatch.setattr(ours, name, type("Counted", (), counted)())
    T, P, O, I = 37, 3, 24, 70  # noqa: E741
    x, grad, patterns = torch.randn(T, I), torch.randn(T, O), torch.randn(P, O, I)
    weights, bias = torch.randn(T, P), torch.randn(O)
    assert len(calls_of(lambda: ours.pattern_route(x, weights, patterns, bias, None, False)) + launches) == 1
    launches.clear()
    backward = calls_of(lambda: ours.pattern_route_backward(grad, x, weights, patterns, None, True, True, True))
    assert len(launches) == 2 and len(backward + launches) <= 6


@emulated
@with_operators
def test_calls_around_the_launcher(operators, monkeypatch):
    """The public function adds none where dtypes and shapes are what the launcher wants."""
    if _backends.missing("pattern_route", "native", "cpu"):
        pytest.skip("goes through the native backend's ops")
    module = importlib.import_module("dfn_kernels.pattern_route")
    inside = []

    class Watched:
        def pattern_route(self, *args):
            inside.append("forward")
            return args[0].new_empty(args[0].shape[0], args[2].shape[1])

        def pattern_route_backward(self, grad, x, weights, patterns, *rest):
            inside.append("backward")
            return (*(torch.empty(t.shape) for t in (x, weights, patterns)), torch.empty(11))

    monkeypatch.setattr(module, "_launcher", lambda backend, x: Watched())
    leaves = [torch.randn(shape, requires_grad=True) for shape in ((2, 5, 7), (2, 5, 3), (3, 11, 7), (11,))]
    grad = torch.randn(2, 5, 11)
    outside = calls_of(lambda: torch.autograd.grad(module.pattern_route(*leaves), leaves, grad))
    assert inside == ["forward", "backward"]
    assert [name for name in outside if not name.startswith("dfn::")] == []


# ---- who takes what -------------------------------------------------------------------------------------------------
def by_products(T, P, I, O, backward, dtype=torch.bfloat16, capability=(9, 0)):  # noqa: E741
    K, N = (O, I) if backward else (I, O)
    return launcher.by_products(T, P, K, N, dtype, capability, backward)


def test_rule():
    """Hidden layers in half precision are the kernel's, forward and backward; deep and float32 ones PyTorch's."""
    for backward in (False, True):
        for T, P, d in ((1, 8, 512), (1024, 8, 512), (8192, 8, 512), (65536, 16, 768)):
            assert not by_products(T, P, d, d, backward)
            assert not by_products(T, P, d, d, backward, capability=(8, 0))
        assert by_products(8192, 8, 512, 512, backward, torch.float32)
        assert not by_products(7, 3, 64, 64, backward, torch.float32)
    # Vocabulary: forward the kernel was measured at 0.137 ms, and the sums of products alone are 0.15 ms of memory.
    assert not by_products(1024, 8, 512, 10_000, backward=False)
    assert by_products(1024, 8, 512, 10_000, backward=True)
    assert by_products(8, 8, 512, 10_000, backward=True)  # a tile has 256 tokens
    # The sums of 8 tokens fill the scratch memory, and each of 512 pieces would read 8.6 GB of patterns again.
    for backward in (False, True):
        assert not by_products(4096, 256, 4096, 4096, backward)
        assert by_products(8, 256, 4096, 4096, backward)  # one piece
    assert launcher.grouping_pays(65536, 16, 768, 768, 2, torch.bfloat16)
    assert not launcher.grouping_pays(1024, 8, 512, 512, 2, torch.bfloat16)


@pytest.mark.parametrize("built, capability, want", [
    (None, (9, 0), "native"), (None, (8, 6), "native"), (None, (10, 0), "triton"), (None, (12, 0), "triton"),
    (None, (7, 5), "triton"), ("not built", (9, 0), "triton"),
])  # fmt: skip
def test_default_on_a_gpu(monkeypatch, built, capability, want):
    """CUDA C++ where it is built and was compiled for the GPU's generation, Triton elsewhere; any can be asked for."""
    monkeypatch.setattr(_native, "CUDA_MISSING", built)
    monkeypatch.setattr(_backends, "TRITON_MISSING", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=None: capability if index == 3 else (0, 0))
    assert _backends.choose("pattern_route", "cuda", 3) == want
    assert _backends.choose("flow_drift", "cuda", 3) == "triton"
    with _backends.use_backend("native"):
        if built or capability < (8, 0):
            with pytest.raises(RuntimeError, match=built or "compute capability 8.0"):
                _backends.choose("pattern_route", "cuda", 3)
        else:
            assert _backends.choose("pattern_route", "cuda", 3) == "native"
    monkeypatch.setattr(_backends, "TRITON_MISSING", "no")
    fallback = "reference" if built or capability < (8, 0) else "native"
    assert _backends.choose("pattern_route", "cuda", 3) == fallback


def test_the_choice_is_a_constant_in_compiled_code(monkeypatch):
    monkeypatch.setattr(_native, "CUDA_MISSING", None)
    monkeypatch.setattr(_backends, "TRITON_MISSING", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=None: (9, index))

    @torch.compile(fullgraph=True, backend="eager")
    def chosen(x):
        return x + (_backends.choose("pattern_route", "cuda", torch.device("cuda", 0).index) == "native")

    assert chosen(torch.zeros(())) == 1


if __name__ == "__main__":  # one library, in a process of its own: a broken kernel may do anything
    torch.manual_seed(0)
    changed = load(Path(sys.argv[1]))
    for sizes in SCALINGS:
        check_scaling(changed, **sizes, dtype=torch.bfloat16)
    for sizes in COMBINATIONS:
        for backward in (False, True):
            check_combination(changed, **sizes, dtype=torch.bfloat16, backward=backward)
