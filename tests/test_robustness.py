"""What users do to ops and models besides calling them: transform, copy, send, fork, share, export, feed nonsense."""

import copy
import math
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from helpers import DEVICE, INTERPRETED, backends, same_bits
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import dfn
import dfn_kernels as dk
from dfn.flownetwork import FlowLayer, FlowNetwork

ROOT = Path(__file__).parents[1]
natively = pytest.mark.skipif(INTERPRETED, reason="not about Triton kernels")
on_cpu = pytest.mark.skipif(DEVICE != "cpu" or INTERPRETED, reason="about CPU kernels")


# ---- the ops, each with everything that has a gradient --------------------------------------------------------------
@dataclass(frozen=True)
class Op:
    name: str
    make: Callable[[torch.dtype], dict]
    call: Callable[..., Tensor]  # (**inputs) -> one float tensor

    def backends(self) -> list[str]:
        if self.name in ("low_rank_route", "field_sample"):
            return [] if INTERPRETED else ["reference"]
        return backends(self.name)


def rand(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(*shape, dtype=dtype, device=DEVICE) + 0.1


def joined(drift: dk.Drift) -> Tensor:
    return torch.cat([drift.positions, drift.flow, drift.energy[..., None]], -1)


def make_gather(dtype):
    positions = rand(3, 11, 2, dtype=dtype)
    return dict(positions=positions, values=rand(3, 11, 5, dtype=dtype), influence=rand(3, 11, dtype=dtype),
                indices=torch.randint(-1, 11, (3, 11, 4), device=DEVICE))  # fmt: skip


def make_attention(dtype):
    return dict(states=rand(3, 11, 7, dtype=dtype), positions=rand(3, 11, 2, dtype=dtype),
                values=rand(3, 11, 5, dtype=dtype), flow_weight=rand(2, 7, dtype=dtype))  # fmt: skip


OPS = [
    Op("flow_drift", lambda t: dict(states=rand(3, 11, 7, dtype=t), positions=rand(3, 11, 2, dtype=t),
                                    weight=rand(2, 7, dtype=t), bias=rand(2, dtype=t)),
       lambda **x: joined(dk.flow_drift(**x))),
    Op("flow_norm", lambda t: dict(states=rand(3, 11, 7, dtype=t), energy=rand(3, 11, dtype=t)),
       lambda **x: dk.flow_norm(**x, mode="causal")),
    Op("knn", lambda t: dict(positions=rand(3, 11, 2, dtype=t)), lambda **x: dk.knn(**x, k=4).sq_dists),
    Op("gaussian_gather", make_gather, lambda **x: dk.gaussian_gather(**x, sigma=0.5, normalize=True)),
    Op("flow_attention", make_attention, lambda **x: dk.flow_attention(**x, sigma=0.5, k=4, causal=True)[0]),
    Op("pattern_route", lambda t: dict(x=rand(3, 11, 7, dtype=t), weights=rand(3, 11, 4, dtype=t),
                                       patterns=rand(4, 5, 7, dtype=t), bias=rand(5, dtype=t)),
       lambda **x: dk.pattern_route(**x, top_k=3)),
    Op("low_rank_route", lambda t: dict(x=rand(3, 11, 7, dtype=t), weights=rand(3, 11, 4, dtype=t),
                                        up=rand(4, 5, 2, dtype=t), down=rand(4, 2, 7, dtype=t)),
       lambda **x: dk.low_rank_route(**x)),
]  # fmt: skip
PARAMETERS = ("weight", "bias", "flow_weight", "patterns", "up", "down")  # what a batch shares
CASES = [pytest.param(op, b, id=f"{op.name}-{b}") for op in OPS for b in op.backends()]
# A wrong result of today's torch.library, not ours alone: a custom op has no forward-mode rule and no error either.
NO_FORWARD_MODE = "custom ops give a zero tangent in forward mode; through their Function they would raise"


def run(op: Op, backend: str, inputs: dict) -> list[Tensor]:
    """Output, and the gradient of each float input."""
    mine = {n: x.detach().clone().requires_grad_(x.is_floating_point()) for n, x in inputs.items()}
    with dk.use_backend(backend):
        out = op.call(**mine)
    wanted = [x for x in mine.values() if x.requires_grad]
    weight = torch.linspace(0.5, 1.5, out.numel(), dtype=out.dtype, device=out.device).view(out.shape)
    return [out.detach(), *torch.autograd.grad(out, wanted, weight)]


def assert_same(left: list[Tensor], right: list[Tensor]) -> None:
    for number, (a, b) in enumerate(zip(left, right, strict=True)):
        assert same_bits(a, b), f"result {number} differs"


# ---- transforms ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("op, backend", CASES)
def test_vmap(op, backend):
    inputs = op.make(torch.float32)
    dims = {n: None if n in PARAMETERS else 0 for n in inputs}
    with dk.use_backend(backend):
        want = torch.stack([op.call(**{n: x if dims[n] is None else x[i] for n, x in inputs.items()})
                            for i in range(3)])  # fmt: skip
        got = torch.vmap(lambda x: op.call(**x), in_dims=(dims,))(inputs)
        ensemble = torch.vmap(lambda x: op.call(**x), in_dims=({n: 0 for n in inputs},))(
            {n: x.expand(2, *x.shape) for n, x in inputs.items()}
        )
        whole = op.call(**inputs)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(ensemble, whole.expand(2, *whole.shape))


def test_vmap_of_field_sample():
    with pytest.raises(RuntimeError, match="vmap"):
        torch.vmap(lambda x: dk.field_sample(x, 5)[0])(torch.rand(2, 1, 30))


@natively  # minutes in the interpreter
@pytest.mark.parametrize("op, backend", CASES)
def test_second_derivative_is_right_or_raises(op, backend):
    inputs = op.make(torch.float64)

    def second(backend):
        mine = {n: x.clone().requires_grad_(x.is_floating_point()) for n, x in inputs.items()}
        wanted = [x for x in mine.values() if x.requires_grad]
        with dk.use_backend(backend):
            grads = torch.autograd.grad(op.call(**mine).square().sum(), wanted, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), wanted, allow_unused=True)

    want = second("reference")
    assert any(x is not None and x.abs().sum() > 0 for x in want)
    try:
        got = second(backend)
    except RuntimeError as error:
        assert "backward" in str(error)
        return
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


