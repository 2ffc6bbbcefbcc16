"""The Hopper kernels of pattern_route without a GPU: TMA, mbarriers, wgmma and clusters in tests/cuda_emulator.

What that shows, and what not: test_cuda_emulated.py. Copies land and wgmma reads at any time that the PTX ISA allows.
"""

import re
import shutil
import subprocess
import sys
from ctypes import POINTER, c_bool
from pathlib import Path

import pytest
import torch
from cuda_emulated import CSRC, DTYPE_CODES, EMULATOR, PatternRoute, Plan, Problem, compare, compile_library, run_alone
from helpers import DEVICE, INTERPRETED, same_bits

SOURCES = [CSRC / "cuda" / f"pattern_route_{name}.cu" for name in ("sm90", "sm80")]  # sm80 adds the splits
KERNEL = CSRC / "cuda" / "pattern_route_sm90_kernel.h"
ORDERS = (0, 1, 2, 3)  # who runs first, when copies land, when wgmma reads: emulator.h
pytestmark = pytest.mark.skipif(
    INTERPRETED or DEVICE != "cpu" or shutil.which("g++") is None, reason="wants g++ and tensors on the CPU"
)


class Hopper(PatternRoute):
    def __init__(self, library):
        super().__init__(library)
        self.lib.pattern_route_takes.argtypes = [POINTER(Problem)]
        self.lib.pattern_route_takes.restype = c_bool


@pytest.fixture(scope="module")
def route(tmp_path_factory):
    return Hopper(compile_library(tmp_path_factory.mktemp("sm90"), "pattern_route_sm90", SOURCES))


SIZES = [  # K and N are equal modulo 8: one gap brings the rows of all operands to multiples of 16 bytes
    dict(T=300, P=3, K=150, N=142, multiprocessors=2),  # one cluster for two pairs of tiles
    dict(T=389, P=2, K=67, N=203, multiprocessors=4),  # the last pair has a block without tokens
    dict(T=257, P=3, K=601, N=137, multiprocessors=4),  # a depth of two chunks
    dict(T=131, P=7, K=71, N=39, multiprocessors=16),  # patterns divided among clusters
    dict(T=128, P=1, K=64, N=384, multiprocessors=2),  # nothing to cut
    dict(T=1, P=2, K=9, N=1, multiprocessors=2),
    dict(T=2, P=1, K=1, N=9, multiprocessors=4),
]


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_sizes(route, sizes, backward):
    for order in ORDERS:
        dtype = torch.float16 if order == 2 else torch.bfloat16
        compare(route, **sizes, gap=-sizes["K"] % 8, backward=backward, dtype=dtype, order=order)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_patterns_divided(route, backward):
    for splits in (1, 2, 5):
        compare(route, T=71, P=5, K=90, N=130, gap=6, splits=splits, backward=backward, order=splits)


def test_same_bits_in_any_order(route):
    torch.manual_seed(5)
    left, patterns = torch.randn(131, 72).bfloat16(), torch.randn(5, 72, 136).bfloat16()
    x, weights = torch.randn(131, 136).bfloat16(), torch.randn(131, 5)
    route.gap, route.align = 0, 16
    for route.splits in (None, 3):
        results = []
        for order in ORDERS:
            route.reset(order)
            results.append(route.tokens(left, weights, patterns, x=x))
        for y, dw in results[1:]:
            assert same_bits(y, results[0][0]) and same_bits(dw, results[0][1])


def test_plan(route):
    """Tiles of 192 columns where they waste no time, and patterns divided where blocks would have no tile."""
    plan = Plan()
    for T, P, K, N, backward, want in (
        (8192, 8, 512, 512, False, (1, 4)),
        (65536, 16, 768, 768, False, (1, 4)),  # 192 columns
        (65536, 16, 768, 768, True, (1, 6)),
        (2048, 8, 512, 512, False, (2, 4)),
        (256, 8, 512, 512, False, (8, 4)),
        (256, 8, 64, 512, False, (1, 4)),  # too little to divide
    ):
        route.reset(0, multiprocessors=132)
        route.lib.pattern_route_plan(Problem(dtype=1, backward=backward, T=T, P=P, K=K, N=N), plan)
        assert (plan.splits, plan.part_columns) == want, f"{(T, P, K, N)}"


def test_takes_what_tma_can_read(route):
    def taken(left, patterns, order=None):
        (T, K), (P, N, _) = left.shape, patterns.shape
        g = Problem(
            DTYPE_CODES[left.dtype], T=T, P=P, K=K, N=N, left=left.data_ptr(), left_stride=left.stride(0),
            patterns=patterns.data_ptr(), pattern_stride=patterns.stride(0), row_stride=patterns.stride(1),
            order=None if order is None else order.data_ptr(),
        )  # fmt: skip
        return route.lib.pattern_route_takes(g)

    left, patterns = torch.randn(5, 24).bfloat16(), torch.randn(3, 7, 24).bfloat16()
    assert taken(left, patterns) and taken(left.half(), patterns.half())
    assert taken(left[:, 8:20], patterns[:, 1:, 8:20])
    assert not taken(left[:, 4:], patterns[..., 4:])  # starts 8 bytes off
    assert not taken(left[:, :7].contiguous(), patterns[..., :7])  # rows 14 bytes apart
    assert taken(left[:1, :7].contiguous(), patterns[..., :7])  # but a single row has no distance
    assert not taken(left[:1].expand(5, -1), patterns)
    assert not taken(left, patterns[:1].expand(3, -1, -1))
    assert not taken(left, patterns.transpose(0, 1).contiguous().transpose(0, 1))
    assert not taken(left, patterns, order=torch.arange(5))
    assert not taken(left.float(), patterns.float())
    assert not taken(left[:0], patterns)


