"""python -m bench.gpu_table RESULTS..: what the GPU suite measured, as a result and in docs/benchmarks.md.

RESULTS are files results.json of bench/gpu_suite.sh. Written for each: bench/results/<date>-<gpu>-<commit>.json, the
parts as they came, and .md, tables of them. The tables also go between the gpu marks of that page; of several with one
name the last. Times are medians in milliseconds, the L2 cache overwritten before each run.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

from .cases import CASES
from .measure import OURS, Row
from .names import readable
from .report import best_peer, in_markdown, put_between

HERE = Path(__file__).parent
MODES = {"forward": "forward", "training": "with gradients"}
MARKS = ("<!-- gpu:begin -->", "<!-- gpu:end -->")


def ms(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def count(n: int) -> str:
    return f"{n:,}"


def beside_peers(rows: list[dict]) -> str:
    """Rows of the benchmark: ours, the fastest of our backends, beside the fastest peer of the same work."""
    timed, fastest = [Row(**r) for r in rows if r.get("ms")], {}
    for row in sorted((r for r in timed if r.who in OURS), key=lambda r: r.ms):
        fastest.setdefault((row.case, row.mode, row.dtype), row)
    lines = []
    for key in dict.fromkeys((r.case, r.mode, r.dtype) for r in timed if r.who in OURS):
        ours = fastest[key]
        peer = best_peer(ours, timed)
        against = "" if peer is None else f"{ms(peer.ms)} ({peer.who})"
        times = "" if peer is None else f"{peer.ms / ours.ms:.2g}x"
        lines.append([ours.words, MODES[ours.mode], ours.dtype, ms(ours.ms), ms(ours.goal), against, times])
    head = ["work", "", "dtype", "ours, ms", "goal, ms", "fastest peer, ms", "its time over ours"]
    return in_markdown(head, lines)


def with_goals(rows: list[dict]) -> list[dict]:
    """Of a page: the ops that have goals, but for searches, which have a table of their own."""
    wanted = {case.name for case in CASES if case.goals and case.op != "knn"}
    return [r for r in rows if r["case"] in wanted]


def kernels(rows: list[dict]) -> str:
    """Those with a goal come with it."""
    goals = {case.name: case.goals for case in CASES}
    lines = [[readable(r["case"]), MODES[r["mode"]], r["dtype"], r["backend"], ms(r["ms"]), count(r["launches"]),
              ms(r.get("graph_ms")), ms(goals.get(r["case"], {}).get(f"{r['mode']} {r['dtype']}"))]
             for r in rows]  # fmt: skip
    head = ["work", "", "dtype", "kernels by", "kernels, ms", "launches", "replayed from a graph, ms", "goal, ms"]
    return in_markdown(head, lines)


def searches(rows: list[dict]) -> str:
    lines = [[r["set"], count(r["N"]), str(r["D"]), str(r["k"]), "causal" if r["causal"] else "", ms(r["eager_ms"]),
              ms(r.get("graph_ms")), ms(r["ms"]), count(r["launches"]), str(r["wrong"])] for r in rows]  # fmt: skip
    head = ["points", "N", "D", "k", "", "a call, ms", "replayed from a graph, ms", "kernels, ms", "launches",
            "wrong rows of 64"]  # fmt: skip
    return in_markdown(head, lines)


def crossover(rows: list[dict]) -> str:
    lines = [[str(r["B"]), count(r["N"]), str(r["D"]), str(r["k"]), "causal" if r["causal"] else "",
              ms(r["every pair"]), ms(r["tree"])] for r in rows]  # fmt: skip
    return in_markdown(["B", "N", "D", "k", "", "every pair, ms", "by a tree, ms"], lines)


def steps(rows: list[dict]) -> str:
    lines = [[r["model"], count(r["parameters"]), f"{r['B']} x {count(r['N'])}",
              "one graph" if r["graph"] else "launch by launch", ms(r["ms"])] for r in rows]  # fmt: skip
    return in_markdown(["model", "parameters", "rows x bytes", "", "a training step, ms"], lines)


TABLES: dict[str, tuple[str, Callable[[list[dict]], str]]] = {
    "benchmark": ("Beside others", beside_peers),
    "searches": ("Searches", searches),
    "crossover": ("Every pair or a tree, from a graph", crossover),
    "steps": ("Training steps, bfloat16", steps),
    "profile": ("Kernels and launches", kernels),
}


def rows_of(part: dict, folder: Path) -> list[dict]:
    """The benchmark keeps its rows in a file of its own, beside the suite's."""
    facts = part["facts"]
    return json.loads((folder / facts["file"]).read_text())["rows"] if isinstance(facts, dict) else facts


def read(path: Path) -> tuple[dict, dict[str, list[dict]], list[str]]:
    """What the machine is, the rows by part, and what the checks said."""
    facts, found, checks = None, {}, []
    for part in json.loads(path.read_text())["parts"]:
        if part["name"] == "environment":
            facts = part["facts"]
        elif part["name"] in TABLES and part["facts"]:
            found[part["name"]] = rows_of(part, path.parent)
        elif part["name"] != "build":
            checks.append(f"{part['name']}: {part['status']}, {part['reason']}")
    if facts is None:
        raise ValueError(f"no part of {path} says which machine it was")
    return facts, found, checks


def said(facts: dict) -> str:
    named = ", ".join(f"{name} {facts[name]}" for name in ("gpu", "date", "torch", "triton", "commit"))
    return f"Medians, the L2 cache overwritten before each run; {named}.\n"


def table(name: str, rows: list[dict], facts: dict) -> str:
    title, write = TABLES[name]
    return f"**{title}**\n\n{write(rows)}\n{said(facts)}"


def main(argv: list[str] | None = None, say: Callable[[str], object] = print) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_table", description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    parser.add_argument("--page", type=Path, default=HERE.parent / "docs" / "benchmarks.md")
    given = parser.parse_args(argv)
    given.out.mkdir(parents=True, exist_ok=True)
    shown = {}
    for result in given.results:
        facts, found, checks = read(result)
        kind = "".join(ch if ch.isalnum() else "-" for ch in facts["gpu"]).lower()
        path = given.out / f"{facts['date']}-{kind}-{facts['commit']}.json"
        path.write_text(json.dumps({"machine": facts, "checks": checks, **found}, indent=0) + "\n")
        tables = {
            name: f"**{TABLES[name][0]}**\n\n{TABLES[name][1](rows)}\n{said(facts)}" for name, rows in found.items()
        }
        checked = "\n".join(f"- {line}" for line in checks)
        path.with_suffix(".md").write_text("\n".join([f"# {facts['gpu']}\n", *tables.values(), checked]) + "\n")
        shown |= tables
        if short := with_goals(found.get("profile", [])):
            shown["profile"] = table("profile", short, facts)
        say(f"written to {path}")
    put_between(given.page, MARKS, "\n".join(shown[name] for name in TABLES if name in shown and name != "crossover"))
    say(f"shown in {given.page}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
