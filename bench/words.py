"""FlowNetwork on real text: does it train, does every seed, and what do bfloat16 and int8 cost?

    python -m bench.words [--tokens 200000] [--seeds 5] [--preset compact]

The text is the sources of the Python standard library as words (10,000 of them, dfn/words.py). One epoch. Prints, for
every seed, the held-out loss beside the unigram entropy, in float32 and bfloat16, and the loss after int8 quantisation.
"""

import argparse
import json
import statistics
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfn.data import load_corpus
from dfn.flownetwork import FlowNetwork, train_flow_network
from dfn.words import WordTokenizer, unigram_entropy

from .report import machine

LENGTH, BATCH = 128, 8


def batches(ids: Tensor) -> list[tuple[Tensor, Tensor]]:
    n = (len(ids) - 1) // (LENGTH * BATCH) * LENGTH * BATCH
    inputs, targets = ids[:n].view(-1, BATCH, LENGTH), ids[1 : n + 1].view(-1, BATCH, LENGTH)
    return list(zip(inputs, targets, strict=True))


@torch.inference_mode()
def held_out_loss(model: nn.Module, data: list[tuple[Tensor, Tensor]]) -> float:
    model.eval()
    losses = [F.cross_entropy(model(ids)[0].flatten(0, 1), targets.flatten()).item() for ids, targets in data]
    return statistics.fmean(losses)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.words", description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=200_000, help="training tokens in the epoch")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--preset", default="compact")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "flownetwork-words.json")
    given = parser.parse_args()
    corpus = load_corpus()
    train_text, held_text = (bytes(t.numpy()).decode(errors="replace") for t in (corpus.train, corpus.held_out))
    tokenizer = WordTokenizer.from_text(train_text, 10_000)
    # Pages from all over the library, not its first files only.
    ids = tokenizer.encode(train_text)
    pages = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)
    order = torch.randperm(len(pages), generator=torch.Generator().manual_seed(0))
    train = batches(pages[order].flatten()[: given.tokens])
    held = batches(tokenizer.encode(held_text)[: given.tokens // 8])
    floor = unigram_entropy(torch.cat([targets.flatten() for _, targets in held]))
    print(f"{len(train)} batches of {BATCH} x {LENGTH}; unigram entropy of the held-out words {floor:.3f} nats")
    rows = []
    for dtype in (None, torch.bfloat16):
        for seed in range(given.seeds):
            torch.manual_seed(seed)
            model = FlowNetwork.from_preset(given.preset)
            history = train_flow_network(model, train, 1, autocast_dtype=dtype)
            row = {"dtype": "float32" if dtype is None else "bfloat16 autocast", "seed": seed,
                   "training loss": history["loss"][0], "tokens/s": history["tokens_per_second"][0],
                   "held-out loss": held_out_loss(model, held)}  # fmt: skip
            if dtype is None and seed == 0:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # torch points to torchao; the page's call is this one
                    small = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
                row["held-out loss, int8"] = held_out_loss(small, held)
            rows.append(row)
            print(", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()))
    given.out.parent.mkdir(parents=True, exist_ok=True)
    facts = {"machine": machine(), "preset": given.preset, "tokens": given.tokens, "unigram entropy": floor}
    given.out.write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
