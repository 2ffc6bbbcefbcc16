"""python -m bench.h200 FILE: the rows of the package's first run on a GPU, as a result and in docs/benchmarks.md.

FILE is the log of that run: one JSON object with the machine's facts and a flat list of rows, each naming its work
under "knn", "gather", "route", .. and its peers under "peer". Times are medians in milliseconds, the L2 cache
overwritten before each run; "graph" is a replay from a CUDA graph. Written: bench/results/<date>-<gpu>-<commit>.json,
facts and rows as they came, and .md, ours beside the best peer, which also goes between the gpu marks of that page.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .report import put_between

HERE = Path(__file__).parent
MARKS = ("<!-- gpu:begin -->", "<!-- gpu:end -->")


@dataclass
class Pair:
    """A line of the table: what was done, where our time stands in the rows, and the peer's: kind, name, column."""

    work: str
    ours: tuple[str, str, str]
    peer: str  # in words
    theirs: tuple[str, str, str]


def _peer(name: str, column: str = "fwd") -> tuple[str, str, str]:
    return "peer", name, column


PAIRS = (
    Pair("search, 1M points in the plane, 16 nearest", ("knn", "N=1000000 D=2 k=16", "eager"),
         "CuPy KDTree", _peer("CuPy KDTree 1M, 2", "ms")),
    Pair("search, 1M points in space, 16 nearest", ("knn", "N=1000000 D=3 k=16", "eager"),
         "CuPy KDTree", _peer("CuPy KDTree 1M, 3", "ms")),
    Pair("search, 32,768 points in space, 16 nearest", ("knn", "N=32768 D=3 k=16", "eager"),
         "cdist + topk", _peer("cdist+topk 32k", "ms")),
    Pair("gather, 1M points, 256 channels, bfloat16", ("gather", "N=1000000 c=256 torch.bfloat16", "fwd"),
         "embedding_bag", _peer("embedding_bag N=1000000 c=256 torch.bfloat16")),
    Pair("gather, 262,144 points, 256 channels, float32, with gradients",
         ("gather", "N=262144 c=256 torch.float32", "both"),
         "embedding_bag, gradient of the values", _peer("embedding_bag both N=262144 c=256 torch.float32", "both")),
    Pair("attention, 32,768 entities, 4 heads, 256 channels, bfloat16", ("attention", "N=32768", "fwd"),
         "cuDNN SDPA", _peer("SDPA causal bf16 N=32768")),
    Pair("attention, 131,072 entities", ("attention", "N=131072", "fwd"),
         "cuDNN SDPA", _peer("SDPA causal bf16 N=131072")),
    Pair("attention, 131,072 entities, with gradients", ("attention", "N=131072", "both"),
         "cuDNN SDPA", _peer("SDPA causal bf16 N=131072", "both")),
    Pair("routing, 8,192 tokens, 8 patterns of 512 x 512, bfloat16", ("route", "native T=8192 P=8 512->512", "fwd"),
         "prescaled GEMM", _peer("prescaled GEMM T=8192 P=8 512->512")),
    Pair("routing, 65,536 tokens, 16 patterns of 768 x 768", ("route", "native T=65536 P=16 768->768", "fwd"),
         "prescaled GEMM", _peer("prescaled GEMM T=65536 P=16 768->768")),
    Pair("routing, 65,536 tokens, with gradients", ("route", "native T=65536 P=16 768->768", "both"),
         "prescaled GEMM", _peer("prescaled GEMM T=65536 P=16 768->768", "both")),
    Pair("routing to a vocabulary of 10,000, with gradients", ("route", "native T=1024 P=8 512->10000", "both"),
         "prescaled GEMM", _peer("prescaled GEMM T=1024 P=8 512->10000", "both")),
    Pair("drift, 262,144 x 256, float32", ("drift", "4x65536x256 torch.float32", "fwd"),
         "F.linear", _peer("F.linear drift")),
    Pair("norm, 262,144 x 256, float32", ("norm", "mean torch.float32", "fwd"),
         "a copy", ("norm", "copy, torch.float32", "ms")),
    Pair("training step, 0.47M parameters, 32 x 256 bytes", ("whole_step", "DFN default, 32", "eager"),
         "Transformer, 0.66M", ("model", "Transformer d=128 L=3, 32", "ms")),
    Pair("training step, 0.47M parameters, 131,072 bytes", ("whole_step", "DFN default, 1", "eager"),
         "Transformer, 0.66M", ("model", "Transformer d=128 L=3, 1", "ms")),
    Pair("training step, 12.9M parameters, 4 x 8,192 bytes", ("whole_step", "DFN d=512 L=6, 4", "eager"),
         "Transformer, 19M", ("model", "Transformer d=512 L=6, 4", "ms")),
)  # fmt: skip


def named(row: dict, kind: str) -> str:
    """What a row calls its work, with what tells it from others of that name."""
    more = [str(row[key]) for key in ("D", "B", "dt") if key in row]
    return ", ".join([str(row[kind]), *more])


def time_of(rows: list[dict], where: tuple[str, str, str], absent: str | None = None) -> float | str:
    kind, name, column = where
    found = [row[column] for row in rows if kind in row and column in row and named(row, kind) == name]
    if not found:
        if absent is not None:
            return absent
        raise ValueError(f"no row {kind!r} called {name!r} has {column!r}")
    return found[0]


def markdown(log: dict) -> str:
    lines = ["| work | ours, ms | replayed from a graph | beside it, ms | their time over ours |", "|" + " --- |" * 5]
    for pair in PAIRS:
        kind, name, column = pair.ours
        ours, theirs = time_of(log["rows"], pair.ours), time_of(log["rows"], pair.theirs)
        graph = "" if column == "both" else f"{time_of(log['rows'], (kind, name, 'graph'), ''):.3}"
        lines.append(f"| {pair.work} | {ours:.3g} | {graph} | {theirs:.3g} ({pair.peer}) | {theirs / ours:.2g}x |")
    facts = ", ".join(f"{name} {log[name]}" for name in ("gpu", "date", "torch", "triton", "driver", "commit"))
    return "\n".join(lines) + f"\n\nMedians, the L2 cache overwritten before each run; {facts}.\n"


def main(argv: list[str] | None = None, say: Callable[[str], object] = print) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.h200", description=__doc__.splitlines()[0])
    parser.add_argument("log", type=Path)
    parser.add_argument("--out", type=Path, default=HERE / "results")
    parser.add_argument("--page", type=Path, default=HERE.parent / "docs" / "benchmarks.md")
    given = parser.parse_args(argv)
    log = json.loads(given.log.read_text())
    kind = "".join(ch if ch.isalnum() else "-" for ch in log["gpu"]).lower()
    path = given.out / f"{log['date']}-{kind}-{log['commit']}.json"
    given.out.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(log, indent=0) + "\n")
    path.with_suffix(".md").write_text(f"# First run on a GPU\n\n{markdown(log)}")
    put_between(given.page, MARKS, markdown(log))
    say(f"written to {path} and {given.page}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
