"""Threads, forks, nonsense, any shape, more than 2^31 elements."""

import math
import os
import subprocess
import sys
import threading
from inspect import signature
from pathlib import Path

import pytest
import torch
from every_op import OPS, Op, assert_same, joined, rand, run
from helpers import DEVICE, INTERPRETED, backends, same_bits
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import dfn_kernels as dk

ROOT = Path(__file__).parents[2]
natively = pytest.mark.skipif(INTERPRETED, reason="not about Triton kernels")
on_cpu = pytest.mark.skipif(DEVICE != "cpu" or INTERPRETED, reason="about CPU kernels")


# ---- threads and processes ------------------------------------------------------------------------------------------
@natively
def test_python_threads_at_once():
    work = [(op, backend, op.make(torch.float32)) for op in OPS for backend in op.backends()[:1]]
    want = [run(op, op.backends()[0], inputs) for op, _, inputs in work]
    results: dict[int, list] = {}

    # use_backend is process-wide, so a thread takes the default, which is the first backend on a CPU
    def plain(op, inputs):
        mine = {n: x.detach().clone().requires_grad_(x.is_floating_point()) for n, x in inputs.items()}
        out = op.call(**mine)
        weight = torch.linspace(0.5, 1.5, out.numel(), dtype=out.dtype, device=out.device).view(out.shape)
        return [out.detach(), *torch.autograd.grad(out, [x for x in mine.values() if x.requires_grad], weight)]

    def worker(number):
        results[number] = [[plain(op, inputs) for op, _, inputs in work] for _ in range(5)]

    threads = [threading.Thread(target=worker, args=(i,)) for i in range(2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(120)
        assert not t.is_alive(), "a thread hangs"
    if DEVICE == "cpu":
        for rounds in results.values():
            for got in rounds:
                for mine, theirs in zip(got, want, strict=True):
                    assert_same(mine, theirs)
    assert len(results) == 2


FORK = """
import os, signal, torch, dfn_kernels as dk
torch.set_num_threads(2)

def work():
    torch.manual_seed(0)
    p, v = torch.rand(20000, 3), torch.rand(20000, 32, requires_grad=True)
    y = dk.gaussian_gather(p, v, dk.knn(p, 8).indices, 0.1)
    y.sum().backward()
    s = dk.flow_norm(y, dk.flow_drift(y, p, torch.rand(3, 32)).energy)
    z = dk.pattern_route(s, torch.rand(20000, 3), torch.rand(3, 16, 32))
    return [x.double().sum().item() for x in (y, v.grad, z)]

want = work()
child = os.fork()
if child == 0:
    signal.alarm(60)  # ends the child if it hangs
    torch.set_num_threads(1)  # as in PyTorch's data loaders: OpenMP's threads do not survive a fork, ours or not
    os._exit(0 if work() == want else 1)
assert os.waitpid(child, 0)[1] == 0, "the child gave other results, or hung"
assert work() == want
"""


@on_cpu
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_fork():
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", FORK], cwd=ROOT, capture_output=True, text=True,
                          timeout=150)  # fmt: skip
    assert done.returncode == 0, done.stderr


# ---- nonsense -----------------------------------------------------------------------------------------------------
WILD = (2**40, -(2**62), 2**62, -2, 41, 2**31, -(2**31) - 1)


@on_cpu
@pytest.mark.parametrize("wild", WILD)
def test_wild_neighbor_hints(wild):
    """`warm` only bounds the search: whatever is in it, nothing outside the points is read."""
    points = torch.rand(2, 40, 3)
    states, weight = torch.rand(2, 40, 7), torch.rand(3, 7)
    index = dk.KNNIndex(points)
    want = index.query(4)
    hints = want.indices.clone()
    hints[0] = wild
    hints[1, 3, 2] = wild
    warm = dk.Neighbors(hints, want.sq_dists)
    assert torch.equal(index.query(4, warm=warm).indices, want.indices)
    plain = dk.flow_attention(states, points, weight, states, 0.5, 4)[0]
    assert same_bits(dk.flow_attention(states, points, weight, states, 0.5, 4, warm=warm)[0], plain)


@on_cpu
@pytest.mark.parametrize("wild", WILD)
def test_wild_lengths(wild):
    points, queries, lengths = torch.rand(2, 40, 3), torch.rand(2, 7, 3), torch.tensor([40, wild])
    for argument in (dict(lengths=lengths), dict(queries=queries, lengths=lengths)):
        with pytest.raises(ValueError, match="lengths must be between 0 and 40"):
            dk.knn(points, 4, **argument)
        found = dk.knn(points, 4, **argument, check=False)
        assert found.indices.max() < 40 and found.indices.min() >= -1
        assert torch.equal(found.indices[0], dk.knn(points[0], 4, queries=argument.get("queries", points)[0]).indices)
    found = dk.knn(points, 4, queries=queries, query_lengths=lengths, check=False)
    assert found.indices.max() < 40 and found.indices.min() >= -1
    states, energy = torch.rand(2, 40, 7, requires_grad=True), torch.rand(2, 40, requires_grad=True)
    for mode in ("mean", "causal", "entity"):
        out = dk.flow_norm(states, energy, mode=mode, lengths=lengths)
        assert same_bits(out[0], dk.flow_norm(states[:1], energy[:1], mode=mode)[0])
        out.sum().backward()
    with pytest.raises(ValueError, match="lengths must be between 0 and 40"):
        dk.flow_attention(states, points, torch.rand(3, 7), states, 0.5, 4, lengths=lengths)


@on_cpu
@pytest.mark.skipif("native" not in backends("gaussian_gather"), reason="the native library is not built")
@pytest.mark.parametrize("wild", WILD)
def test_wild_indices_below_the_checks(wild):
    """The registered ops, which anybody can call: an error, or a result that leaves the wild index out."""
    indices = torch.randint(40, (2, 1, 40, 4))
    indices[1, 0, 3, 2] = wild
    points, values, one = torch.rand(2, 1, 40, 3), torch.rand(2, 1, 40, 5), torch.ones(1)
    arguments = (points, points, values, indices, one, None, True)
    with pytest.raises((IndexError, RuntimeError)):
        torch.ops.dfn.gaussian_gather(*arguments, "native")
    try:
        torch.ops.dfn.gaussian_gather_backward(torch.rand_like(values), *arguments, 31, "native")
    except (IndexError, RuntimeError):
        pass
    chosen = torch.tensor([[0, 1]] * 9)
    chosen[4, 1] = wild
    x, weights, patterns = torch.rand(9, 6), torch.rand(9, 3), torch.rand(3, 5, 6)
    with pytest.raises((IndexError, RuntimeError)):
        torch.ops.dfn.pattern_route(x, weights, patterns, None, chosen, False, "native")
    with pytest.raises((IndexError, RuntimeError)):
        torch.ops.dfn.pattern_route_backward(torch.rand(9, 5), x, weights, patterns, chosen, True, True, True, "native")


@natively
@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_wrong_types(op):
    """A float tensor of another kind, and flags that are no bool, are refused by name before any arithmetic."""
    inputs = op.make(torch.float32)
    for name, x in inputs.items():
        for wrong in (None, "x", 1.5, x.cpu().numpy(), x.to_sparse(), x.to(torch.complex64)):
            if wrong is None and name in ("bias", "influence"):
                continue  # may be left out
            with pytest.raises(TypeError, match=name):
                op.call(**{**inputs, name: wrong})
    function = getattr(dk, op.name)
    for flag in {"causal", "include_self", "normalize", "check", "return_share"} & set(signature(function).parameters):
        rest = {"k": 3} if op.name in ("knn", "flow_attention") else {}
        rest |= {"sigma": 0.5} if op.name in ("gaussian_gather", "flow_attention") else {}
        with pytest.raises(TypeError, match=f"{flag} must be True or False, got Tensor"):
            function(**inputs, **rest, **{flag: torch.ones(3)})


# ---- any shape ----------------------------------------------------------------------------------------------------
def shapes(examples: int):
    return settings(max_examples=examples, deadline=None, derandomize=True, database=None,
                    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])  # fmt: skip


