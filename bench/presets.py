"""FlowNetwork's presets beside two Transformers, in turns: `python -m bench.presets [--only edge]`.

One has as many parameters: the good one of the studies (RoPE, RMSNorm, SwiGLU, no biases). One has the same width,
depth and vocabulary: the plain one with a tied output of `benchmark_flow_network`, which is smaller than every
full-rank preset and larger than `compact`. All do the same work on the same tokens; a ratio is of times of one round.
Writes results/<date>-presets-<threads>threads.json and .md. `python -m bench.presets page RESULT.json` puts the table
into docs/flownetwork.md.
"""

import argparse
import json
import statistics
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from dfn.flownetwork import PRESETS, create_dummy_data
from dfn.flownetwork.benchmark import build, stepper
from dfn.models.layers import count_parameters
from dfn.studies.rivals import rival

from .report import machine, put_between
from .timing import time_rounds

SIZE, SHAPE = "as many parameters", "same width and depth"
WORK = ("forward", "forward, bfloat16", "forward, int8", "training step", "training step, bfloat16")
PAGE = Path(__file__).parents[1] / "docs" / "flownetwork.md"
MARKS = ("<!-- presets:begin -->", "<!-- presets:end -->")
LARGE = 200_000_000  # parameters from which three training states do not fit beside each other


def forward(model: nn.Module, ids: Tensor, dtype: torch.dtype | None = None) -> Callable[[], object]:
    @torch.inference_mode()
    def run() -> None:
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            model(ids)

    return run


def int8(model: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch points to torchao; the page's call is this one
        return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)


def measure(preset: str, batch: int, length: int, seconds: float) -> dict:
    """Tokens a second of all, and the ratios of ours to the Transformers', with both quartiles, by work."""
    arguments = {**PRESETS[preset], "max_seq_len": length}
    ours = build("flow_network", arguments)
    vocab, parameters = arguments["vocab_size"], count_parameters(ours)
    rivals = {SIZE: rival("transformer++", parameters, length, vocab), SHAPE: build("transformer", arguments)}
    data = create_dummy_data(vocab, length, batch, 1)[0]
    models = {"ours": ours.eval(), **{who: model.eval() for who, model in rivals.items()}}
    row: dict = {"preset": preset, "parameters": parameters, "tokens": batch * length,
                 "rivals": {who: count_parameters(model) for who, model in rivals.items()}}  # fmt: skip
    for work in WORK[: 3 if parameters > LARGE else None]:
        dtype = torch.bfloat16 if "bfloat16" in work else None
        runs = {}
        for who, model in models.items():
            if work.startswith("training"):
                runs[who] = stepper(model, data, dtype)
            else:
                runs[who] = forward(int8(model) if "int8" in work and who == "ours" else model, data[0], dtype)
            runs[who]()
        times = time_rounds(runs, "cpu", seconds)
        row[work] = {"tokens/s": {who: 1e3 * batch * length / statistics.median(t) for who, t in times.items()}}
        for who in rivals:
            ratios = [b / a for a, b in zip(times["ours"], times[who], strict=False)]
            row[work][who] = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return row


def table(rows: list[dict], facts: dict) -> str:
    head = ["preset", "parameters", "work", "tokens/s", *(f"beside a Transformer, {who}" for who in (SIZE, SHAPE))]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for row in rows:
        for work in (w for w in WORK if w in row):
            found = row[work]
            cells = [row["preset"], f"{row['parameters'] / 1e6:.1f}M", work, f"{found['tokens/s']['ours']:,.0f}"]
            for who in (SIZE, SHAPE):
                low, middle, high = found[who]
                size, speed = f"{row['rivals'][who] / 1e6:.1f}M", f"{found['tokens/s'][who]:,.0f}"
                spread = f"{low:.2f}-{high:.2f}" if low < high else "one round"
                cells.append(f"{middle:.2f}x ({spread}) of {speed}, {size}")
            lines.append("| " + " | ".join(cells) + " |")
    made_by = ", ".join(f"{name} {value}" for name, value in facts.items())
    what = (
        f"{rows[0]['tokens']:,} tokens at a time, float32; medians of runs in turns, ratios with both quartiles. A "
        "ratio above 1 says that ours is faster. int8 is ours; the Transformers stay in float32"
    )
    return "\n".join(lines) + f"\n\n{what}. {made_by}.\n"


def write(path: Path) -> str:
    """The table of a result, which is written beside it."""
    result = json.loads(path.read_text())
    text = table(result["rows"], result["machine"])
    path.with_suffix(".md").write_text("# FlowNetwork's presets beside two Transformers\n\n" + text)
    return text


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["page"]:
        put_between(PAGE, MARKS, write(Path(argv[1])))
        return
    parser = argparse.ArgumentParser(prog="python -m bench.presets", description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=PRESETS, nargs="+", default=["edge", "compact", "base"],
                        help="default: edge compact base; large takes 8 GB")  # fmt: skip
    parser.add_argument("--batch", type=int, default=8, help="default: 8")
    parser.add_argument("--length", type=int, default=128, help="default: 128")
    parser.add_argument("--seconds", type=float, default=20.0, help="for each piece of work (default: 20)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    given = parser.parse_args(argv)
    facts = machine()
    rows = [measure(preset, given.batch, given.length, given.seconds) for preset in given.only]
    given.out.mkdir(parents=True, exist_ok=True)
    path = given.out / f"{facts['date']}-presets-{facts['threads']}threads.json"
    path.write_text(json.dumps({"machine": facts, "rows": rows}, indent=1) + "\n")
    print(write(path))


if __name__ == "__main__":
    main()
