"""python -m bench guard BASE: is this tree slower than commit BASE? Both run in turns, and the exit status says.

BASE is checked out and built in build/guard/<commit>. For every case a process of each tree is started; they take
turns, run by run, on the same inputs, so that the machine's moods meet both alike. The ratio of a case and mode is the
median over the rounds of (time here / time at BASE). Exit status: 0, 1 if a ratio is above the threshold (and its lower
quartile above 1: a noisy pair is not a finding), 2 if nothing could be compared.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]

# Runs in the tree under test: answers "forward" or "training" with the milliseconds of one run. A tree that does not
# know the case ends.
WORKER = """
import json, sys, time, torch
from bench.cases import CASES
from bench.measure import training_step
name, dtype, small, threads = json.loads(sys.argv[1])
torch.set_num_threads(threads)
case = next(c for c in CASES if c.name == name)
torch.manual_seed(0)
inputs = case.make(**(case.small if small else case.sizes), device="cpu", dtype=getattr(torch, dtype))
def forward():
    with torch.no_grad():
        return case.ours(**inputs)
runs = {"forward": forward}
if case.grads:
    runs["training"] = training_step(case, case.ours, inputs, torch.randn_like(case.ours(**inputs)))
for run in runs.values():
    run()
print(json.dumps(list(runs)), flush=True)
for line in sys.stdin:
    start = time.perf_counter()
    runs[line.strip()]()
    print((time.perf_counter() - start) * 1e3, flush=True)
"""


class Runner:
    """A case in a tree, in a process of its own that waits to be asked for a run."""

    def __init__(self, tree: Path, python: str, *case):
        self.process = subprocess.Popen(
            [python, "-c", WORKER, json.dumps(case)], cwd=tree, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            text=True, stderr=subprocess.DEVNULL, env={**os.environ, "PYTHONPATH": str(tree)},
        )  # fmt: skip
        first = self.process.stdout.readline()
        self.modes: list[str] = json.loads(first) if first else []

    def ms(self, mode: str) -> float:
        self.process.stdin.write(mode + "\n")
        self.process.stdin.flush()
        return float(self.process.stdout.readline())

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


def checkout(base: str) -> Path:
    """The tree of BASE, built."""
    commit = git("rev-parse", "--short=12", base + "^{commit}")
    tree = ROOT / "build" / "guard" / commit
    if not tree.exists():
        tree.parent.mkdir(parents=True, exist_ok=True)
        git("clone", "--quiet", "--no-checkout", str(ROOT), str(tree))
        git("-C", str(tree), "checkout", "--quiet", commit)
    if not list((tree / "dfn_kernels").glob("_C_cpu.so")):
        environment = {
            **os.environ,
            "DFN_CUDA": "0",
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        }
        command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
        subprocess.run(command, cwd=tree, env=environment, check=True, stdout=subprocess.DEVNULL)
    return tree


def git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()


def in_turns(before: Runner, after: Runner, mode: str, seconds: float) -> list[float]:
    """Ratios after / before, round by round; every other round begins with the other."""
    ratios: list[float] = []
    spent = 0.0
    while len(ratios) < 5 or (spent < seconds * 1e3 and len(ratios) < 200):
        pair = (before, after) if len(ratios) % 2 else (after, before)
        times = {runner: runner.ms(mode) for runner in pair}
        ratios.append(times[after] / times[before])
        spent += sum(times.values())
    return ratios


def main(argv: list[str]) -> int:
    from .cases import cases_for, chosen

    parser = argparse.ArgumentParser(prog="python -m bench guard", description=__doc__.splitlines()[0])
    parser.add_argument("base", help="commit, branch or tag to compare with, or the folder of a built tree")
    parser.add_argument("--only", default="", help="cases whose name, as in a table or in JSON, contains this")
    parser.add_argument("--threshold", type=float, default=1.1, help="a ratio above this fails (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=3.0, help="for each case and mode (default: %(default)s)")
    parser.add_argument("--dtype", default="float32", choices=["float32", "float64", "bfloat16", "float16"])
    parser.add_argument("--small", action="store_true", help="the cases at their small sizes")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    given = parser.parse_args(argv)
    try:
        cases = {case.name: case.words for case in chosen(cases_for("cpu"), given.only)}
    except ValueError as error:
        parser.error(str(error))
    tree = Path(given.base).resolve() if Path(given.base, "dfn_kernels").is_dir() else checkout(given.base)

    slower, compared = [], 0
    print(f"{'here / base':>12}  {'quartiles':13}  case")
    for name, words in tqdm(cases.items(), desc="guard", unit=" cases", disable=None):
        case = (name, given.dtype, given.small, given.threads)
        before, after = Runner(tree, sys.executable, *case), Runner(ROOT, sys.executable, *case)
        try:
            for mode in (mode for mode in after.modes if mode in before.modes):
                low, middle, high = statistics.quantiles(in_turns(before, after, mode, given.seconds), n=4)
                compared += 1
                worse = middle > given.threshold and low > 1
                slower += [f"{words}, {mode}: {middle:.2f}x"] * worse
                tqdm.write(f"{middle:11.2f}x  {low:5.2f} - {high:4.2f}  {words}, {mode}{'  SLOWER' if worse else ''}")
        finally:
            before.close()
            after.close()
    if not compared:
        print("guard: no case runs in both trees")
        return 2
    print(f"guard: {len(slower)} of {compared} slower than {given.threshold:g}x" + "".join(f"\n  {s}" for s in slower))
    return 1 if slower else 0
