"""How a case is measured: time, peak memory, error. A result that is not right gets no time."""

import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from math import prod

import torch
from torch import Tensor, nn

import dfn_kernels as dk
from dfn_kernels._backends import NAMES, choose, missing

from .cases import Case
from .names import readable
from .timing import peak_growth_mib, time_rounds

OURS = ("default", "native", "triton", "reference")  # everybody else is a peer; default: what each part runs best on
MOST_NUMBERS = 2**30  # that a reference may hold: float64 takes 8 GiB for them, gradients some times that


def too_large_for_reference(case: Case, sizes: dict[str, int]) -> bool:
    """Whether it holds an [N, N] beyond 16k, or an [N, k, c] beyond MOST_NUMBERS."""
    if case.op in ("knn", "flow_attention"):
        return sizes["N"] > 2**14
    return case.op == "gaussian_gather" and prod(sizes[letter] for letter in "BHNkc") > MOST_NUMBERS


@dataclass
class Row:
    case: str
    op: str
    who: str  # one of OURS, or a peer's name
    mode: str  # "forward" or "training" (forward and backward)
    dtype: str
    ms: float | None = None  # median; None where the result was wrong or the run failed
    ms_low: float | None = None  # 10 % quantile
    ms_high: float | None = None  # 90 % quantile
    goal: float | None = None  # milliseconds, where the case has one for this machine
    # of ours: time of the fastest peer over this one, round by round: the median and both quartiles
    ratio: float | None = None
    ratio_low: float | None = None
    ratio_high: float | None = None
    mib: float | None = None  # growth of peak memory
    error: float | None = None  # relative Frobenius error against float64; share of wrong entries for an exact op
    note: str = ""
    gb_per_s: float | None = None
    tflop_per_s: float | None = None
    words: str = ""  # the case, as tables call it

    asdict = asdict

    def __post_init__(self):
        self.words = readable(self.case)


# ---- right or wrong -------------------------------------------------------------------------------------------------
def error_of(case: Case, result: Tensor, exact: Tensor) -> float:
    if case.exact:
        return (result != exact).double().mean().item()
    exact = exact.double()
    return ((result.double() - exact).norm() / exact.norm()).item()


def allowed_error(case: Case, dtype: torch.dtype) -> float:
    """A generous bound that only a wrong result misses: what rounding can do is tested elsewhere."""
    if case.exact:
        return 1e-4 * max(1, case.sizes["D"] / 8)  # peers may break ties, and round distances, in their own way
    return {torch.float64: 1e-12, torch.float32: 1e-4}.get(dtype, 3e-2)


def exact_result(case: Case, inputs: dict, device: str, sizes: dict[str, int]) -> Tensor | None:
    """The reference in float64, or what takes its place where it would not fit.

    For an exact op our own answer, which the tests hold against brute force to the bit.
    """
    if case.exact:
        return case.ours(**inputs)
    if "reference" in case.other_work:
        return None
    wide = () if case.layer else case.grads  # a layer keeps its parameters' dtype
    fastest = "reference"
    if case.op == "flow_attention" and not case.layer:
        # Its reference has a [N, N] of its own; and positions stay as they are: a search in float64 would meet other
        # neighbours wherever two distances round to the same float32.
        wide, fastest = ("values",), "native" if device == "cpu" else "triton"
    elif too_large_for_reference(case, sizes):
        fastest = choose(case.op, device)
    doubles = {n: x.double() if n in wide else x for n, x in inputs.items()}
    with dk.use_backend(fastest):
        return case.ours(**doubles)


def goal_of(case: Case, mode: str, dtype: str, device: str) -> float | None:
    return case.goals.get(f"{mode} {dtype}") if device == "cuda" else None


# ---- a case ---------------------------------------------------------------------------------------------------------
def contenders(case: Case, device: str) -> dict[str, Callable]:
    """Everybody who takes part: our backends that run here, then the peers."""
    ours = {}
    for backend in NAMES:
        if backend == "triton" and device == "cpu":
            continue  # the interpreter is no contender
        if missing(case.op, backend, device) is None:
            ours[backend] = _on_backend(case.ours, backend)
    if case.op == "flow_attention" and device == "cuda":
        ours["default"] = case.ours  # its parts do not all run best on one backend
    others = {**case.peers, **(case.gpu_peers if device == "cuda" else {})}
    again = [name for name in case.compiled if name in case.peers]
    compiled = {f"compiled {name}": torch.compile(case.peers[name], dynamic=False) for name in again}
    return {**ours, **others, **compiled}


