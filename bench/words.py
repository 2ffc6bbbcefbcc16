"""FlowNetwork on real text: does it train, does every seed, and what do bfloat16 and int8 cost?

    python -m bench.words [--tokens 200000] [--seeds 5] [--preset compact] [--minutes 9]

The text is the sources of the Python standard library as words (10,000 of them, dfn/flownetwork/words.py), one epoch.
For every seed, in float32 and under bfloat16 autocast: the curve of the training loss and the held-out loss beside the
unigram entropy; for float32 the held-out loss after int8 quantisation, too. Results are written after every run, as
JSON, Markdown and a plot; what is there already is not run again, so a long job can be done in pieces of --minutes.
"""

import argparse
import json
import statistics
import tempfile
import time
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_model, save_model
from torch import Tensor, nn

from dfn.flownetwork import FlowNetwork, train_flow_network
from dfn.flownetwork.words import WordTokenizer, unigram_entropy
from dfn.style import INK, ORANGE, OURS, THICK, THIN, label_ends, picture
from dfn.training.text import load_corpus

from .report import machine

LENGTH, BATCH = 128, 8
WINDOW = 10  # batches that one point of a curve averages
DTYPES = {"float32": None, "bfloat16 autocast": torch.bfloat16}


def batches(ids: Tensor) -> list[tuple[Tensor, Tensor]]:
    n = (len(ids) - 1) // (LENGTH * BATCH) * LENGTH * BATCH
    inputs, targets = ids[:n].view(-1, BATCH, LENGTH), ids[1 : n + 1].view(-1, BATCH, LENGTH)
    return list(zip(inputs, targets, strict=True))