def functions_of(header):
    """Names of the functions outside of namespace detail."""
    text = re.sub(r"namespace detail \{.*?\n\}  // namespace detail", "", header.read_text(), flags=re.S)
    text = re.sub(r"__device__|__forceinline__|inline", "", text)
    return set(re.findall(r"^ *(?:void|bool|char\*|uint\w+|TensorMap) (\w+)\(", text, flags=re.M))


@pytest.mark.parametrize("headers", [("ptx.h", "ptx_sm90.h"), ("tensor_map.h",)], ids=str)
def test_the_emulator_has_the_same_functions(headers):
    real, emulated = (
        {name for header in headers for name in functions_of(folder / "cuda" / header)} for folder in (CSRC, EMULATOR)
    )
    assert real == emulated and len(real) > 1


# ---- deliberate errors ----------------------------------------------------------------------------------------------
SWAPS = {  # what is done wrong: old and new text, once or more
    "a stage is released before it is read": ("ptx::wgmma_wait<1>();", "ptx::wgmma_wait<2>();"),
    "sums are used before they are there": ("ptx::wgmma_wait<0>();", "ptx::wgmma_wait<1>();"),
    "accumulators are not fenced": ("ptx::wgmma_fence();", ""),
    "patterns are not waited for": ("ptx::wait(s.patterns_full[stage.slot], stage.parity);", ""),
    "tokens are not waited for": ("if (first) ptx::wait(s.tokens_full[token.slot], token.parity);", ""),
    "patterns are overwritten": ("ptx::wait(s.patterns_empty[stage.slot], stage.parity ^ 1);", ""),
    "the producer's parity": ("stage.parity ^ 1", "stage.parity"),
    "the consumers' parity": ("_full[stage.slot], stage.parity)", "_full[stage.slot], stage.parity ^ 1)"),
    "too few slots for tokens": ("kTokenSlots = 8;", "kTokenSlots = 4;", "static_assert(St", "// static_assert(St"),
    "only one block releases patterns": ("s.patterns_empty[i], kPair * kReaders", "s.patterns_empty[i], kReaders"),
    "too few bytes are expected": ("arrive_expecting(s.patterns_full[stage.slot], N * kLine)",
                                   "arrive_expecting(s.patterns_full[stage.slot], N / 2 * kLine)"),
    "both halves go to one place": ("+ half * (N / kPair * kLine)", ""),
    "barriers are not published": ("ptx::publish_barriers();", ""),
    "a block starts before the other": ("ptx::cluster_sync();\n  if", "__syncthreads();\n  if"),
    "a block ends before the other": ("ptx::cluster_sync();  // a", "{}  // a",
                                      "g, plan));\n    ptx::cluster_sync();", "g, plan));"),
    "rows of atoms": ("(start, 16, 8 * kLine)", "(start, 16, 4 * kLine)"),
    "strides of columns": ("(start, kDepth * kLine, 8 * kLine)", "(start, 8 * kLine, kDepth * kLine)"),
    "steps along the depth": ("left + part * 32", "left + part * 16"),
    "tokens of the next chunk": ("for (int k = 0; k < depth; ++k) token.advance();", ""),
    "weights of the wrong row": ("weight[i / 2 % 2]", "weight[0]"),
    "only the last chunk's dot products": ("chunk == 0 ? dot[h] : *part + dot[h]", "dot[h]"),
    "pairs change places": ("high ? v[i] : v[i + step], step", "high ? v[i + step] : v[i], step"),
}  # fmt: skip


def outcome(folder, text) -> subprocess.CompletedProcess:
    (folder / "cuda").mkdir()  # a quoted include is looked for beside the including file first
    (folder / "cuda" / KERNEL.name).write_text(text)
    shutil.copy(SOURCES[0], folder)
    library = compile_library(folder, "pattern_route_sm90", [folder / SOURCES[0].name, SOURCES[1]])
    return run_alone(__file__, library)


@pytest.mark.slow
def test_unchanged_kernel_passes_what_the_errors_must_not(tmp_path):
    done = outcome(tmp_path, KERNEL.read_text())
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("error", SWAPS)
def test_deliberate_errors_show(error, tmp_path):
    text, swaps = KERNEL.read_text(), SWAPS[error]
    for old, new in zip(swaps[::2], swaps[1::2], strict=True):
        assert old in text, f"{error}: what is to be replaced is not there"
        text = text.replace(old, new)
    done = outcome(tmp_path, text)
    assert done.returncode != 0, "nothing noticed"
    print(done.stderr.strip().splitlines()[-1])


if __name__ == "__main__":  # one library, in a process of its own: a broken kernel may do anything
    torch.manual_seed(0)
    changed = PatternRoute(Path(sys.argv[1]))
    for backward in (False, True):
        for order in (*ORDERS, 5):  # the last one runs one block far ahead of the other
            compare(changed, T=300, P=3, K=600, N=136, backward=backward, order=order, multiprocessors=2)
