"""The CUDA kernels of pattern_route without a GPU: run in tests/cuda_emulator (what that is: its emulator.h).

It shows that every lane loads, multiplies, adds and stores what it should, in any order of the warps, and that
barriers and waits are where they must be. It does not show that a GPU does the same, nor how fast.
"""

import importlib
import shutil
import subprocess

import cuda_emulated
import pytest
import torch
from cuda_emulated import CSRC, compare, compile_library
from helpers import DEVICE, INTERPRETED, check_against_reference, same_bits

from bench import route_rule
from dfn_kernels import _backends, pattern_route
from dfn_kernels.cuda import pattern_route as launcher

KERNEL = CSRC / "cuda" / "pattern_route_sm80_kernel.h"
SOURCES = [CSRC / "cuda" / f"pattern_route_{name}.cu" for name in ("sm80", "simple", "sm90", "products")]
pytestmark = pytest.mark.skipif(
    INTERPRETED or DEVICE != "cpu" or shutil.which("g++") is None, reason="wants g++ and tensors on the CPU"
)


@pytest.fixture(scope="module")
def route():
    return cuda_emulated.operators()


# ---- the kernels against float64 ------------------------------------------------------------------------------------
SIZES = [
    dict(T=131, P=3, K=137, N=151, gap=7),
    dict(T=1, P=5, K=67, N=131),
    dict(T=257, P=1, K=67, N=13),
    dict(T=1, P=1, K=1, N=1),
    dict(T=3, P=11, K=5, N=7),
    dict(T=128, P=2, K=64, N=128),
    dict(T=7, P=2, K=1, N=131),
    dict(T=7, P=2, K=131, N=1),
]


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_sizes(route, sizes, backward):
    half = torch.float16 if sizes["T"] == 3 else torch.bfloat16
    for order, dtype in ((sizes["K"] % 4, half), (0, torch.float32)):
        compare(route, **sizes, backward=backward, dtype=dtype, order=order)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_strides_and_alignments(route, backward):
    """Rows that can be copied by 16, 8, 4 and 2 bytes, and a base that is less aligned than the strides."""
    for K, gap, align in ((64, 0, 16), (67, 1, 8), (67, 3, 4), (67, 0, 2), (72, 0, 2), (72, 0, 4)):
        compare(route, T=19, P=2, K=K, N=K + 8, gap=gap, align=align, backward=backward, order=gap)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_patterns_divided(route, backward):
    for splits in (2, 3, 7):
        compare(route, T=131, P=7, K=67, N=11, splits=splits, backward=backward, order=splits)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_lists_of_patterns(route, top_k, backward):
    compare(route, T=263, P=5, K=37, N=29, top_k=top_k, backward=backward, order=top_k)
    if top_k == 2:
        compare(route, T=263, P=5, K=37, N=29, top_k=2, backward=backward, splits=4)
        compare(route, T=131, P=5, K=17, N=9, top_k=2, backward=backward, dtype=torch.float32)


def test_nothing_to_add(route):
    for dtype in (torch.bfloat16, torch.float32):
        left, weights = torch.empty(3, 0, dtype=dtype), torch.ones(3, 2)
        y, _ = route.tokens(left, weights, torch.empty(2, 5, 0, dtype=dtype), torch.ones(5))
        assert y.eq(1).all()
        y, dw = route.tokens(left, weights, torch.empty(2, 0, 5, dtype=dtype), x=torch.ones(3, 5, dtype=dtype))
        assert y.eq(0).all() and dw.eq(0).all()


def test_float32_sums_have_two_levels(route):
    """Behind 2^28, single ones are lost in float32, a sum of 16 joined by three others of its kind is not."""
    route.reset()
    route.gap, route.align, route.splits = 0, None, None
    left, patterns = torch.ones(2, 256), torch.ones(1, 3, 256)
    left[:, 0] = patterns[..., 0] = 2.0**14
    left[:, 1:] *= 2
    assert (route.tokens(left, torch.ones(2, 1), patterns)[0] >= 2**28 + 2 * (256 - 16)).all()


