"""FlowNetwork's published helpers for training: dummy data and a loop."""

import statistics
import time

import torch
from torch import Tensor, nn

from ..training.losses import language_modelling
from ..training.progress import progress_bar

REFRESH = 20  # batches between two choices of the blocks


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


def token_loss(model: nn.Module, ids: Tensor, targets: Tensor) -> tuple[Tensor, object]:
    """Mean cross-entropy and metrics: by the model's own `loss` where there is one, else from ``(logits, metrics)``."""
    if hasattr(model, "loss"):
        return model.loss(ids, targets)
    logits, metrics = model(ids)
    return language_modelling(logits, targets), metrics


def train_flow_network(
    model: nn.Module,
    train_data: list[tuple[Tensor, Tensor]],
    num_epochs: int = 5,
    lr: float = 1e-3,
    *,
    clip: float = 1.0,
    autocast_dtype: torch.dtype | None = None,
    final_density: float | None = None,
    blocks: bool = False,
    progress: bool = True,
) -> dict[str, list[float]]:
    """AdamW with gradient clipping over (ids, targets) batches; one entry an epoch in each list of the result.

    With `autocast_dtype` the model runs under autocast; float16 adds a GradScaler.

    With `final_density` the share of active connections falls linearly from 1 to it over the first half of the batches:
    of each token's connections, or with `blocks` of the patterns' blocks, which are chosen anew every 20 batches (see
    `FlowNetwork.set_density`).

    Returns ``{"loss": mean cross-entropy in nats, "pattern_entropy": mean over layers in bits, "tokens_per_second"}``.
    A loss that is not finite stops the training with ValueError, naming epoch and batch.
    """
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=autocast_dtype == torch.float16)
    history: dict[str, list[float]] = {"loss": [], "pattern_entropy": [], "tokens_per_second": []}
    model.train()
    for epoch in range(num_epochs):
        losses, entropies, tokens, start = [], [], 0, time.perf_counter()
        with progress_bar(train_data, progress, desc=f"epoch {epoch + 1}/{num_epochs}") as bar:
            for batch, (ids, targets) in enumerate(bar):
                number, total = epoch * len(train_data) + batch, num_epochs * len(train_data)
                if final_density is not None and (not blocks or number % REFRESH == 0 or number == total - 1):
                    model.set_density(1 - (1 - final_density) * min(1.0, 2 * number / total), blocks=blocks)
                ids, targets = ids.to(device), targets.to(device)
                with torch.autocast(device.type, autocast_dtype, enabled=autocast_dtype is not None):
                    loss, metrics = token_loss(model, ids, targets)
                if not loss.isfinite():
                    raise ValueError(
                        f"train_flow_network: the loss is {loss.item()} in epoch {epoch + 1}, batch {batch + 1}"
                    )
                optimizer.zero_grad(set_to_none=True)
                scaler.scale(loss).backward()
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), clip)
                scaler.step(optimizer)
                scaler.update()
                losses.append(loss.item())
                entropies.append(metrics.pattern_entropy)
                tokens += ids.numel()
                bar.set_postfix(loss=f"{losses[-1]:.3f}", tokens_per_s=f"{tokens / (time.perf_counter() - start):.0f}")
        history["loss"].append(statistics.fmean(losses))
        history["pattern_entropy"].append(torch.stack(entropies).mean().item())
        history["tokens_per_second"].append(tokens / (time.perf_counter() - start))
    return history
