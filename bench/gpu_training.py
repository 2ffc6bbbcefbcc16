"""Training steps on a GPU: whole models at long lengths, and one step as one CUDA graph. Parts of the GPU suite."""

import itertools
import statistics
import time
import traceback
from collections.abc import Callable

import torch
import torch.nn.functional as F

from .gpu_profile import keep


def models(N: int, small: bool) -> dict[str, Callable[[], tuple[torch.nn.Module, int]]]:
    from dfn import DFNLanguageModel
    from dfn.flownetwork import FlowNetwork

    sizes = (300, 16, 1, 3) if small else (10_000, 512, 6, 8)
    return {
        "DFNLanguageModel": lambda: (DFNLanguageModel(), 256),
        "FlowNetwork": lambda: (FlowNetwork(*sizes, max_seq_len=N), sizes[0]),
        "FlowNetwork, mixer": lambda: (FlowNetwork(*sizes, max_seq_len=N, mixer="flow_attention"), sizes[0]),
    }


def train(device: str = "cuda", lengths: tuple[int, ...] = (32_768, 131_072), small: bool = False) -> str:
    """Training steps at long lengths: time, tokens per second, peak memory."""
    measured, wrong = [], []
    for N in lengths:
        for name, build in models(N, small).items():
            for autocast in (True, False):
                row = {"model": name, "N": N, "autocast": "bfloat16" if autocast else "off"}
                try:
                    row |= train_steps(build, N, device, autocast)
                    if not row["finite"]:
                        wrong.append(f"{name} at {N}: the loss or a gradient is not finite")
                except torch.OutOfMemoryError:
                    row["note"] = "out of memory"
                except Exception as error:
                    traceback.print_exc()
                    row["note"] = f"{type(error).__name__}: {str(error)[:120]}"
                    wrong.append(f"{name} at {N}: {row['note']}")
                print(row, flush=True)
                measured.append(row)
                keep(measured)
    if wrong:
        raise AssertionError("; ".join(wrong))
    best = {(r["model"], r["N"]): r["ms"] for r in measured if "ms" in r and r["autocast"] != "off"}
    return "ms a step in bfloat16: " + ", ".join(f"{name} {N}: {ms:.0f}" for (name, N), ms in best.items())


def train_steps(build: Callable, N: int, device: str, autocast: bool) -> dict:
    torch.manual_seed(0)
    model, vocabulary = build()
    model = model.to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    ids = torch.randint(vocabulary, (1, N + 1), device=device)
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(4):
        wait()
        start = time.perf_counter()
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            logits = model(ids[:, :-1])[0]
            loss = F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        wait()
        times.append((time.perf_counter() - start) * 1e3)
    ms = statistics.median(times[1:])  # the first step compiles
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    finite = bool(loss.isfinite()) and all(bool(g.isfinite().all()) for g in grads)
    peak = torch.cuda.max_memory_allocated() / 2**20 if device == "cuda" else None
    return {"ms": ms, "tokens_per_second": N / ms * 1e3, "peak_mib": peak, "loss": loss.item(), "finite": finite}


STEPS = {  # dim, layers, heads, rows, length
    "0.5M": (128, 3, 4, 32, 256), "13M": (512, 6, 8, 4, 8192), "0.5M, long": (128, 3, 4, 1, 131_072),
}  # fmt: skip


def whole_steps(device: str = "cuda", shapes: dict[str, tuple[int, ...]] = STEPS) -> str:
    """Training steps of language models, launched one by one and as one CUDA graph, beside Transformers as large."""
    from dfn import DFNLanguageModel
    from dfn.models.layers import count_parameters
    from dfn.studies.rivals import rival
    from dfn.training.trainer import Trainer

    rows = []
    for size, (dim, layers, heads, B, N) in shapes.items():
        parameters = count_parameters(DFNLanguageModel(dim=dim, layers=layers, heads=heads))
        build = {
            "dfn": lambda d=dim, n=layers, h=heads: DFNLanguageModel(dim=d, layers=n, heads=h),
            "transformer++": lambda p=parameters, n=N: rival("transformer++", p, n),
        }
        for name, graphed in itertools.product(build, (False, True) if device == "cuda" else (False,)):
            torch.manual_seed(0)
            model = build[name]().to(device)
            trainer = Trainer(model, steps=1000, autocast=torch.bfloat16, cuda_graph=graphed)
            ids = torch.randint(256, (B, N + 1), device=device)
            batch = ids[:, :-1], ids[:, 1:]
            times = []
            for _ in range(14):
                start = time.perf_counter()
                trainer.train_step(batch)  # waits for the loss
                times.append((time.perf_counter() - start) * 1e3)
            row = {"model": name, "size": size, "parameters": count_parameters(model), "B": B, "N": N,
                   "graph": graphed, "ms": statistics.median(times[5:])}  # fmt: skip
            rows.append(row)
            print(row, flush=True)
            keep(rows)
            del model, trainer
    return ", ".join(f"{r['model']} {r['size']}{' graph' * r['graph']}: {r['ms']:.2f} ms" for r in rows)