def test_same_bits_in_any_order(route):
    torch.manual_seed(5)
    left, patterns = torch.randn(131, 71).bfloat16(), torch.randn(5, 71, 37).bfloat16()
    x, weights = torch.randn(131, 37).bfloat16(), torch.randn(131, 5)
    route.gap, route.align = 0, None
    for route.splits in (None, 3):
        results = []
        for order in (0, 1, 5):
            route.reset(order)
            results.append(route.tokens(left, weights, patterns, x=x))
        for y, dw in results[1:]:
            assert same_bits(y, results[0][0]) and same_bits(dw, results[0][1])


def test_plan(route):
    """Few tiles on many multiprocessors: the patterns are divided; many tiles: they are not."""
    plan, problem = cuda_emulated.Plan(), cuda_emulated.Problem(dtype=1, K=512, N=512, P=8)
    for T, want in ((1, 8), (128, 8), (1024, 4), (8192, 1), (1 << 20, 1)):
        problem.T = T
        route.reset(0, multiprocessors=132)
        route.lib.pattern_route_plan(problem, plan)
        assert plan.splits == want and plan.part_columns == 4
    problem.P = 0
    route.lib.pattern_route_plan(problem, plan)
    assert plan.splits == 1


# ---- the whole op over the emulated kernels --------------------------------------------------------------------------
class OnTheCPU:
    """The CUDA launcher for CPU tensors; `blocks` are not its matter."""

    @staticmethod
    def pattern_route(x, weights, patterns, bias, chosen, blocks, wide):
        return launcher.pattern_route(x, weights, patterns, bias, chosen, wide)

    @staticmethod
    def pattern_route_backward(grad, x, weights, patterns, chosen, blocks, *needed):
        return launcher.pattern_route_backward(grad, x, weights, patterns, chosen, *needed)


@pytest.fixture(params=["kernels", "products"])
def op(request, route, monkeypatch):
    if _backends.missing("pattern_route", "native", "cpu"):
        pytest.skip("goes through the native backend's ops")
    if torch.version.cuda is not None:
        pytest.skip("torch.ops.dfn_cuda is the real one")
    route.reset()
    route.gap, route.align, route.splits = 0, None, None
    monkeypatch.setattr(importlib.import_module("dfn_kernels.pattern_route"), "_launcher", lambda backend, x: OnTheCPU)
    monkeypatch.setattr(launcher, "_left_to_products", lambda *_: request.param == "products")
    monkeypatch.setattr(launcher, "SCRATCH_BYTES", 1 << 13)  # several pieces
    monkeypatch.setattr(launcher, "grouping_pays", lambda *sizes: True)
    yield pattern_route
    route.check()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_op(op, dtype):
    real = torch.float64 if dtype == torch.float64 else torch.float32
    for T, P, O, I, more in (
        (131, 3, 67, 37, dict(bias=torch.randn(67).to(dtype).to(real))),
        (141, 5, 23, 29, dict(top_k=2)),
        (17, 2, 19, 11, dict(out_dtype=torch.float32)),
        (137, 3, 40, 72, {}),  # aligned as every kernel wants it
    ):
        inputs = dict(
            x=torch.randn(T, I).to(dtype), weights=torch.randn(T, P).to(dtype).to(real),
            patterns=torch.randn(P, O, I).div(I**0.5).to(dtype), **more,
        )  # fmt: skip
        check_against_reference(op, inputs, "native")


@pytest.mark.parametrize("empty", [dict(T=0), dict(P=0), dict(O=0), dict(I=0), dict(T=0, I=0)], ids=str)
def test_op_on_nothing(op, empty):
    T, P, O, I = ({"T": 5, "P": 3, "O": 7, "I": 11} | empty).values()
    for dtype in (torch.float32, torch.bfloat16):
        inputs = [torch.randn(T, I).to(dtype), torch.randn(T, P), torch.randn(P, O, I).to(dtype), torch.randn(O)]
        leaves = [x.requires_grad_() for x in inputs]
        y = op(*leaves)
        assert torch.equal(y, inputs[3].to(dtype).expand(T, O))
        y.sum().backward()
        assert all(x.grad.eq(0).all() for x in leaves[:3]) and leaves[3].grad.eq(T).all()


