"""The table of the published FlowNetwork page, measured: beside the naive einsum network and a Transformer."""

import io
import json
import statistics
import subprocess
import sys
import time
import warnings

import torch
from torch import Tensor, nn

from ..training.memory import peak_growth
from ..training.progress import progress_bar
from .layers import FlowLayer
from .model import PRESETS, FlowNetwork
from .training import create_dummy_data, token_loss, train_flow_network

# What the published page says of its own network. It does not name the machine, so the columns cannot be compared as
# implementations; they stand side by side so that nobody has to guess which is which.
PAGE = {
    "inference tokens/s": 4187, "training tokens/s": 3455, "peak memory of a step, MB": 3340,
    "parameters": 6.0e6, "size, MB": 22.9, "parameter reduction": 0.991,
}  # fmt: skip

NAIVE_BYTES = 2**30  # of per-token matrices at a time
SECONDS = 1.0  # about so long one figure is measured


class NaiveFlowLayer(nn.Module):
    """A FlowLayer as published: two einsums with each token's mixed matrix, ``[.., O, I]``, between them."""

    def __init__(self, layer: FlowLayer):
        super().__init__()
        self.router, self.bias, self.norm = layer.router, layer.bias, layer.norm

    def forward(self, x: Tensor):
        matrix, metrics = self.router(x)
        return self.norm(torch.einsum("...oi,...i->...o", matrix, x.to(matrix.dtype)) + self.bias), metrics


class NaiveFlowNetwork(nn.Module):
    """A FlowNetwork of naive layers; logits and loss as published, too."""

    def __init__(self, network: FlowNetwork):
        super().__init__()
        network.input_layer, network.output_layer = (
            NaiveFlowLayer(layer) for layer in (network.input_layer, network.output_layer)
        )
        network.layers = nn.ModuleList(map(NaiveFlowLayer, network.layers))
        self.network = network

    def forward(self, ids: Tensor):
        return self.network(ids)

    def bytes_per_token(self) -> int:
        """Of the mixed matrices of all layers, which a training step keeps."""
        layers = (m.router for m in self.network.modules() if isinstance(m, NaiveFlowLayer))
        return sum(4 * router.output_dim * router.input_dim for router in layers)