@natively
@pytest.mark.parametrize("op, backend", CASES)
def test_func_grad_is_right_or_raises(op, backend):
    inputs = op.make(torch.float64)
    first = next(iter(inputs))

    def loss(x):
        return op.call(**{**inputs, first: x}).square().sum()

    with dk.use_backend("reference"):
        x = inputs[first].clone().requires_grad_()
        (want,) = torch.autograd.grad(loss(x), x)
    with dk.use_backend(backend):
        try:
            got = torch.func.grad(loss)(inputs[first])
        except RuntimeError:
            return
    torch.testing.assert_close(got, want)


@natively
@pytest.mark.parametrize("op, backend", CASES)
def test_forward_mode_is_right_or_raises(op, backend, request):
    if op.name != "low_rank_route":
        request.applymarker(pytest.mark.xfail(strict=True, reason=NO_FORWARD_MODE))
    inputs = op.make(torch.float64)
    first = next(iter(inputs))
    tangent = torch.randn_like(inputs[first])

    def call(x):
        with dk.use_backend(backend):
            return op.call(**{**inputs, first: x})

    with torch.no_grad():
        eps = 1e-6
        want = (call(inputs[first] + eps * tangent) - call(inputs[first] - eps * tangent)) / (2 * eps)
    try:
        _, got = torch.func.jvp(call, (inputs[first],), (tangent,))
    except (RuntimeError, NotImplementedError):
        return
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)


class Holder(nn.Module):
    """An op as a module: its parameters are parameters, the rest is input."""

    def __init__(self, op: Op, inputs: dict):
        super().__init__()
        self.call = op.call
        self.own = nn.ParameterDict({n: nn.Parameter(x.clone()) for n, x in inputs.items() if n in PARAMETERS})

    def forward(self, x: dict[str, Tensor]) -> Tensor:
        return self.call(**x, **self.own).tanh()


def held(op: Op) -> tuple[Holder, dict]:
    inputs = op.make(torch.float32)
    return Holder(op, inputs), {n: x for n, x in inputs.items() if n not in PARAMETERS}


@pytest.mark.parametrize("op, backend", [c for c in CASES if "triton" not in c.id or DEVICE != "cpu"])
def test_export(op, backend):
    module, x = held(op)
    with dk.use_backend(backend):
        program = torch.export.export(module, (x,))
        want = module(x)
    assert same_bits(program.module()(x), want)
    if backend != "reference":
        assert any("dfn." in str(node.target) for node in program.graph.nodes)


@pytest.mark.parametrize("op, backend", CASES)
def test_checkpointing(op, backend):
    module, x = held(op)
    x = {n: t.requires_grad_() if t.is_floating_point() else t for n, t in x.items()}
    wanted = [*module.parameters(), *(t for t in x.values() if t.requires_grad)]
    results = []
    with dk.use_backend(backend):
        for wrap in (lambda x: module(x), lambda x: checkpoint(module, x, use_reentrant=False)):
            out = wrap(x)
            results.append([out.detach(), *torch.autograd.grad(out.square().sum(), wanted)])
    assert_same(*results)