@pytest.mark.skipif(torch.version.cuda is not None, reason="torch.ops.dfn_cuda is the real one")
def test_operator_checks_what_it_is_given(route):
    x, w, p = torch.randn(5, 7).bfloat16(), torch.randn(5, 3), torch.randn(3, 11, 7).bfloat16()
    run = torch.ops.dfn_cuda.route_tokens
    nothing = (None, None, None, None, None)
    for args in (
        (x, w, p.half(), *nothing, False), (x, w.double(), p, *nothing, False), (x, w[:, :2], p, *nothing, False),
        (x, w, p[:, :, :5], *nothing, False), (x.t().contiguous().t(), w, p, *nothing, False),
        (x, w, p, torch.randn(11).bfloat16(), *nothing[1:], False),
        (x, w, p, None, None, torch.arange(5), None, None, False),
        (x, w, p, None, x, None, None, None, True),
    ):  # fmt: skip
        with pytest.raises(RuntimeError):
            run(*args)
    scale, rows = torch.ops.dfn_cuda.scale_rows, torch.randn(5, 7)
    for args in ((rows, w.double()), (rows, w[:3]), (rows.t().contiguous().t(), w), (rows.double(), w), (rows[0], w)):
        with pytest.raises(RuntimeError):
            scale(*args)
    combine, sums, y, parts = torch.ops.dfn_cuda.combine_products, torch.randn(3, 5, 7), torch.empty(5, 7), torch.ones
    for args in (
        (sums, w, None, rows, y, None), (sums, w, None, None, y, parts(1, 5, 3)),
        (sums, w.double(), None, None, y, None), (sums, w, rows[0].double(), None, y, None),
        (sums, w, rows[0, :5], None, y, None),
        (sums.double(), w, None, None, y, None), (sums, w, None, None, y[:4], None),
        (sums, w, None, None, y.t().contiguous().t(), None), (sums, w, None, x, y, parts(1, 5, 3)),
        (sums, w, None, rows, y, parts(2, 5, 3)), (sums, w, None, rows, y, parts(1, 5, 4)[..., :3]),
        (sums, w, None, rows, y, parts(1, 5, 3).double()), (sums[0], w, None, None, y, None),
    ):  # fmt: skip
        with pytest.raises(RuntimeError):
            combine(*args)


# ---- the rule, the groups -------------------------------------------------------------------------------------------
def test_rule_benchmark(route, monkeypatch):
    """bench.route_rule on tensors of the CPU: it times what is right, and nothing else."""
    monkeypatch.setattr(launcher, "_kernel", route.tokens)
    route.reset()
    route.gap, route.align, route.splits = 0, None, None
    for backward in (False, True):
        row = route_rule.measure((7, 3, 8, 16), torch.bfloat16, backward, "cpu", 0.01)
        assert all(row["ms"].values()) and row["best"] in row["ms"] and "T=7 P=3" in route_rule.line(row)
    monkeypatch.setattr(launcher, "_kernel", lambda *args: (route.tokens(*args)[0] * 1.5, None))
    row = route_rule.measure((7, 3, 8, 16), torch.bfloat16, False, "cpu", 0.01)
    assert row["ms"]["kernel"] is None and row["best"] == "products" and "kernel wrong" in route_rule.line(row)