class Transformer(nn.Module):
    """A plain pre-norm Transformer with a tied output."""

    def __init__(self, vocab_size: int, d_model: int, num_layers: int, max_seq_len: int):
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, d_model)
        nn.init.normal_(self.embedding.weight, std=d_model**-0.5)
        self.places = nn.Embedding(max_seq_len, d_model)
        layer = nn.TransformerEncoderLayer(
            d_model, max(1, d_model // 64), 4 * d_model, 0.0, "gelu", batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, num_layers, enable_nested_tensor=False)

    def forward(self, ids: Tensor) -> tuple[Tensor, None]:
        N = ids.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(N, device=ids.device)
        h = self.embedding(ids) + self.places(torch.arange(N, device=ids.device))
        return self.encoder(h, mask, is_causal=True) @ self.embedding.weight.T, None


def build(kind: str, arguments: dict) -> nn.Module:
    """kind: "flow_network", "naive" or "transformer", all of the same sizes."""
    torch.manual_seed(0)
    if kind == "transformer":
        return Transformer(*(arguments[name] for name in ("vocab_size", "d_model", "num_layers", "max_seq_len")))
    network = FlowNetwork(**arguments)
    return network if kind == "flow_network" else NaiveFlowNetwork(network)


# ---- measuring ------------------------------------------------------------------------------------------------------
def _seconds(run) -> float:
    """Median time of single runs after a warm-up."""
    run()
    times: list[float] = []
    while len(times) < 3 or sum(times) < SECONDS:
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def stepper(model: nn.Module, data: tuple[Tensor, Tensor], dtype: torch.dtype | None):
    """A function that makes one training step: forward, backward, clipping, AdamW."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            loss, _ = token_loss(model, *data)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return step


def peak_of_two_steps(kind: str, arguments: dict, batch_size: int, seq_len: int, dtype: str | None) -> float | None:
    """Growth of this process's peak resident set in MB of 2^20 bytes, gradients and optimiser state included."""

    model = build(kind, arguments)
    data = create_dummy_data(arguments["vocab_size"], seq_len, batch_size, 2)

    def two_steps() -> None:
        step = stepper(model, data[0], None if dtype is None else getattr(torch, dtype))
        step()
        step()

    return peak_growth(two_steps)


def _peak_elsewhere(*arguments) -> float | None:
    """`peak_of_two_steps` in a process that does only this."""
    code = f"import json, sys; from {__name__} import peak_of_two_steps as f; print(f(*json.loads(sys.argv[1])))"
    done = subprocess.run([sys.executable, "-c", code, json.dumps(arguments)], capture_output=True, text=True)
    answer = done.stdout.split()
    return float(answer[-1]) if done.returncode == 0 and answer and answer[-1] != "None" else None


def _forward_seconds(model: nn.Module, ids: Tensor, dtype: torch.dtype | None = None) -> float:
    def run() -> None:
        with torch.inference_mode(), torch.autocast("cpu", dtype, enabled=dtype is not None):
            model(ids)

    return _seconds(run)


def _column(kind: str, arguments: dict, batch_size: int, seq_len: int, dtype: torch.dtype | None) -> dict[str, float]:
    model = build(kind, arguments).eval()
    if kind == "naive":  # as many tokens as fit
        fitting = max(1, NAIVE_BYTES // model.bytes_per_token())
        batch_size, seq_len = max(1, min(batch_size, fitting // seq_len)), min(seq_len, fitting)
    data = create_dummy_data(arguments["vocab_size"], seq_len, batch_size, 1)[0]
    tokens = data[0].numel()
    forward = _forward_seconds(model, data[0])
    column = {"tokens at a time": tokens, "inference ms": forward * 1e3, "inference tokens/s": tokens / forward}
    if dtype is not None and kind != "naive":  # its float32 matrices are what it is about
        column["inference tokens/s, autocast"] = tokens / _forward_seconds(model, data[0], dtype)
    if kind == "flow_network":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch points to torchao; the page's call is this one
            small = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
        column["inference tokens/s, int8"] = tokens / _forward_seconds(small, data[0])
    column["training tokens/s"] = tokens / _seconds(stepper(model, data, dtype))
    name = None if dtype is None else str(dtype).removeprefix("torch.")
    peak = _peak_elsewhere(kind, arguments, batch_size, seq_len, name)
    if peak is not None:
        column["peak memory of a step, MB"] = peak
    column["parameters"] = sum(p.numel() for p in model.parameters())
    column["size, MB"] = sum(p.numel() * p.element_size() for p in model.parameters()) / 2**20
    return column


def benchmark_flow_network(
    vocab_size: int = 10000,
    d_model: int = 512,
    num_layers: int = 6,
    *,
    preset: str | None = None,
    batch_size: int = 8,
    seq_len: int = 128,
    autocast_dtype: torch.dtype | None = torch.bfloat16,
    lengths: tuple[int, ...] = (128, 512, 2048, 8192),
    progress: bool = True,
) -> dict[str, object]:
    """Measures the figures of the published page on this CPU and prints them beside the page's claims.

    The network is ``FlowNetwork(vocab_size, d_model, num_layers)``, or a preset. Inference in float32, under
    `autocast_dtype` and quantised; training steps (forward, backward, clipping, AdamW) under `autocast_dtype`; peak
    memory is what two such steps add to the resident set of a process of their own. Beside it the same network by the
    published einsums, which build every token's matrix (with as many tokens at a time as 1 GB of these allows), and a
    Transformer of the same width, depth and vocabulary.

    Returns a dict: "flow_network", "naive", "transformer" (dicts: tokens/s, milliseconds, memory, parameters),
    "pattern_entropy", "max_entropy", "final_loss" (after 10 batches of noise), "load_seconds",
    "parameter_reduction" against generating full matrices, "milliseconds_per_length" and "page" (the page's claims,
    whose machine it does not name).
    """
    given = {"vocab_size": vocab_size, "d_model": d_model, "num_layers": num_layers}
    arguments = {**(PRESETS[preset] if preset else given), "max_seq_len": max(seq_len, *lengths)}
    kinds = ("flow_network", "naive", "transformer")
    results: dict[str, object] = {"batch_size": batch_size, "seq_len": seq_len, "page": dict(PAGE)}
    with progress_bar(total=2 + len(kinds) + len(lengths), on=progress) as bar:

        def begin(part: str) -> None:
            bar.set_description(part)
            bar.update()

        for kind in kinds:
            begin(kind.replace("_", " "))
            results[kind] = _column(kind, arguments, batch_size, seq_len, autocast_dtype)
        model = build("flow_network", arguments)
        results["parameter_reduction"] = model.parameter_reduction()["reduction"]
        results["milliseconds_per_length"] = {}
        for length in lengths:
            begin(f"length {length}")
            ids = create_dummy_data(arguments["vocab_size"], length, 1, 1)[0][0]
            results["milliseconds_per_length"][length] = 1e3 * _forward_seconds(model, ids)
        begin("loading")
        results["load_seconds"] = _load_seconds(model, arguments)
        begin("noise")
        noise = create_dummy_data(arguments["vocab_size"], seq_len, batch_size, 10)
        with torch.no_grad():
            summary = model(noise[0][0])[1].summary()
        results |= {"pattern_entropy": summary["entropy"], "max_entropy": summary["max_entropy"]}
        history = train_flow_network(model, noise, 1, progress=False, autocast_dtype=autocast_dtype)
        results["final_loss"] = history["loss"][-1]
    print(table(results))
    return results


def _load_seconds(model: FlowNetwork, arguments: dict) -> float:
    saved = io.BytesIO()
    torch.save(model.state_dict(), saved)

    def load() -> None:
        saved.seek(0)
        build("flow_network", arguments).load_state_dict(torch.load(saved, weights_only=True))

    return _seconds(load)


# ---- showing --------------------------------------------------------------------------------------------------------
def table(results: dict) -> str:
    """The results as a Markdown table and a few lines below it."""
    page, columns = results["page"], [results[kind] for kind in ("flow_network", "naive", "transformer")]
    lines = ["| | FlowNetwork, here | naive einsums, here | Transformer, here | the page's claim |", "|---" * 5 + "|"]
    for name in columns[0]:
        cells = [f"{column[name]:,.1f}".removesuffix(".0") if name in column else "" for column in columns]
        claim = f"{page[name]:,.1f}".removesuffix(".0") if name in page else ""
        lines.append(f"| {name} | {' | '.join(cells)} | {claim} |")
    here, claim = f"-{results['parameter_reduction']:.2%}", f"-{page['parameter reduction']:.1%}"
    lines.append(f"| parameters against generated full matrices | {here} | | | {claim} |")
    by_length = results["milliseconds_per_length"].items()
    speedup = columns[0]["inference tokens/s"] / columns[1]["inference tokens/s"]
    return "\n".join([
        *lines, "",
        f"Sequences of {results['seq_len']} tokens, batch {results['batch_size']}; per token {speedup:.1f}x the speed "
        "of the naive network, which was measured with as many tokens at a time as 1 GB of its matrices allows.",
        f"Pattern entropy {results['pattern_entropy']:.3f} of at most {results['max_entropy']:.3f} bits; loss after "
        f"10 batches of noise {results['final_loss']:.3f}; loading takes {results['load_seconds'] * 1e3:.0f} ms.",
        "Milliseconds by length, batch 1: " + ", ".join(f"{n}: {ms:.1f}" for n, ms in by_length) + ".",
        "The page does not name its machine; its column is its own claim.",
    ])  # fmt: skip
