"""The GPU suite: what only a GPU can tell, in pieces of a few minutes.

    bash bench/gpu_suite.sh OUT --minutes 4                     checks: tests, CUDA graphs, determinism, compile, models
    bash bench/gpu_suite.sh OUT --minutes 5 --only benchmark    every case beside its best peer, and the goals
    bash bench/gpu_suite.sh OUT --only profile                  kernels by time, launches, graph replay, host time
    bash bench/gpu_suite.sh OUT --only train                    training steps at long lengths
    bash bench/gpu_suite.sh OUT --only sanitize                 compute-sanitizer over every op; counters: ncu

First it builds what the machine lacks (gpu_build.py). Every part is a process of its own with a time limit; one that
fails stops no other. The checks run several at a time, the measurements alone. What the parts do is in gpu_parts.py;
this file needs nothing but Python.

Written to OUT, after every part anew: summary.txt (a line a part), results.json, log.txt (all output), and what the
benchmark writes. Exit status: 0 if no part failed, 1 if one did, 3 if PyTorch sees no GPU here.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SKIPPED = 77  # the exit status of a part that cannot run here; its last line says why
NO_GPU = 3
# Tests of what does not depend on the device: compilers, emulated kernels, processes on the CPU (and tests/package).
NOT_ON_GPU = (
    "test_aot",
    "test_cuda_emulated",
    "test_cuda_emulated_gather",
    "test_cuda_emulated_sm90",
    "test_distributed",
)
LOG_BYTES = 400_000  # kept of each part's output, from its end


@dataclass(frozen=True)
class Part:
    name: str
    command: tuple[str, ...]
    limit: float  # seconds
    group: str = "checks"  # what --only chooses by; checks alone run without it
    alone: bool = False  # a measurement: nothing else runs meanwhile
    missing: str | None = None  # why it cannot run here
    skip_codes: tuple[int, ...] = (SKIPPED,)


@dataclass
class Outcome:
    name: str
    status: str  # "ok", "failed", "skipped"
    seconds: float = 0.0
    reason: str = ""
    facts: object = None  # what the part measured
    log: str = field(default="", repr=False)


# ---- the parts ------------------------------------------------------------------------------------------------------
def own(name: str, *arguments: str) -> tuple[str, ...]:
    return (sys.executable, "-m", "bench.gpu_parts", name, *arguments)


def tool(name: str) -> str | None:
    return shutil.which(name) or shutil.which(name, path="/usr/local/cuda/bin:/opt/cuda/bin")


def all_parts(out: Path) -> list[Part]:
    sanitizer, counters = tool("compute-sanitizer"), tool("ncu")
    parts = [
        Part("graphs", own("graphs"), 150),
        Part("determinism", own("determinism"), 120),
        Part("models", own("models"), 120),
        Part("compile", own("compile"), 240),
    ]
    for kind in ("memcheck", "racecheck", "initcheck"):
        absent = None if sanitizer else "compute-sanitizer is not installed"
        parts.append(Part(kind, own("sanitize", str(sanitizer), kind), 240, "sanitize", missing=absent))
    for path in sorted((ROOT / "tests").glob("[dk]*/test_*.py")):  # dfn and kernels
        if not any(path.match(f"{name}.py") for name in NOT_ON_GPU):
            command = (sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-m", "not slow", "--tb=short",
                       "--maxfail=40", "-rfE", str(path))  # fmt: skip
            name = str(path.relative_to(ROOT))
            parts.append(Part(name, command, 200, skip_codes=(SKIPPED, 5)))  # 5: nothing to run
    absent = None if counters else "ncu is not installed"
    return parts + [
        Part("steps", own("steps"), 60, "train", alone=True),
        Part("train", own("train"), 120, "train", alone=True),
        Part("benchmark", own("benchmark", str(out)), 280, "benchmark", alone=True),
        Part("profile", own("profile"), 150, "profile", alone=True),
        Part("searches", own("searches"), 60, "profile", alone=True),
        Part("crossover", own("crossover"), 60, "profile", alone=True),
        Part("host cost", (sys.executable, "-m", "bench.host_cost"), 60, "profile", alone=True),
        Part("counters", own("counters", str(counters)), 60, "counters", alone=True, missing=absent),
    ]


BUILD = Part("build", (sys.executable, "-m", "bench.gpu_build"), 60)


# ---- running them ---------------------------------------------------------------------------------------------------
def run_part(part: Part, limit: float) -> Outcome:
    """Runs one part for at most `limit` seconds, and everything that it starts no longer than that."""
    if part.missing:
        return Outcome(part.name, "skipped", reason=part.missing)
    if limit < 1:
        return Outcome(part.name, "skipped", reason="no time was left")
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        log, facts = Path(folder, "log"), Path(folder, "facts.json")
        environment = {
            **os.environ,
            "DFN_TEST_DEVICE": "cuda",
            "DFN_SUITE_FACTS": str(facts),
            "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # cuBLAS gives the same bits in every run only with this
            "PYTHONUNBUFFERED": "1",
            "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
        }
        environment.pop("TRITON_INTERPRET", None)
        stopped = ""
        try:
            with log.open("wb") as file:
                process = subprocess.Popen(
                    part.command, stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, cwd=ROOT,
                    env=environment, start_new_session=True,
                )  # fmt: skip
                try:
                    code = process.wait(limit)
                except subprocess.TimeoutExpired:
                    code, stopped = -1, f"stopped after {limit:.0f} s"
                finally:
                    _end(process)
        except OSError as error:
            return Outcome(part.name, "failed", reason=f"cannot be started: {error}")
        seconds = time.monotonic() - start
        text = log.read_bytes()[-LOG_BYTES:].decode(errors="replace")
        last = next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")
        try:
            measured = json.loads(facts.read_text())
        except (OSError, ValueError):
            measured = None
    if stopped:
        return Outcome(part.name, "failed", seconds, f"{stopped}; last line: {last}", measured, text)
    status = "ok" if code == 0 else "skipped" if code in part.skip_codes else "failed"
    if code < 0:
        last = f"ended by signal {-code} ({signal.Signals(-code).name}); last line: {last}"
    return Outcome(part.name, status, seconds, last or f"exit status {code}", measured, text)


def _end(process: subprocess.Popen) -> None:
    """Ends the part's process group: what a part starts does not outlive it."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