def _on_backend(op: Callable, backend: str) -> Callable:
    def run(**inputs):
        with dk.use_backend(backend):
            return op(**inputs)

    return run


def _without_grad(op: Callable, inputs: dict) -> Tensor:
    with torch.no_grad():
        return op(**inputs)


def training_step(case: Case, op: Callable, inputs: dict, grad: Tensor) -> Callable[[], object]:
    leaves = {n: x.detach().requires_grad_() if n in case.grads else x for n, x in inputs.items()}
    modules = (x for x in inputs.values() if isinstance(x, nn.Module))
    wanted = [leaves[name] for name in case.grads] + [p for module in modules for p in module.parameters()]
    return lambda: torch.autograd.grad(op(**leaves), wanted, grad, allow_unused=True)


def run_case(
    case: Case,
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    small: bool = False,
    seconds: float = 1.0,
    skip: tuple[str, ...] = (),
) -> list[Row]:
    """Measures every contender, forward and (where there are gradients) training."""
    torch.manual_seed(0)
    torch._dynamo.reset()  # every case compiles anew, for its own sizes
    sizes = case.small if small else case.sizes
    inputs = case.make(**sizes, device=device, dtype=dtype)
    exact = exact_result(case, inputs, device, sizes)
    rows: dict[tuple[str, str], Row] = {}  # by contender and mode
    runs: dict[str, dict[str, Callable]] = {"forward": {}, "training": {}}
    for who, op in contenders(case, device).items():
        if who in skip or ("compiled" in skip and who.startswith("compiled")):
            continue
        if who == "reference" and too_large_for_reference(case, sizes):
            continue
        row = Row(case.name, case.op, who, "forward", str(dtype).removeprefix("torch."))
        rows[who, "forward"] = row
        try:
            with torch.no_grad():
                result = op(**inputs)
            if who in case.other_work:
                row.note = "not the same work"
            elif exact is not None:
                row.error = error_of(case, result, exact)
                if not row.error <= allowed_error(case, dtype):
                    row.note = "wrong result"
                    continue
            run = partial(_without_grad, op, inputs)
            row.mib = peak_growth_mib(run, device)
            runs["forward"][who] = run
            if case.grads and who not in case.forward_only:
                row = rows[who, "training"] = replace(row, mode="training", error=None)
                run = training_step(case, op, inputs, torch.randn_like(result))
                run()
                row.mib = peak_growth_mib(run, device)
                runs["training"][who] = run
        except (RuntimeError, ImportError) as error:  # out of memory, a peer that is not installed
            row.note = f"{type(error).__name__}: {str(error).splitlines()[0][:80]}"
    for mode, entrants in runs.items():
        times = time_rounds(entrants, device, seconds)
        for who, taken in times.items():
            fill(rows[who, mode], taken)
        compare({who: rows[who, mode] for who in entrants}, times)
    for (who, mode), row in rows.items():
        row.goal = goal_of(case, mode, row.dtype, device) if who in OURS else None
    if case.work:
        for (_, mode), row in rows.items():
            if mode == "forward" and row.ms:
                moved, operations = case.work(**sizes, itemsize=dtype.itemsize)
                row.gb_per_s, row.tflop_per_s = moved / row.ms / 1e6, operations / row.ms / 1e9
    return list(rows.values())


def fill(row: Row, times: list[float]) -> None:
    times = sorted(times)
    row.ms = statistics.median(times)
    row.ms_low, row.ms_high = times[len(times) // 10], times[-1 - len(times) // 10]


def compare(rows: dict[str, Row], times: dict[str, list[float]]) -> None:
    """Our rows against the peer of the least median time."""
    peer = min((who for who in rows if who not in OURS), key=lambda who: rows[who].ms, default=None)
    if peer is None:
        return
    for who in (who for who in rows if who in OURS):
        ratios = sorted(theirs / ours for ours, theirs in zip(times[who], times[peer], strict=False))
        row, last = rows[who], len(ratios) - 1
        row.ratio = statistics.median(ratios)
        row.ratio_low, row.ratio_high = ratios[last // 4], ratios[last - last // 4]
