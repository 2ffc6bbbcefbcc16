"""What the parts of the GPU suite do; gpu_suite.py runs each as `python -m bench.gpu_parts NAME`.

A part prints what it does, and its verdict as the last line. It ends with status 0 if all is well, 1 if something is
wrong, 77 if it cannot run here. Most take a device, so that the tests run them on a CPU, too.
"""

import csv
import io
import json
import os
import platform
import re
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

import dfn_kernels as dk
from dfn_kernels._backends import missing

from . import report
from .cases import CASES, Case
from .gpu_profile import crossover, keep, profiled_cases, profiled_searches
from .gpu_training import models, train, whole_steps
from .measure import run_case
from .timing import captured, ceilings

SKIPPED = 77
DTYPES = (torch.float32, torch.bfloat16)


class Skip(Exception):
    """This part cannot run here."""


# ---- the ops, as the benchmark's cases name them --------------------------------------------------------------------
def our_distances(positions, k):
    return dk.knn(positions, k).sq_dists


def ops() -> list[Case]:
    """One case an op and small size, and the distances of the search, which have gradients."""
    cases = list({case.op + case.variant + str(case.small): case for case in CASES if not case.layer}.values())
    search = next(case for case in cases if case.op == "knn")
    return [*cases, replace(search, ours=our_distances, grads=("positions",), exact=False)]


def backends_of(op: str, device: str) -> list[str]:
    return [name for name in ("native", "triton") if missing(op, name, device) is None] or ["reference"]


def variants(device: str, cases: Iterable[Case]) -> Iterable[tuple[str, Case, str, torch.dtype]]:
    """Everything that is checked: (label, case, backend, dtype)."""
    for case in cases:
        for backend in backends_of(case.op, device):
            for dtype in DTYPES:
                grads = "forward and backward" if case.grads else "forward"
                yield f"{case.op} {backend} {str(dtype)[6:]} {grads}", case, backend, dtype


class Step:
    """One op, forward and backward, on inputs that stay where they are."""

    def __init__(self, case: Case, backend: str, dtype: torch.dtype, device: str, sizes: dict):
        self.case, self.backend, self.make = case, backend, lambda: case.make(**sizes, device=device, dtype=dtype)
        made = self.make()
        self.inputs = {n: x.detach().requires_grad_() if n in case.grads else x for n, x in made.items()}
        self.op = case.ours
        self.grad = torch.randn_like(self.forward()) if case.grads else None

    def forward(self) -> Tensor:
        torch.manual_seed(1)  # ops that draw random numbers draw the same ones
        with dk.use_backend(self.backend):
            return self.op(**self.inputs)

    def __call__(self) -> list[Tensor]:
        out = self.forward()
        if self.grad is None:
            return [out.detach()]
        return [out.detach(), *torch.autograd.grad(out, [self.inputs[n] for n in self.case.grads], self.grad)]

    def refresh(self) -> None:
        """New values in the same memory."""
        for name, fresh in self.make().items():
            if isinstance(fresh, Tensor):
                self.inputs[name].data.copy_(fresh)


def same_bits(left: list[Tensor], right: list[Tensor]) -> bool:
    def bits(x: Tensor) -> Tensor:
        return x.detach().contiguous().reshape(-1).view(torch.uint8)

    return all(a.dtype == b.dtype and a.shape == b.shape and bits(a).equal(bits(b))
               for a, b in zip(left, right, strict=True))  # fmt: skip


def each(items: Iterable[tuple], check: Callable[..., str | None]) -> str:
    """Runs check(*rest) for every (label, *rest); it returns what is wrong, or raises. Gives the verdict."""
    wrong, count = [], 0
    for label, *rest in items:
        count += 1
        start = time.perf_counter()
        try:
            problem = check(*rest)
        except Exception as error:  # an op that breaks must not hide the others
            traceback.print_exc()
            problem = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]}"
        seconds = time.perf_counter() - start
        print(f"{'wrong' if problem else 'ok':6} {label} ({seconds:.1f} s) {problem or ''}", flush=True)
        if problem:
            wrong.append(f"{label}: {problem}")
    if wrong:
        keep(wrong)
        raise AssertionError(f"{len(wrong)} of {count} wrong: {'; '.join(wrong)}")
    return f"{count} right"