# ---- models -------------------------------------------------------------------------------------------------------
def models() -> dict[str, tuple[nn.Module, tuple]]:
    states, positions = torch.randn(2, 19, 12), torch.randn(2, 19, 3)
    ids = torch.randint(31, (2, 19))
    return {
        "DFNLayer": (dfn.DFNLayer(12, 4, pos_dim=3), (states, positions)),
        "DFNBlock": (dfn.DFNBlock(12, 3, k=4, causal=True), (states, torch.randn(2, 3, 19, 3))),
        "FlowMixer": (dfn.FlowMixer(12, 2, 4), (states,)),
        "DFNLanguageModel": (dfn.DFNLanguageModel(31, 12, 2, 2, k=4), (ids,)),
        "FlowLayer": (FlowLayer(12, 7, 3), (states,)),
        "FlowNetwork": (FlowNetwork(31, 12, 2, 3, max_seq_len=32, mixer="flow_attention"), (ids,)),
    }


MODELS = list(models())


def result(model: nn.Module, inputs: tuple) -> Tensor:
    out = model(*inputs)
    return out[0] if isinstance(out, tuple) else out


@natively
@pytest.mark.parametrize("name", MODELS)
def test_copies_and_pickles(name):
    model, inputs = models()[name]
    want = result(model, inputs)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert same_bits(result(other, inputs), want)
        assert repr(other) == repr(model)
        with torch.no_grad():
            for p in other.parameters():
                p.add_(1.0)
        assert same_bits(result(model, inputs), want)  # nothing is shared


def test_results_pickle():
    found = dk.knn(torch.rand(9, 2), 3)
    again = pickle.loads(pickle.dumps(found))
    assert type(again) is dk.Neighbors and torch.equal(again.indices, found.indices)
    drift = dk.flow_drift(torch.rand(9, 4), torch.rand(9, 2), torch.rand(2, 4))
    assert type(copy.deepcopy(drift)) is dk.Drift


@natively
@pytest.mark.parametrize("name", MODELS)
def test_functional_call(name):
    model, inputs = models()[name]
    other = {n: p * 0.5 for n, p in model.named_parameters()}
    called = result(lambda *x: torch.func.functional_call(model, other, x), inputs)
    loaded = copy.deepcopy(model)
    loaded.load_state_dict({**model.state_dict(), **{n: p.detach() for n, p in other.items()}})
    assert same_bits(called, result(loaded, inputs))
    assert not same_bits(called, result(model, inputs))
    called.square().sum().backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


@natively
@pytest.mark.parametrize("name", MODELS)
def test_autocast(name):
    model, inputs = models()[name]
    want = result(model, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        got = result(model, inputs)
    assert got.isfinite().all() and not same_bits(got.float(), want)
    assert (got.float() - want).norm() < 0.3 * want.norm()
    got.float().square().mean().backward()
    for key, p in model.named_parameters():
        assert p.dtype == torch.float32 and (p.grad is None or p.grad.isfinite().all()), key


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
        torch.ops.dfn.pattern_route_backward(
            torch.rand(9, 5), x, weights, patterns, chosen, True, True, True, "native"
        )


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
    inputs = dict(positions=rand(B, H, N, D, dtype=torch.float64), values=rand(B, H, N, c, dtype=torch.float64),
                  query_positions=rand(B, H, M, D, dtype=torch.float64), sigma=rand(H, dtype=torch.float64),
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


SHAPES = {"gaussian_gather": gather_case, "flow_norm": norm_case, "flow_drift": drift_case, "pattern_route": route_case}


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


@natively
@pytest.mark.slow
def test_norm_and_drift_of_more_than_2_31_states():
    needs_memory(14)
    d = 2**15
    N = 2**31 // d + 3
    states = torch.full((N, d), 2.0, dtype=torch.float16, device=DEVICE)
    states[-1] = 6.0
    energy = torch.full((N,), 4.0, device=DEVICE)
    out = dk.flow_norm(states, energy, eps=0.0, mode="entity")
    assert out[-1].eq(3.0).all() and out[:-1:97].eq(1.0).all() and math.prod(out.shape) > 2**31
    del out
    drift = dk.flow_drift(states, torch.zeros(N, 1, device=DEVICE), torch.full((1, d), 2.0**-15, device=DEVICE))
    assert drift.flow[-2:].flatten().tolist() == pytest.approx([2.0, 6.0], rel=1e-4)
