"""FlowNetwork's published helpers: dummy data, a training loop, and the page's table measured."""

import math
import statistics
import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

# What the published page says of its own network. It does not name the machine, so the two columns cannot be compared
# as implementations; they stand side by side so that nobody has to guess which is which.
PAGE = {
    "inference tokens/s": 4187, "training tokens/s": 3455, "peak memory MB": 3340,
    "parameters": 6.0e6, "size MB": 22.9, "parameter reduction": 0.991,
}  # fmt: skip


def create_dummy_data(
    vocab_size: int, seq_len: int, batch_size: int, num_batches: int, *, seed: int = 0
) -> list[tuple[Tensor, Tensor]]:
    """num_batches pairs ``(ids, targets)``, int64 ``[batch_size, seq_len]``; targets are the ids one step ahead.

    The ids are uniformly random: no model can learn more of them than that. Good for timing, not for learning.
    """
    generator = torch.Generator().manual_seed(seed)
    data = []
    for _ in range(num_batches):
        ids = torch.randint(vocab_size, (batch_size, seq_len + 1), generator=generator)
        data.append((ids[:, :-1].contiguous(), ids[:, 1:].contiguous()))
    return data


def train_flow_network(
    model: nn.Module,
    train_data: list[tuple[Tensor, Tensor]],
    num_epochs: int = 5,
    lr: float = 1e-3,
    *,
    clip: float = 1.0,
    autocast_dtype: torch.dtype | None = None,
    final_density: float | None = None,
    progress: bool = True,
) -> dict[str, list[float]]:
    """AdamW with gradient clipping over (ids, targets) batches; one entry an epoch in each list of the result.

    With `final_density` the share of active connections falls linearly from 1 to it over the first half of the batches.

    Returns ``{"loss": mean cross-entropy in nats, "pattern_entropy": mean over layers in bits, "tokens_per_second"}``.
    A loss that is not finite stops the training with ValueError, naming epoch and batch.
    """
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    history: dict[str, list[float]] = {"loss": [], "pattern_entropy": [], "tokens_per_second": []}
    model.train()
    for epoch in range(num_epochs):
        losses, entropies, tokens, start = [], [], 0, time.perf_counter()
        with tqdm(train_data, desc=f"epoch {epoch + 1}/{num_epochs}", disable=not progress, leave=False) as bar:
            for batch, (ids, targets) in enumerate(bar):
                if final_density is not None:
                    done = (epoch * len(train_data) + batch) / (num_epochs * len(train_data))
                    model.set_density(1 - (1 - final_density) * min(1.0, 2 * done))
                ids, targets = ids.to(device), targets.to(device)
                with torch.autocast(device.type, autocast_dtype, enabled=autocast_dtype is not None):
                    logits, metrics = model(ids)
                    loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), clip)
                if not loss.isfinite():
                    raise ValueError(
                        f"train_flow_network: the loss is {loss.item()} in epoch {epoch + 1}, batch {batch + 1}"
                    )
                optimizer.step()
                losses.append(loss.item())
                entropies.append(metrics.pattern_entropy)
                tokens += ids.numel()
                bar.set_postfix(loss=f"{losses[-1]:.3f}", tokens_per_s=f"{tokens / (time.perf_counter() - start):.0f}")
        history["loss"].append(statistics.fmean(losses))
        history["pattern_entropy"].append(torch.stack(entropies).mean().item())
        history["tokens_per_second"].append(tokens / (time.perf_counter() - start))
    return history


