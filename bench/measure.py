"""How a case is measured: time, peak memory, error. A result that is not right gets no time."""

import ctypes
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

import dfn_kernels as dk
from dfn_kernels._backends import NAMES, missing

from .cases import Case


@dataclass
class Row:
    case: str
    op: str
    who: str  # "native", "triton", "reference" or a peer's name
    mode: str  # "forward" or "training" (forward and backward)
    dtype: str
    ms: float | None = None  # median; None where the result was wrong or the run failed
    ms_low: float | None = None  # 10 % quantile
    ms_high: float | None = None  # 90 % quantile
    mib: float | None = None  # growth of peak memory
    error: float | None = None  # relative Frobenius error against float64; share of wrong entries for an exact op
    note: str = ""
    gb_per_s: float | None = None
    tflop_per_s: float | None = None

    asdict = asdict


# ---- time -----------------------------------------------------------------------------------------------------------
def time_ms(run: Callable[[], object], device: str, seconds: float) -> list[float]:
    """Times of single runs after warm-up, for about `seconds`; on a GPU with an L2 cache that was just overwritten."""
    run()  # compiles what compiles
    if device != "cpu":
        return _cuda_times(run, seconds)
    times: list[float] = []
    start = time.perf_counter()
    while (
        not times or (len(times) < 3 and times[0] < 1e4) or (time.perf_counter() - start < seconds and len(times) < 200)
    ):
        before = time.perf_counter()
        run()
        times.append((time.perf_counter() - before) * 1e3)
    return times


def _cuda_times(run: Callable[[], object], seconds: float) -> list[float]:
    flush = torch.empty(2**28, dtype=torch.uint8, device="cuda")
    times: list[float] = []
    start = time.perf_counter()
    while len(times) < 10 or (time.perf_counter() - start < seconds and len(times) < 200):
        flush.zero_()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        run()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return times


def ceilings(device: str, small: bool = False) -> dict[str, float]:
    """What this machine reaches at best: GB/s of a copy (read and written bytes), TFLOP/s of products by dtype."""
    # a copy beyond any cache, a product large enough to be bound by arithmetic
    words, n = (2**20, 256) if small else (2**26, 2048) if device == "cpu" else (2**29, 8192)
    source = torch.ones(words, device=device)
    target = torch.empty_like(source)
    found = {"copy GB/s": 8 * words / min(time_ms(lambda: target.copy_(source), device, 0.3)) / 1e6}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = torch.randn(2, n, n, device=device).to(dtype)
        found[f"{str(dtype)[6:]} TFLOP/s"] = 2 * n**3 / min(time_ms(lambda a=a, b=b: a @ b, device, 0.3)) / 1e9
    return {name: round(value, 3) for name, value in found.items()}


# ---- memory ---------------------------------------------------------------------------------------------------------
def peak_growth_mib(run: Callable[[], object], device: str) -> float | None:
    """By how much the peak exceeds what was held before. On a CPU the resident set, which Linux lets us reset."""
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    try:
        ctypes.CDLL(None).malloc_trim(0)
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except (OSError, AttributeError):
        return None
    before = _status_kib("VmRSS")
    run()
    return (_status_kib("VmHWM") - before) / 1024


def _status_kib(field: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(field))


# ---- right or wrong -------------------------------------------------------------------------------------------------
def error_of(case: Case, result: Tensor, exact: Tensor) -> float:
    if case.exact:
        return (result != exact).double().mean().item()
    exact = exact.double()
    return ((result.double() - exact).norm() / exact.norm()).item()


def allowed_error(case: Case, dtype: torch.dtype) -> float:
    """A generous bound that only a wrong result misses: what rounding can do is tested elsewhere."""
    if case.exact:
        return 1e-4  # peers may break ties, and round distances, in their own way
    return {torch.float64: 1e-12, torch.float32: 1e-4}.get(dtype, 3e-2)


def exact_result(case: Case, inputs: dict, device: str) -> Tensor | None:
    """The reference in float64; for an exact op our own answer, which the tests hold against brute force to the bit."""
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
    doubles = {n: x.double() if n in wide else x for n, x in inputs.items()}
    with dk.use_backend(fastest):
        return case.ours(**doubles)


# ---- a case ---------------------------------------------------------------------------------------------------------
def contenders(case: Case, device: str) -> dict[str, Callable]:
    """Everybody who takes part: our backends that run here, then the peers."""
    ours = {}
    for backend in NAMES:
        if backend == "triton" and device == "cpu":
            continue  # the interpreter is no contender
        if missing(case.op, backend, device) is None:
            ours[backend] = _on_backend(case.ours, backend)
    others = {**case.peers, **(case.gpu_peers if device == "cuda" else {})}
    again = [name for name in case.compiled if name in case.peers]
    compiled = {f"compiled {name}": torch.compile(case.peers[name], dynamic=False) for name in again}
    return {**ours, **others, **compiled}


def _on_backend(op: Callable, backend: str) -> Callable:
    def run(**inputs):
        with dk.use_backend(backend):
            return op(**inputs)

    return run


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
    exact = exact_result(case, inputs, device)
    rows = []
    for who, op in contenders(case, device).items():
        if who in skip or ("compiled" in skip and who.startswith("compiled")):
            continue
        if who == "reference" and case.exact and sizes["N"] > 2**14:
            continue
        kind = str(dtype).removeprefix("torch.")
        row = Row(case.name, case.op, who, "forward", kind)
        rows.append(row)
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
            with torch.no_grad():
                _fill(row, case, sizes, lambda op=op: op(**inputs), device, dtype, seconds)
            if case.grads and who not in case.forward_only:
                train = Row(case.name, case.op, who, "training", kind, note=row.note)
                rows.append(train)
                step = training_step(case, op, inputs, torch.randn_like(result))
                _fill(train, case, sizes, step, device, dtype, seconds)
        except (RuntimeError, ImportError) as error:  # out of memory, a peer that is not installed
            rows[-1].note = f"{type(error).__name__}: {str(error).splitlines()[0][:80]}"
    return rows


def _fill(row: Row, case: Case, sizes: dict, run: Callable, device: str, dtype: torch.dtype, seconds: float) -> None:
    times = sorted(time_ms(run, device, seconds))
    row.ms = statistics.median(times)
    row.ms_low, row.ms_high = times[len(times) // 10], times[-1 - len(times) // 10]
    row.mib = peak_growth_mib(run, device)
    if case.work and row.mode == "forward":
        moved, operations = case.work(**sizes, itemsize=dtype.itemsize)
        row.gb_per_s, row.tflop_per_s = moved / row.ms / 1e6, operations / row.ms / 1e9
