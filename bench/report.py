"""What is shown of the measurements: a table for the terminal and Markdown, JSON with what produced it."""

import datetime
import json
import platform
import subprocess
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from tqdm import tqdm

from .cases import Case, quick_cases
from .measure import OURS, Row, run_case

COLUMNS = ("case", "who", "mode", "ms", "goal", "vs best peer", "MiB", "GB/s", "TFLOP/s", "error", "note")


def measure_all(cases: Iterable[Case], after_each: Callable[[list[Row]], object] = len, **options) -> list[Row]:
    """All rows; `after_each` case it is given those so far, so that what was measured is not lost."""
    rows: list[Row] = []
    with tqdm(list(cases), desc="bench", unit="case") as bar:
        for case in bar:
            bar.set_postfix_str(case.name)
            rows += run_case(case, **options)
            after_each(rows)
    return rows


def _speedup(row: Row, digits: int = 2) -> str:
    """Time of the fastest peer over this row's, in the same rounds: the median and, in brackets, both quartiles."""
    if row.ratio is None:
        return ""
    middle, low, high = (f"{ratio:.{digits}f}" for ratio in (row.ratio, row.ratio_low, row.ratio_high))
    return f"{middle}x ({low}-{high})"


def best_peer(row: Row, rows: list[Row]) -> Row | None:
    same = [r for r in rows if (r.case, r.mode, r.dtype) == (row.case, row.mode, row.dtype)]
    return min((r for r in same if r.who not in OURS and r.ms), key=lambda r: r.ms, default=None)


def table(rows: list[Row]) -> list[tuple[str, ...]]:
    def number(x, form):
        return "" if x is None else format(x, form)

    return [
        (
            row.case, row.who, row.mode, number(row.ms, ".2f"), number(row.goal, ".2f"), _speedup(row),
            number(row.mib, ".1f"),
            number(row.gb_per_s, ".1f"), number(row.tflop_per_s, ".3f"), number(row.error, ".1e"), row.note,
        )
        for row in rows
    ]  # fmt: skip


def markdown(rows: list[Row]) -> str:
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + " --- |" * len(COLUMNS)]
    lines += ["| " + " | ".join(cells) + " |" for cells in table(rows)]
    return "\n".join(lines) + "\n"


def plain(rows: list[Row]) -> str:
    cells = [COLUMNS, *table(rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(COLUMNS))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in cells)


def machine() -> dict[str, str]:
    """What a figure depends on."""
    cpu = platform.processor()
    try:
        with open("/proc/cpuinfo") as file:
            cpu = next((line.split(":")[1].strip() for line in file if line.startswith("model name")), cpu)
    except OSError:
        pass
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=Path(__file__).parent
    ).stdout.strip()
    facts = {
        "date": datetime.date.today().isoformat(),
        "cpu": cpu,
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit,
    }
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
        facts["cuda"] = str(torch.version.cuda)
    return facts


def write(rows: list[Row], folder: Path, facts: dict[str, str], ceilings: dict[str, float]) -> Path:
    """results as <date>-<machine>.json and .md in `folder`; returns the JSON's path. `facts`: those of `machine`."""
    kind = "".join(ch if ch.isalnum() else "-" for ch in facts.get("gpu", facts["cpu"])).strip("-").lower()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{facts['date']}-{kind}-{facts['threads']}threads.json"
    result = {"machine": facts, "ceilings": ceilings, "rows": [row.asdict() for row in rows]}
    path.write_text(json.dumps(result, indent=1) + "\n")
    title = ", ".join(f"{name} {value}" for name, value in facts.items())
    note = (
        "Median of repeated runs in milliseconds, in which everybody took turns; the ratio is of times from the same "
        "turn, with both quartiles; MiB is the growth of peak memory; error is relative to float64. "
        "GB/s and TFLOP/s count what the op has to move and compute at least; this machine reaches "
        + ", ".join(f"{name} {value:.4g}" for name, value in ceilings.items())
        + ".\n"
    )
    path.with_suffix(".md").write_text(f"# Benchmark\n\n{title}\n\n{note}\n{markdown(rows)}")
    return path


PAGE = Path(__file__).parents[1] / "docs" / "benchmarks.md"
PAGE_MARKS = ("<!-- bench:begin -->", "<!-- bench:end -->")


def page_table(path: Path) -> str:
    """From a result: our default backend beside the fastest peer of every case and mode, and what produced it."""
    result = json.loads(path.read_text())
    rows = [Row(**row) for row in result["rows"]]
    lines = ["| case | mode | ours, ms | best peer, ms | ratio | memory, ours / peer, MiB |", "|" + " --- |" * 6]
    for ours in (row for row in rows if row.who in ("native", "triton") and row.ms):
        peer = best_peer(ours, rows)
        if peer:
            memory = "" if None in (ours.mib, peer.mib) else f"{ours.mib:.0f} / {peer.mib:.0f}"
            what = f"{peer.ms:.1f} ({peer.who})"
            lines.append(f"| {ours.case} | {ours.mode} | {ours.ms:.1f} | {what} | {_speedup(ours, 1)} | {memory} |")
    made_by = ", ".join(f"{name} {value}" for name, value in result["machine"].items())
    what = "Medians of one run in which everybody took turns, float32; of the ratio, in brackets, both quartiles"
    return "\n".join(lines) + f"\n\n{what}: {made_by}.\n"


def update_page(result: Path, page: Path = PAGE) -> None:
    put_between(page, PAGE_MARKS, page_table(result))


def put_between(page: Path, marks: tuple[str, str], text: str) -> None:
    """Replaces what stands between the marks on a page."""
    whole = page.read_text()
    begin, end = (whole.index(mark) for mark in marks)
    page.write_text(whole[: begin + len(marks[0])] + "\n" + text + whole[end:])


def compare(before: Path, after: Path) -> str:
    """Time of `after` over `before` for every row that both have, slower ones first."""

    def times(path: Path) -> dict[tuple, float]:
        rows = json.loads(path.read_text())["rows"]
        return {(r["case"], r["who"], r["mode"], r["dtype"]): r["ms"] for r in rows if r["ms"]}

    old, new = times(before), times(after)
    both = sorted((key for key in old if key in new), key=lambda key: -new[key] / old[key])
    return "\n".join(
        f"{new[key] / old[key]:6.2f}x  {old[key]:10.2f} -> {new[key]:10.2f} ms  {' '.join(key)}" for key in both
    )


def quick_table(seconds: float = 0.2) -> str:
    """One small case an op as Markdown: for the demo."""
    return markdown(measure_all(quick_cases(), seconds=seconds))
