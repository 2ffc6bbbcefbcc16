"""Language: bits per byte of a Dynamic Flow Network beside Transformers, at equal parameters and equal bytes.

Every model has its own best learning rate of a small grid, chosen on the first seed; the others repeat it with that.
``--corpus`` takes a part of the training bytes only, which is then seen again and again; ``--dropout``,
``--attention-dropout`` and ``--confidence-penalty`` are against that.
"""

import argparse
import statistics
import sys
from pathlib import Path

from ..runs.options import UsageError
from .cells import Study, add_flags, asked, best_cells, main, markdown, options_of, positive, spread, use_threads, where
from .rivals import KINDS, contender
from .sources import SplitText, beside, bits_by_place, calibrated, split_by_content, windows

# Of the DFN, about so many parameters with 256 bytes; the others are fitted to it.
SIZES = {
    "0.1M": dict(dim=64, layers=2), "0.3M": dict(dim=88, layers=4), "1M": dict(dim=160, layers=4),
    "2.3M": dict(dim=256, layers=4), "13M": dict(dim=512, layers=6, heads=8),
}  # fmt: skip
NAMES, MEASURED = "model/learning rate/seed", "held-out bits per byte (less is better)"


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--models", nargs="+", choices=KINDS, default=list(KINDS), help="default: all")
    parser.add_argument("--parameters", choices=SIZES, default="0.3M", help="parameters (default: 0.3M)")
    parser.add_argument("--rates", type=float, nargs="+", default=[3e-3, 6e-3, 1.2e-2], help="learning rates to try")
    parser.add_argument("--judged", type=positive, default=2**18, help="held-out bytes judged on (default: 262,144)")
    parser.add_argument("--corpus", type=positive, help="train on the first so many bytes only (default: all)")
    parser.add_argument("--evaluations", type=positive, default=12, help="points of a curve (default: 12)")
    add_flags(parser, "study-language", data=None, steps=3600, batch=16, length=256, k=16, pos_dim=8, warmup=100,
              convolution=4, weight_decay=0.01, dropout=0.0, attention_dropout=0.0, confidence_penalty=0.0,
              seed=0)  # fmt: skip


def dfn_config(arguments: argparse.Namespace) -> dict:
    return dict(vocab_size=256, k=arguments.k, pos_dim=arguments.pos_dim, **SIZES[arguments.parameters],
                block_options=dict(convolution=arguments.convolution))  # fmt: skip


def run(arguments: argparse.Namespace) -> dict:
    use_threads(arguments)
    dropouts = dict(dropout=arguments.dropout, attention_dropout=arguments.attention_dropout)
    if any(dropouts.values()) and "flownetwork" in arguments.models:
        raise UsageError("flownetwork has no dropout: name other --models")
    split = split_by_content(arguments.data)
    split = split._replace(train=split.train[: arguments.corpus])
    judged = windows(split.held_out, arguments.length, max(1, arguments.judged // arguments.length))
    study = Study("language", arguments.out, asked(arguments, "data", "models", "rates"), split.facts(judged),
                  names=NAMES, evaluations=arguments.evaluations, progress=not arguments.quiet)  # fmt: skip
    study.found.setdefault("beside", beside(split))
    config = dfn_config(arguments)

    def compute(kind: str, rate: float, seed: int) -> dict:
        options = options_of(arguments, lr=rate, seed=seed)
        build = lambda: contender(kind, config, options.length, **dropouts)  # noqa: E731
        judge = lambda model: float(bits_by_place(model, judged).mean())  # noqa: E731
        task = lambda o: SplitText(o, build, split, judge)  # noqa: E731

        def cell(folder: Path) -> dict:
            run, found = study.trained(task, options, folder)
            if len(judged) > 1:
                found["calibrated"], found["temperature"] = calibrated(run.model, judged)
            return found

        return study.cell(f"{kind}/{rate:g}/{seed}", cell)

    with study.reported(table):
        for kind in arguments.models:
            rate = study.best_rate(arguments.rates, arguments.seed, lambda r, s, kind=kind: compute(kind, r, s),
                                   most=False)  # fmt: skip
            for seed in range(arguments.seed, arguments.seed + arguments.seeds):
                compute(kind, rate, seed)
    return study.found


def table(found: dict) -> str:
    """Markdown: a row per model, best first, then what was tried, what stands beside and where it ran."""
    o, d, rows = found["options"], found["data"], []
    seen = o["steps"] * o["batch"] * o["length"]
    again = seen > d["train_bytes"]  # then the end need not be the best
    ends = {kind: best for (kind,), best in best_cells(found, most=False).items()}
    mean = {kind: sum(c["value"] for c in cells) / len(cells) for kind, (_, cells) in ends.items()}
    for kind in sorted(ends, key=mean.get):
        rate, cells = ends[kind]
        against = f"{100 * (mean[kind] / mean['dfn'] - 1):+.1f} %" if "dfn" in mean and kind != "dfn" else ""
        lowest = [spread([min(p["value"] for p in c["curve"]) for c in cells], 4)] if again else []
        rows.append([kind, f"{cells[0]['parameters']:,}", rate, str(len(cells)), spread([c["value"] for c in cells], 4),
                     against, *lowest, divided(cells), spread([c["seconds"] for c in cells], 0)])  # fmt: skip
    tried = "; ".join(
        f"{key} {c['failed'] if 'failed' in c else format(c['value'], '.4f')}" for key, c in found["cells"].items()
    )
    others = ", ".join(f"{name} {value:.3f}" for name, value in sorted(found["beside"].items(), key=lambda x: x[1]))
    head = ["model", "parameters", "learning rate", "seeds", "bits per byte", "against dfn",
            *(["best on the way"] if again else []), "logits divided", "seconds"]  # fmt: skip
    said = f"{seen / 1e6:.1f} MB, {seen / d['train_bytes']:.2f} times the training bytes"
    for name in ("dropout", "attention_dropout", "confidence_penalty", "weight_decay"):
        said += f"; {name.replace('_', ' ')} {o[name]:g}" if o.get(name) else ""
    evenly = "judged_windows" in d  # not so in studies of before 27 November 2026
    over = f"{d['judged_windows']:,} windows spread evenly over" if evenly else "the first of"
    beside_on = "the whole of the held-out text" if evenly else "the same bytes"
    return "\n\n".join([
        f"# Language, {o['parameters']} parameters",
        f"Held-out bits per byte after {o['steps']:,} steps of {o['batch']} rows of {o['length']} bytes "
        f"({said}); mean ± standard deviation of the seeds. The learning rate is the best of those tried on the first "
        "seed. Logits divided: by what suits the other half of the judged bytes best; what that saves a model loses by "
        "being too sure of itself. Less is better.",
        markdown(head, rows),
        f"On {beside_on}: {others}.",
        f"Data: {d['name']}, {d['train_bytes'] / 1e6:.1f} MB of {d['files']:,} files; judged on {d['judged_bytes']:,} "
        f"bytes, {over} {d['held_out_files']:,} other files, chosen by their content.",
        f"Tried (model/learning rate/seed): {tried}.",
        where(found),
    ]) + "\n"  # fmt: skip


def divided(cells: list[dict]) -> str:
    cells = [c for c in cells if "calibrated" in c]  # older studies have none
    if not cells:
        return "-"
    temperature = statistics.fmean(c["temperature"] for c in cells)
    return f"{spread([c['calibrated'] for c in cells], 4)} (by {temperature:.2f})"


if __name__ == "__main__":
    sys.exit(main("language"))