class _Transformer(nn.Module):
    """A plain pre-norm Transformer of the same width and depth, for the table."""

    def __init__(self, vocab_size: int, d_model: int, num_layers: int, max_seq_len: int):
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, d_model)
        self.places = nn.Embedding(max_seq_len, d_model)
        layer = nn.TransformerEncoderLayer(
            d_model, max(1, d_model // 64), 4 * d_model, 0.0, "gelu", batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, num_layers, enable_nested_tensor=False)

    def forward(self, ids: Tensor) -> tuple[Tensor, None]:
        N = ids.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(N, device=ids.device)
        h = self.embedding(ids) + self.places.weight[:N]
        return self.encoder(h, mask, is_causal=True) @ self.embedding.weight.T, None


def _seconds(run, budget: float = 1.0) -> float:
    """Median time of single runs after a warm-up."""
    run()
    times: list[float] = []
    while len(times) < 3 or sum(times) < budget:
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _forward_seconds(model: nn.Module, vocab_size: int, length: int) -> float:
    ((ids, _),) = create_dummy_data(vocab_size, length, 1, 1)
    with torch.inference_mode():
        return _seconds(lambda: model(ids), 0.3)


def _step(
    model: nn.Module, optimizer: torch.optim.Optimizer, ids: Tensor, targets: Tensor, dtype: torch.dtype | None
) -> None:
    with torch.autocast(ids.device.type, dtype, enabled=dtype is not None):
        logits, _ = model(ids)
        loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


def _speed(model: nn.Module, ids: Tensor, targets: Tensor, dtype: torch.dtype | None) -> dict[str, float]:
    from bench.measure import peak_growth_mib

    model.eval()
    with torch.inference_mode():
        forward = _seconds(lambda: model(ids))
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    step = _seconds(lambda: _step(model, optimizer, ids, targets, dtype))
    grown = peak_growth_mib(lambda: _step(model, optimizer, ids, targets, dtype), ids.device.type)
    return {
        "inference ms": forward * 1e3, "inference tokens/s": ids.numel() / forward,
        "training tokens/s": ids.numel() / step, "step's growth of memory MB": math.nan if grown is None else grown,
        "parameters": sum(p.numel() for p in model.parameters()),
        "size MB": sum(p.numel() * p.element_size() for p in model.parameters()) / 2**20,
    }  # fmt: skip


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
) -> dict[str, object]:
    """Measures the figures of the published page, here and now, and prints them beside the page's claims.

    The network is ``FlowNetwork(vocab_size, d_model, num_layers)``, or a preset. Inference in float32, training steps
    (forward, backward, clipping, AdamW) under `autocast_dtype`. Beside it a Transformer of the same width and depth,
    and one hidden layer by the published einsums, which build every token's matrix.

    Returns a dict: "flow_network", "transformer" (tokens/s, milliseconds, memory, parameters), "pattern_entropy",
    "max_entropy", "final_loss", "load_seconds", "parameter_reduction", "hidden_layer_speedup" over the einsums,
    "milliseconds_per_length" and "page" (the page's claims, whose machine it does not name).
    """
    import io

    from .flownetwork import PRESETS, FlowNetwork

    arguments = {"vocab_size": vocab_size, "d_model": d_model, "num_layers": num_layers}
    longest = max(seq_len, *lengths)

    def build() -> FlowNetwork:
        return FlowNetwork(**{**(PRESETS[preset] if preset else arguments), "max_seq_len": longest})

    torch.manual_seed(0)
    model = build()
    vocab_size, d_model = model.embedding.weight.shape
    ((ids, targets),) = create_dummy_data(vocab_size, seq_len, batch_size, 1)
    results: dict[str, object] = {"page": dict(PAGE)}

    with torch.inference_mode():
        _, metrics = model(ids)
    results |= {"pattern_entropy": metrics.summary()["entropy"], "max_entropy": metrics.summary()["max_entropy"]}
    results["parameter_reduction"] = model.parameter_reduction()["reduction"]
    results["milliseconds_per_length"] = {n: 1e3 * _forward_seconds(model, vocab_size, n) for n in lengths}

    layer = model.layers[0].router
    x = torch.randn(min(ids.numel(), 64), d_model)
    with torch.inference_mode():
        naive = _seconds(lambda: torch.einsum("toi,ti->to", layer(x)[0], x), 0.3)
        results["hidden_layer_speedup"] = naive / _seconds(lambda: layer.route(x), 0.3)

    saved = io.BytesIO()
    torch.save(model.state_dict(), saved)

    def load() -> None:
        saved.seek(0)
        build().load_state_dict(torch.load(saved, weights_only=True))

    results["load_seconds"] = _seconds(load, 0.1)
    results["flow_network"] = _speed(model, ids, targets, autocast_dtype)
    noise = create_dummy_data(vocab_size, seq_len, batch_size, 10)
    history = train_flow_network(model, noise, 1, progress=False, autocast_dtype=autocast_dtype)
    results["final_loss"] = history["loss"][-1]
    results["transformer"] = _speed(
        _Transformer(vocab_size, d_model, num_layers, longest), ids, targets, autocast_dtype
    )
    _print(results)
    return results


def _print(results: dict) -> None:
    ours, theirs, page = results["flow_network"], results["transformer"], results["page"]
    print(f"{'':28}{'measured here':>16}{'Transformer here':>18}{'page (claim)':>15}")
    for name in ours:
        claim = page.get(name, page.get("peak memory MB") if "memory" in name else None)
        print(f"{name:28}{ours[name]:16,.1f}{theirs[name]:18,.1f}{'' if claim is None else format(claim, ',.1f'):>15}")
    print(f"{'parameter reduction':28}{results['parameter_reduction']:16.2%}{'':18}{page['parameter reduction']:15.1%}")
    print(f"pattern entropy {results['pattern_entropy']:.3f} of at most {results['max_entropy']:.3f} bits, "
          f"loss after 10 batches of noise {results['final_loss']:.3f}, load {results['load_seconds'] * 1e3:.0f} ms, "
          f"hidden layer {results['hidden_layer_speedup']:.1f}x faster than the published einsums")  # fmt: skip
    print(
        "milliseconds by length: " + ", ".join(f"{n}: {ms:.1f}" for n, ms in results["milliseconds_per_length"].items())
    )
    print("The page does not name its machine; its column is its own claim.")