size = st.integers(0, 9)
some = st.integers(1, 9)
lane = st.sampled_from([1, 2, 3, 4, 7, 8, 15, 16, 17, 31, 33, 64, 65])  # around the widths of vector registers


@st.composite
def gather_case(draw):
    B, H, N, D, c, k = draw(size), draw(some), draw(some), draw(some), draw(lane), draw(size)
    M = draw(size)
    # Where one normalised weight is 1, sigma's gradient is rounding noise times sigma^-3: so sigma is not too small.
    inputs = dict(positions=rand(B, H, N, D, dtype=torch.float64), values=rand(B, H, N, c, dtype=torch.float64),
                  query_positions=rand(B, H, M, D, dtype=torch.float64), sigma=rand(H, dtype=torch.float64) + 0.5,
                  indices=torch.randint(-1, N, (B, H, M, k), device=DEVICE))  # fmt: skip
    if draw(st.booleans()):
        inputs["influence"] = rand(B, N, dtype=torch.float64)
    normalize = draw(st.booleans())
    return Op("gaussian_gather", None, lambda **x: dk.gaussian_gather(**x, normalize=normalize)), inputs


@st.composite
def norm_case(draw):
    B, N, d = draw(size), draw(size), draw(lane)
    mode = draw(st.sampled_from(["mean", "causal", "entity"]))
    lengths = torch.randint(0, N + 1, (B,), device=DEVICE) if draw(st.booleans()) else None
    inputs = dict(states=rand(B, N, d, dtype=torch.float64), energy=rand(B, N, dtype=torch.float64))
    return Op("flow_norm", None, lambda **x: dk.flow_norm(**x, mode=mode, lengths=lengths)), inputs


@st.composite
def convolution_case(draw):
    B, N, d, W = draw(size), draw(size), draw(lane), draw(some)
    inputs = dict(x=rand(B, N, d, dtype=torch.float64), weight=rand(W, d, dtype=torch.float64))
    if draw(st.booleans()):
        inputs["ptr"] = torch.tensor([0, *sorted(draw(st.lists(st.integers(0, N), max_size=4))), N], device=DEVICE)
    return Op("short_convolution", None, lambda **x: dk.short_convolution(**x)), inputs


