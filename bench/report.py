"""What is shown of the measurements: a table for the terminal and Markdown, JSON with what produced it."""

import datetime
import json
import platform
import subprocess
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from .cases import Case, quick_cases
from .measure import OURS, Row, run_case
from .names import readable

COLUMNS = ("case", "who", "mode", "ms", "goal, ms", "best peer / it", "MiB", "GB/s", "TFLOP/s", "error", "note")


def measure_all(cases: Iterable[Case], after_each: Callable[[list[Row]], object] = len, **options) -> list[Row]:
    """All rows; `after_each` case it is given those so far, so that what was measured is not lost."""
    rows: list[Row] = []
    with tqdm(list(cases), desc="measuring", unit=" cases") as bar:
        for case in bar:
            bar.set_postfix_str(case.words)
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
            row.words, row.who, row.mode, number(row.ms, ".2f"), number(row.goal, ".2f"), _speedup(row),
            number(row.mib, ".1f"),
            number(row.gb_per_s, ".1f"), number(row.tflop_per_s, ".3f"), number(row.error, ".1e"), row.note,
        )
        for row in rows
    ]  # fmt: skip


def without_missing(rows: list[Row]) -> tuple[list[Row], str]:
    """The rows of what is installed, and a line that names the peers that are not."""
    missing = [row for row in rows if "ModuleNotFoundError" in row.note]
    names = ", ".join(dict.fromkeys(row.who for row in missing))
    return [row for row in rows if row not in missing], f"Not installed, so not measured: {names}." if names else ""


def in_markdown(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *lines]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"


def markdown(rows: list[Row]) -> str:
    rows, missing = without_missing(rows)
    return in_markdown(COLUMNS, table(rows)) + (f"\n{missing}\n" if missing else "")


def plain(rows: list[Row]) -> str:
    rows, missing = without_missing(rows)
    cells = [COLUMNS, *table(rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(COLUMNS))]
    lines = ["  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in cells]
    return "\n".join([*lines, *([missing] if missing else [])])


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
    write_page(path)
    return path


def write_page(result: Path) -> Path:
    """The Markdown of a result, beside its JSON."""
    found = json.loads(result.read_text())
    title = ", ".join(f"{name} {value}" for name, value in found["machine"].items())
    reached = ", ".join(f"{name} {value:.4g}" for name, value in found["ceilings"].items())
    note = f"""\
- *who*: native is our C++ (CUDA C++ on a GPU), triton our Triton kernels, reference our formula in plain PyTorch,
  default whichever of them each part runs best on; everybody else is what one could use instead.
- *mode*: training is forward and backward together.
- *ms*: the median of repeated runs, in which everybody took turns. *best peer / it*: the best peer's time over this
  one, of times from the same turn, the median and both quartiles; above 1 ours is faster.
- *MiB*: growth of peak memory. *error*: relative to float64; of a search the share of other neighbours.
- *GB/s*, *TFLOP/s*: what the op has to move and compute at least; this machine reaches {reached}.
"""
    page = result.with_suffix(".md")
    page.write_text(f"# Benchmark\n\n{title}\n\n{note}\n{markdown([Row(**row) for row in found['rows']])}")
    return page


PAGE = Path(__file__).parents[1] / "docs" / "benchmarks.md"
PAGE_MARKS = ("<!-- bench:begin -->", "<!-- bench:end -->")


def beside_peers(rows: list[Row]) -> str:
    """Our compiled backend beside the fastest peer of every case and mode, in Markdown."""
    lines = []
    for ours in (row for row in rows if row.who in ("native", "triton") and row.ms):
        if peer := best_peer(ours, rows):
            memory = "" if None in (ours.mib, peer.mib) else f"{ours.mib:.0f} / {peer.mib:.0f}"
            theirs = f"{peer.ms:.1f} ({peer.who})"
            lines.append((ours.words, ours.mode, f"{ours.ms:.1f}", theirs, _speedup(ours, 1), memory))
    head = ("case", "mode", "ours, ms", "best peer, ms", "ratio", "memory, ours / peer, MiB")
    return in_markdown(head, lines)


def page_table(path: Path) -> str:
    """`beside_peers` of a result, and what produced it."""
    result = json.loads(path.read_text())
    made_by = ", ".join(f"{name} {value}" for name, value in result["machine"].items())
    what = (
        "Medians of one run in which everybody took turns, float32; training is forward and backward; of the ratio, in "
        "brackets, both quartiles"
    )
    return f"{beside_peers([Row(**row) for row in result['rows']])}\n{what}: {made_by}.\n"


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
        f"{new[key] / old[key]:6.2f}x  {old[key]:10.2f} -> {new[key]:10.2f} ms  "
        + ", ".join([readable(key[0]), *key[1:]])
        for key in both
    )


TRAINED = ("flow_norm", "gaussian_gather", "pattern_route")  # of the ten lines of `quick_table`


def quick_table(out: Path, seconds: float = 0.2) -> str:
    """For the demo: one small case an op, ten lines of them in Markdown, and all in ``kernels.md`` of the folder."""
    rows = measure_all(quick_cases(), seconds=seconds)
    page = out / "kernels.md"
    page.write_text(markdown(rows), encoding="utf-8")
    few = [row for row in rows if row.mode == "forward" or row.op in TRAINED]
    said = (
        "One small case of each op, beside the fastest of what one could use instead. *training*: forward and backward "
        "together; *ratio*: their time over ours, the median of runs in turns and, in brackets, both quartiles. "
        f"Every contender, with errors and memory: [{page.name}]({page.name})."
    )
    return f"{beside_peers(few)}\n{said}"