class Report:
    """Collects outcomes and writes them after every part, so that an interrupted run leaves what it had."""

    def __init__(self, out: Path):
        out.mkdir(parents=True, exist_ok=True)
        self.out, self.outcomes, self.lock, self.start = out, [], threading.Lock(), time.monotonic()
        (out / "log.txt").write_text("")

    def add(self, outcome: Outcome) -> None:
        with self.lock:
            self.outcomes.append(outcome)
            with (self.out / "log.txt").open("a") as file:
                file.write(f"\n==== {outcome.name}: {outcome.status}, {outcome.seconds:.1f} s ====\n{outcome.log}\n")
            (self.out / "summary.txt").write_text(self.summary() + "\n")
            known = [{k: v for k, v in asdict(o).items() if k != "log"} for o in self.outcomes]
            (self.out / "results.json").write_text(json.dumps({"parts": known}, indent=1) + "\n")
        print(line(outcome), flush=True)

    def count(self, status: str) -> int:
        return sum(outcome.status == status for outcome in self.outcomes)

    def summary(self) -> str:
        order = {"ok": 0, "skipped": 1, "failed": 2}  # what needs a look comes last, where one looks first
        lines = [line(o) for o in sorted(self.outcomes, key=lambda o: (order[o.status], o.name))]
        counts = ", ".join(f"{self.count(status)} {status}" for status in order)
        return "\n".join([*lines, f"{counts} in {time.monotonic() - self.start:.0f} s"])


def line(outcome: Outcome) -> str:
    return f"{outcome.status:8}{outcome.name:44}{outcome.seconds:7.1f} s  {outcome.reason[:200]}".rstrip()


def run_all(parts: list[Part], report: Report, seconds: float, jobs: int) -> None:
    """The checks `jobs` at a time, then the measurements one by one, for whom time is kept back."""
    end = report.start + seconds
    measurements = [part for part in parts if part.alone]
    checks = [part for part in parts if not part.alone]
    kept = min(sum(part.limit for part in measurements if not part.missing), seconds / 2)

    def check(part: Part) -> None:
        report.add(run_part(part, min(part.limit, end - kept - time.monotonic())))

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(check, checks))
    for part in measurements:
        report.add(run_part(part, min(part.limit, end - time.monotonic())))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="gpu_suite.sh", description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, nargs="?", help="folder for the results")
    parser.add_argument("--only", nargs="+", default=["checks"], metavar="NAME",
                        help="groups (checks, benchmark, profile, train, sanitize, counters), or parts whose name "
                        "contains one of these (default: checks)")  # fmt: skip
    parser.add_argument("--minutes", type=float, default=4.0, help="for everything together (default: %(default)g)")
    parser.add_argument("--jobs", type=int, default=max(1, min(14, (os.cpu_count() or 2) - 2)), help="checks at a time")
    parser.add_argument("--list", action="store_true", help="name the parts and stop")
    given = parser.parse_args(argv)
    if given.out is None and not given.list:
        parser.error("OUT is missing: the folder for the results")
    if given.jobs < 1 or not given.minutes > 0:
        parser.error("--jobs and --minutes must be positive")
    out = (given.out or Path(".")).resolve()
    known = all_parts(out)
    parts = [p for p in known if p.group in given.only or any(name in p.name for name in given.only)]
    if not parts:
        parser.error(f"no part has one of {given.only} in its name; there are: {', '.join(p.name for p in known)}")
    if given.list:
        print("\n".join(f"{part.name:44}{part.limit:4.0f} s  {part.missing or ''}".rstrip() for part in parts))
        return 0
    report, seconds = Report(out), 60 * given.minutes
    report.add(run_part(Part("environment", own("environment"), 60), min(60, seconds)))
    if report.outcomes[0].status != "ok":
        print(f"gpu_suite: skipped, nothing was run: {report.outcomes[0].reason}")
        return NO_GPU
    report.add(run_part(BUILD, min(BUILD.limit, seconds)))
    run_all(parts, report, seconds, given.jobs)
    print(f"\n{report.summary()}\nresults in {out}")
    return 1 if report.count("failed") else 0


if __name__ == "__main__":
    sys.exit(main())