# ---- environment ----------------------------------------------------------------------------------------------------
def environment() -> str:
    if not torch.cuda.is_available():
        raise Skip(f"no GPU: PyTorch {torch.__version__} sees no CUDA device here")
    try:
        import triton

        version = triton.__version__
    except ImportError:
        version = None
    shape = torch.cuda.get_device_properties(0)
    facts = {
        **report.machine(),
        "triton": version,
        "capability": f"{shape.major}.{shape.minor}",
        "multiprocessors": shape.multi_processor_count,
        "memory_gib": round(shape.total_memory / 2**30, 1),
        "driver": _ask_driver("driver_version"),
        "clocks, temperature": _ask_driver("clocks.sm,clocks.mem,temperature.gpu"),
        "system": platform.platform(),
        "backends": dk.backends(),
    }
    print(json.dumps(facts, indent=1))
    keep(facts)
    return f"{facts['gpu']}, PyTorch {torch.__version__}, Triton {version}, commit {facts['commit']}"


def _ask_driver(query: str) -> str | None:
    try:
        asked = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
        return subprocess.run(asked, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return None


# ---- checks ---------------------------------------------------------------------------------------------------------
def walk(device: str = "cuda") -> str:
    """Every op once, at its small size: what the sanitizers watch."""

    def check(case, backend, dtype):
        Step(case, backend, dtype, device, case.small)()
        if device == "cuda":
            torch.cuda.synchronize()

    return each(variants(device, ops()), check)


def graphs(device: str = "cuda") -> str:
    """Captured once, replayed on new values in the same memory: the bits of an eager run."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # index_add adds in fixed order

    def record(run):
        graph, results = captured(run)
        return results, graph.replay

    def check(case, backend, dtype):
        return replay_differs(Step(case, backend, dtype, device, case.small), record)

    return each(variants(device, ops()), check)


def replay_differs(step: Step, record: Callable[[Callable], tuple[list[Tensor], Callable]]) -> str | None:
    """`record(run)` gives what run() returned and a function that renews it; says which of it differs from eager runs.

    A gradient may be a view of the incoming one (flow_drift's to positions is): only copies may be overwritten.
    """
    results, replay = record(lambda: [x.clone() for x in step()])
    names = ["output", *(f"gradient of {name}" for name in step.case.grads)]
    for _ in range(2):
        step.refresh()
        eager = [x.clone() for x in step()]
        for x in results:
            x.zero_()
        torch.manual_seed(1)
        replay()
        others = [name for name, a, b in zip(names, results, eager, strict=True) if not same_bits([a], [b])]
        if others:
            return f"a replay gives other bits than an eager run: {', '.join(others)}"
    return None


def determinism(device: str = "cuda", small: bool = False) -> str:
    """Full size, the same bits in every run."""
    torch.use_deterministic_algorithms(True, warn_only=True)

    def check(case, backend, dtype):
        step = Step(case, backend, dtype, device, case.small if small else case.sizes)
        first = step()
        for _ in range(3):
            if not same_bits(step(), first):
                return "two runs give different bits"

    cases = ops() if small else [*CASES, ops()[-1]]
    return each(variants(device, cases), check)


def compiled(device: str = "cuda", cases: Iterable[Case] | None = None) -> str:
    """torch.compile without a graph break, close to eager."""

    def check(case, backend, dtype):
        torch._dynamo.reset()
        step = Step(case, backend, dtype, device, case.small)
        eager = step()
        step.op = torch.compile(case.ours, fullgraph=True)
        got = step()
        for a, b in zip(got, eager, strict=True):
            if a.shape != b.shape or a.dtype != b.dtype:
                return f"{list(a.shape)} {a.dtype} instead of {list(b.shape)} {b.dtype}"
            if case.op == "field_sample":
                continue  # the compiler draws other random numbers
            if not a.is_floating_point():
                if not a.equal(b):
                    return "other indices than an eager run"
            elif not (a.double() - b.double()).norm() <= 1e-5 * b.double().norm() + 1e-30 and dtype == torch.float32:
                return "far from an eager run"

    chosen = [v for v in variants(device, ops() if cases is None else cases) if v[3] == torch.float32]
    return each(chosen, check)


def models_agree(device: str = "cuda") -> str:
    """Models in float64 as on a CPU, outputs and gradients; and no output of a causal model sees later inputs."""
    builders = [
        (f"{name} as on a CPU" if what == "same" else f"{name} causal", build, what)
        for name, build in models(64, small=True).items()
        for what in ("same", "causal")
    ]

    def check(build, what):
        torch.manual_seed(0)
        model, vocabulary = build()
        ids = torch.randint(vocabulary, (2, 64))
        if what == "causal":
            model, ids = model.to(device), ids.to(device)
            before = model(ids)[0][:, :40]
            ids[:, 40:] = ids[:, 40:].flip(1)
            return None if same_bits([model(ids)[0][:, :40]], [before]) else "earlier outputs depend on later inputs"
        results = []
        for where in ("cpu", device):
            model = model.to(where, torch.float64)
            model.zero_grad()
            out = model(ids.to(where))[0]
            out.square().mean().backward()
            grads = [p.grad for p in model.parameters() if p.grad is not None]
            results.append([x.detach().cpu().clone() for x in (out, *grads)])
        for want, got in zip(*results, strict=True):
            if not (got - want).norm() <= 1e-8 * (want.norm() + 1e-6):
                return f"off by {(got - want).norm() / want.norm():.1e}"

    return each(builders, check)


def sanitize(command: str, kind: str) -> str:
    """compute-sanitizer over `walk`."""
    watched = [command, "--tool", kind, "--target-processes", "all", "--error-exitcode", "9", "--report-api-errors",
               "no", "--print-limit", "40", sys.executable, "-m", "bench.gpu_parts", "walk"]  # fmt: skip
    # A cached block is larger than the tensor in it, and a reused one is not uninitialised: so no caching.
    settings = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "DFN_SUITE_FACTS": ""}
    done = subprocess.run(watched, env={**os.environ, **settings}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          text=True, errors="replace")  # fmt: skip
    print(done.stdout)
    return sanitizer_verdict(done.stdout, done.returncode)


def sanitizer_verdict(text: str, code: int) -> str:
    refused = re.search(r"Device not supported|Failed to initialize|[Uu]nable to (?:attach|find)", text)
    found = [int(n) for n in re.findall(r"SUMMARY: (\d+) (?:error|hazard)", text)]
    if refused and not found:
        raise Skip(f"compute-sanitizer cannot work here: {refused.group()}")
    if sum(found) == 0 and found and code == 0:
        return "nothing found"
    where = sorted(set(re.findall(r" at (?:0x[0-9a-f]+ in )?([A-Za-z_]\w*)\s*[(+]", text)))[:6]
    raise AssertionError(f"{sum(found)} findings, exit status {code}, in: {', '.join(where) or 'see the log'}")


# ---- measurements ---------------------------------------------------------------------------------------------------
def benchmark(out: str, device: str = "cuda", small: bool = False) -> str:
    """The benchmark's cases in float32 and bfloat16, written after every case."""
    facts, limits = report.machine(), ceilings(device, small)
    print(limits, flush=True)
    rows, wrong = [], []
    skip = ("scipy cKDTree", "pynanoflann", "faiss, flat", *(["compiled"] if small else []))
    for dtype in DTYPES:
        for case in CASES:
            try:
                new = run_case(case, device=device, dtype=dtype, seconds=0.0 if small else 0.15, small=small, skip=skip)
            except Exception as error:
                traceback.print_exc()
                wrong.append(f"{case.name} {str(dtype)[6:]}: {type(error).__name__}: {str(error)[:100]}")
                continue
            ours = [r for r in new if r.who in ("native", "triton")]
            wrong += [f"{r.case} {r.who} {r.mode} {r.dtype}: {r.note}" for r in ours if r.ms is None]
            rows += new
            print(report.plain(new), flush=True)
            path = report.write(rows, Path(out), facts, limits)
            keep({"ceilings": limits, "rows": len(rows), "wrong": wrong, "file": path.name})
    if wrong:
        raise AssertionError(f"{len(wrong)} without a time: {'; '.join(wrong)}")
    return f"{len(rows)} rows, {limits}"


METRICS = {
    "gpu__time_duration.sum": "time",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "memory %",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed": "SM %",
    "dram__bytes.sum": "bytes",
    "launch__registers_per_thread": "registers",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "occupancy %",
}


def profiled(device: str = "cuda") -> str:
    """Every op once at full size, between the profiler's start and stop: what `counters` watches."""
    names = set()
    for label, case, backend, dtype in variants(device, CASES):
        if (case.op, backend, dtype) in names or case.op in ("low_rank_route", "field_sample"):
            continue
        names.add((case.op, backend, dtype))
        step = Step(case, backend, dtype, device, case.sizes)
        step()
        print(label, flush=True)
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
        step()
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()
    return f"{len(names)} profiled"


def counters(command: str) -> str:
    watched = [command, "--clock-control", "none", "--profile-from-start", "off", "--target-processes", "all", "--csv",
               "--page", "raw", "--print-units", "base", "--metrics", ",".join(METRICS), sys.executable, "-m",
               "bench.gpu_parts", "profiled"]  # fmt: skip
    done = subprocess.run(watched, env={**os.environ, "DFN_SUITE_FACTS": ""}, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, text=True, errors="replace")  # fmt: skip
    print(done.stdout)
    kernels = parse_counters(done.stdout)
    if not kernels:
        last = (done.stdout.strip().splitlines() or ["no output"])[-1]
        raise Skip(f"hardware counters cannot be read here: {last}")
    keep(kernels)
    for kernel in sorted(kernels, key=lambda k: -k["time"])[:20]:
        print(kernel)
    return f"{len(kernels)} kernels"


def parse_counters(text: str) -> list[dict]:
    """The kernels in ncu's CSV, which lies between lines of the program and of ncu itself."""
    lines = text.splitlines()
    first = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if first is None:
        return []
    kernels = []
    for row in csv.DictReader(io.StringIO("\n".join(line for line in lines[first:] if line.startswith('"')))):
        if not (row.get("ID") or "").isdigit():
            continue  # the line of units
        found = {"kernel": row.get("Kernel Name", "")[:100]}
        for metric, name in METRICS.items():
            try:
                found[name] = float((row.get(metric) or "").replace(",", ""))
            except ValueError:
                found[name] = 0.0
        kernels.append(found)
    return kernels


PARTS = {
    "environment": environment, "walk": walk, "graphs": graphs, "determinism": determinism, "compile": compiled,
    "models": models_agree, "sanitize": sanitize, "train": train, "steps": whole_steps,
    "benchmark": benchmark,
    "profile": profiled_cases, "searches": profiled_searches, "crossover": crossover, "profiled": profiled,
    "counters": counters,
}  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    name, *arguments = sys.argv[1:] if argv is None else argv
    try:
        print(PARTS[name](*arguments))
    except Skip as reason:
        print(reason)
        return SKIPPED
    except AssertionError as error:
        print(error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