def word_data(tokens: int) -> tuple[list, list, float]:
    """Batches to train on, held-out ones, and the unigram entropy of the held-out targets in nats."""
    corpus = load_corpus()
    train_text, held_text = (bytes(t.numpy()).decode(errors="replace") for t in (corpus.train, corpus.held_out))
    tokenizer = WordTokenizer.from_text(train_text, 10_000)
    # Pages from all over the library, not its first files only.
    ids = tokenizer.encode(train_text)
    pages = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)
    order = torch.randperm(len(pages), generator=torch.Generator().manual_seed(0))
    train = batches(pages[order].flatten()[:tokens])
    held = batches(tokenizer.encode(held_text)[: tokens // 8])
    return train, held, unigram_entropy(torch.cat([targets.flatten() for _, targets in held]))


@torch.inference_mode()
def held_out_loss(model: nn.Module, data: list[tuple[Tensor, Tensor]]) -> float:
    model.eval()
    losses = [F.cross_entropy(model(ids)[0].flatten(0, 1), targets.flatten()).item() for ids, targets in data]
    return statistics.fmean(losses)


def train_once(preset: str, seed: int, dtype: torch.dtype | None, train: list, held: list) -> tuple[FlowNetwork, dict]:
    torch.manual_seed(seed)
    model = FlowNetwork.from_preset(preset)
    losses, loss = [], model.loss

    def recorded(ids: Tensor, targets: Tensor):
        value, metrics = loss(ids, targets)
        losses.append(value.item())
        return value, metrics

    model.loss = recorded
    train_flow_network(model, train, 1, autocast_dtype=dtype)
    del model.loss
    curve = [statistics.fmean(losses[i : i + WINDOW]) for i in range(0, len(losses) - WINDOW + 1, WINDOW)]
    return model, {"curve": curve, "held-out loss": held_out_loss(model, held)}


def quantized_loss(model: FlowNetwork, held: list) -> float:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch points to torchao; the page's call is this one
        small = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    return held_out_loss(small, held)


# ---- what came out --------------------------------------------------------------------------------------------------
def verdict(facts: dict) -> dict[str, object]:
    rows = facts["rows"]
    curves = {d: torch.tensor([r["curve"] for r in rows if r["dtype"] == d]) for d in DTYPES}
    floor, answers = facts["unigram entropy"], {}
    answers["runs"] = len(rows)
    answers["largest held-out loss"] = max(r["held-out loss"] for r in rows)
    answers["all held-out losses below the unigram entropy"] = answers["largest held-out loss"] < floor
    full, half = curves.values()
    if full.shape == half.shape:
        late = slice(full.shape[1] // 5, None)  # the first fifth falls too fast for a spread to mean much
        spread = (full.amax(0) - full.amin(0))[late]
        answers["mean distance of the mean curves, bfloat16 - float32"] = (half - full).mean(0)[late].mean().item()
        answers["mean spread of float32 over the seeds"] = spread.mean().item()
        inside = (half.mean(0) >= full.amin(0)) & (half.mean(0) <= full.amax(0))
        answers["share of the bfloat16 mean curve inside the float32 seeds"] = inside[late].double().mean().item()
    small = [r["held-out loss, int8"] / r["held-out loss"] - 1 for r in rows if "held-out loss, int8" in r]
    if small:
        answers["largest relative change by int8"] = max(small, key=abs)
    return answers


def write(facts: dict, path: Path) -> None:
    facts["verdict"] = verdict(facts)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(facts, indent=1) + "\n")
    made_by = ", ".join(f"{name} {value}" for name, value in facts["machine"].items())
    lines = [
        "# FlowNetwork on words", "", made_by, "",
        f"Preset {facts['preset']}, one epoch of {facts['tokens']:,} words of the Python standard library's sources, "
        f"batches of {BATCH} x {LENGTH}. Losses in nats per word; the held-out words' unigram entropy is "
        f"{facts['unigram entropy']:.3f}.", "",
        "| dtype | seed | last training loss | held-out loss | the same in int8 |", "|---" * 5 + "|",
    ]  # fmt: skip
    for r in facts["rows"]:
        small = r.get("held-out loss, int8")
        lines.append(f"| {r['dtype']} | {r['seed']} | {r['curve'][-1]:.3f} | {r['held-out loss']:.3f} | "
                     f"{'' if small is None else format(small, '.3f')} |")  # fmt: skip
    lines += ["", *(f"- {name}: {value:.4g}" if isinstance(value, float) else f"- {name}: {value}"
                    for name, value in facts["verdict"].items())]  # fmt: skip
    path.with_suffix(".md").write_text("\n".join(lines) + "\n")


def plot(facts: dict, path: Path) -> None:
    title, note = f"FlowNetwork ({facts['preset']}) learns words, in float32 and in bfloat16", "Less is better"
    with picture(path, 9, 4.6, title, note) as figure:
        axis = figure.add_subplot()
        axis.grid()
        lines = []
        for dtype, color, width in zip(DTYPES, (OURS, ORANGE), (THICK, THIN / 2), strict=True):
            curves = [row["curve"] for row in facts["rows"] if row["dtype"] == dtype]
            for curve in curves:
                words = [(i + 0.5) * WINDOW * BATCH * LENGTH / 1e3 for i in range(len(curve))]
                (line,) = axis.plot(words, curve, color=color, lw=width)
            lines += [(line, f"{dtype},\n{len(curves)} seeds")] * bool(curves)
        floor = axis.axhline(facts["unigram entropy"], color=INK, lw=1.2, ls=(0, (5, 4)))
        axis.set(xlabel="thousand words seen", ylabel="training loss, nats per word")
        axis.set_xlim(0, axis.get_xlim()[1])
        label_ends(axis, [*lines, (floor, "what word counts\nalone give")])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.words", description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=200_000, help="training tokens in the epoch")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--preset", default="compact")
    parser.add_argument("--minutes", type=float, default=1e9, help="no run is begun after so long")
    parser.add_argument("--models", type=Path, default=Path(tempfile.gettempdir()) / "dfn-words", help="trained models")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "flownetwork-words.json")
    given = parser.parse_args()
    start = time.monotonic()
    train, held, floor = word_data(given.tokens)
    print(f"{len(train)} batches of {BATCH} x {LENGTH}; unigram entropy of the held-out words {floor:.3f} nats")
    facts = {"machine": machine(), "preset": given.preset, "tokens": given.tokens, "unigram entropy": floor}
    old = json.loads(given.out.read_text()) if given.out.exists() else {"rows": []}
    same = all(old.get(name) == facts[name] for name in ("preset", "tokens"))
    facts["rows"] = old["rows"] if same else []
    done = {(row["dtype"], row["seed"]) for row in facts["rows"]}
    given.models.mkdir(parents=True, exist_ok=True)
    for seed in range(given.seeds):
        for name, dtype in DTYPES.items():
            if (name, seed) in done or time.monotonic() - start > given.minutes * 60:
                continue
            model, row = train_once(given.preset, seed, dtype, train, held)
            if dtype is None:
                save_model(model, given.models / f"{given.preset}-{given.tokens}-{seed}.safetensors")
            facts["rows"].append({"dtype": name, "seed": seed, **row})
            write(facts, given.out)
            print({k: v for k, v in facts["rows"][-1].items() if k != "curve"}, flush=True)
    for row in facts["rows"]:
        path = given.models / f"{given.preset}-{given.tokens}-{row['seed']}.safetensors"
        if row["dtype"] == "float32" and "held-out loss, int8" not in row and path.exists():
            if time.monotonic() - start < given.minutes * 60:
                model = FlowNetwork.from_preset(given.preset)
                load_model(model, path)
                row["held-out loss, int8"] = quantized_loss(model, held)
    write(facts, given.out)
    plot(facts, given.out.with_suffix(".png"))
    print(given.out.with_suffix(".md").read_text())


if __name__ == "__main__":
    main()