@pytest.mark.parametrize("T, P, k", [(1, 1, 1), (127, 5, 2), (128, 8, 2), (1201, 8, 2), (300, 67, 13), (300, 1000, 3)])
def test_grouped(T, P, k):
    chosen = torch.rand(T, P).topk(k).indices.sort(1).values
    order, patterns, counts = launcher.grouped(chosen, P)
    assert torch.equal(order.sort().values, torch.arange(T))
    for tile, (row, count) in enumerate(zip(patterns, counts, strict=True)):
        want = chosen[order[tile * 128 : tile * 128 + 128]].unique()
        assert torch.equal(row[:count].long(), want)
    if (T, P, k) == (1201, 8, 2):  # what it is for: 28 sets, of which a tile sees a few
        assert counts.float().mean() < 5


# ---- deliberate errors ----------------------------------------------------------------------------------------------
SWAPS = {
    "a barrier less": ("__syncthreads();  // the stage is complete", "// the stage is complete"),
    "no wait": ("ptx::copy_wait<kStages - 2>();", ""),
    "a wait too short": ("ptx::copy_wait<kStages - 2>();", "ptx::copy_wait<kStages - 1>();"),
    "filled a step too early": ("widths, filled, thread);", "widths, stage, thread);"),
    "fragment of a": ("lane % 16, k / kChunk + lane / 16", "lane % 16, k / kChunk + lane / 8 % 2"),
    "fragment of b": ("b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]", "b[j / 2][j % 2], b[j / 2][j % 2 + 2]"),
    "not transposed": ("ptx::load_matrix_transposed(", "ptx::load_matrix("),
    "swizzle": ("(c ^ row % 8)", "(c ^ row % 4)"),
    "tail of K": ("left_token[i] < 0 ? 0 : K - k;", "left_token[i] < 0 ? 0 : kChunk;"),
    "tail of N": ("o + i * kRightStep < O ? I - e : 0", "o + i * kRightStep <= O ? I - e : 0"),
    "tail of T": ("if (t < 0) continue;", ""),
    "weight of another row": ("[stage * kRows + row + 8 * i];", "[stage * kRows + row + 4 * i];"),
    "weights of another stage": ("kWeightsAt + (stage * kRows", "kWeightsAt + ((stage + 1) % kStages * kRows"),
    "sums not cleared": ("        sum = 0;\n", ""),
    "dots without a barrier": ("      __syncthreads();\n      if (warp_column == 0)", "      if (warp_column == 0)"),
    "a barrier for some": ("__syncthreads();\n      if (warp", "if (lane < 16) __syncthreads();\n      if (warp"),
    "copies too wide": ("places % 16 == 0 ? 16", "places % 2 == 0 ? 16"),
    "a warp's dots left out": (" + others[2 * kRows]", ""),
    "a split left out": ("for (int64_t split = 0; split < plan.splits", "for (int64_t split = 1; split < plan.splits"),
    "list of another tile": ("g.tile_patterns[m * g.P + at]", "g.tile_patterns[at]"),
    "order forgotten": ("g.order ? g.order[at] : ", ""),
}  # fmt: skip


def outcome(folder, kernel: str, launcher: str) -> subprocess.CompletedProcess:
    (folder / "cuda").mkdir()  # a quoted include is looked for beside the including file first
    (folder / "cuda" / KERNEL.name).write_text(kernel)
    (folder / SOURCES[0].name).write_text(launcher)
    library = compile_library(folder, "pattern_route", [folder / SOURCES[0].name, SOURCES[1]])
    return cuda_emulated.run_alone(cuda_emulated.__file__, library)


@pytest.mark.slow
def test_unchanged_kernel_passes_what_the_errors_must_not(tmp_path):
    done = outcome(tmp_path, KERNEL.read_text(), SOURCES[0].read_text())
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("error", SWAPS)
def test_deliberate_errors_show(error, tmp_path):
    texts, (old, new) = (KERNEL.read_text(), SOURCES[0].read_text()), SWAPS[error]
    found = sum(text.count(old) for text in texts)
    assert found == 1, f"{error}: what is to be replaced is there {found} times"
    done = outcome(tmp_path, *(text.replace(old, new) for text in texts))
    assert done.returncode != 0, "nothing noticed"
    print(done.stderr.strip().splitlines()[-1])