@st.composite
def drift_case(draw):
    B, H, N, D, d = draw(size), draw(some), draw(size), draw(some), draw(lane)
    shared = draw(st.booleans())
    inputs = dict(states=rand(B, N, d, dtype=torch.float64), weight=rand(H, D, d, dtype=torch.float64),
                  positions=rand(*((B, N, D) if shared else (B, H, N, D)), dtype=torch.float64),
                  alpha=rand(H, dtype=torch.float64))  # fmt: skip
    if draw(st.booleans()):
        inputs["bias"] = rand(H, D, dtype=torch.float64)
    return Op("flow_drift", None, lambda **x: joined(dk.flow_drift(**x))), inputs


@st.composite
def route_case(draw):
    T, P, I, O = draw(st.integers(0, 70)), draw(some), draw(lane), draw(lane)
    inputs = dict(x=rand(T, I, dtype=torch.float64), weights=rand(T, P, dtype=torch.float64),
                  patterns=rand(P, O, I, dtype=torch.float64))  # fmt: skip
    if draw(st.booleans()):
        inputs["bias"] = rand(O, dtype=torch.float64)
    top_k = draw(st.one_of(st.none(), st.integers(1, P)))
    return Op("pattern_route", None, lambda **x: dk.pattern_route(**x, top_k=top_k)), inputs


def check_shape(case: tuple[Op, dict]) -> None:
    op, inputs = case
    want = run(op, "reference", inputs)
    for backend in op.backends():
        for a, b in zip(run(op, backend, inputs), want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


SHAPES = {"gaussian_gather": gather_case, "flow_norm": norm_case, "short_convolution": convolution_case,
          "flow_drift": drift_case, "pattern_route": route_case}  # fmt: skip


@natively
@pytest.mark.parametrize("name", SHAPES)
def test_shapes(name):
    shapes(25)(given(SHAPES[name]())(check_shape))()


@natively
@pytest.mark.slow
@pytest.mark.parametrize("name", SHAPES)
def test_many_shapes(name):
    shapes(400)(given(SHAPES[name]())(check_shape))()


# ---- more than 2^31 elements --------------------------------------------------------------------------------------
def needs_memory(gib: float) -> None:
    if DEVICE == "cpu":
        with open("/proc/meminfo") as file:
            free = next(int(line.split()[1]) for line in file if line.startswith("MemAvailable")) / 2**20
    else:
        free = torch.cuda.mem_get_info()[0] / 2**30
    if free < gib:
        pytest.skip(f"needs {gib} GiB of memory, {free:.1f} are free")


@natively
@pytest.mark.slow
def test_gather_from_more_than_2_31_values():
    needs_memory(9)
    c = 512
    N = 2**31 // c + 3
    values = torch.zeros(N, c, dtype=torch.float16, device=DEVICE)
    values[-1], values[-2] = 3.0, 5.0
    positions = torch.zeros(N, 1, device=DEVICE)
    indices = torch.tensor([[N - 1, N - 2], [0, -1], [N - 1, 0]], device=DEVICE)
    out = dk.gaussian_gather(positions, values, indices, 1.0, query_positions=positions[:3])
    assert [row.unique().tolist() for row in out] == [[8.0], [0.0], [3.0]]


def more_than_2_31() -> torch.Tensor:
    """As many values, float16 ``[N, d]``: 2, and 6 in the last row."""
    d = 2**15
    x = torch.full((2**31 // d + 3, d), 2.0, dtype=torch.float16, device=DEVICE)
    x[-1] = 6.0
    return x


@natively
@pytest.mark.slow
def test_norm_and_drift_of_more_than_2_31_states():
    needs_memory(14)
    states = more_than_2_31()
    N, d = states.shape
    energy = torch.full((N,), 4.0, device=DEVICE)
    out = dk.flow_norm(states, energy, eps=0.0, mode="entity")
    assert out[-1].eq(3.0).all() and out[:-1:97].eq(1.0).all() and math.prod(out.shape) > 2**31
    del out
    drift = dk.flow_drift(states, torch.zeros(N, 1, device=DEVICE), torch.full((1, d), 2.0**-15, device=DEVICE))
    assert drift.flow[-2:].flatten().tolist() == pytest.approx([2.0, 6.0], rel=1e-4)


@natively
@pytest.mark.slow
def test_convolution_of_more_than_2_31_values():
    needs_memory(18)
    x = more_than_2_31()
    N, d = x.shape
    weight = torch.tensor([[1.0], [0.5]], device=DEVICE).expand(2, d).contiguous().requires_grad_()
    out = dk.short_convolution(x, weight)
    assert out[-1].eq(7.0).all() and out[1:-1:97].eq(3.0).all() and math.prod(out.shape) > 2**31
    grad = torch.zeros(N, d, dtype=torch.float16, device=DEVICE)
    grad[-1] = 1.0
    (found,) = torch.autograd.grad(out, weight, grad)
    assert found[0].eq(6.0).all() and found[1].eq(2.0).all()
