"""Training: AdamW, warm-up and cosine decay, clipping, a progress bar; a loss that is not finite stops it."""

import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn


class NonFiniteLoss(RuntimeError):
    """A loss or a gradient became NaN or infinite: in which step, and where it was first seen."""

    def __init__(self, what: str, step: int, layer: str):
        super().__init__(f"{what} is not finite in step {step}; first seen in {layer}")
        self.step, self.layer = step, layer


def language_model_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Mean cross entropy of the next token, in nats. ``batch`` is (ids, targets), [B, N]; -100 does not count."""
    ids, targets = batch
    logits = model(ids)[0]
    return nn.functional.cross_entropy(logits.float().flatten(0, -2), targets.flatten())


@dataclass
class History:
    """What happened: one entry per step, and one per evaluation."""

    steps: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)  # nats
    seconds: list[float] = field(default_factory=list)  # since training began, evaluations left out
    tokens: list[int] = field(default_factory=list)  # seen so far
    evaluated: list[tuple[int, float, float]] = field(default_factory=list)  # step, seconds, what `evaluate` returned


class Trainer:
    """Trains a model for so many steps, or so many seconds, or whichever comes first.

    The step length rises over ``warmup`` steps to ``lr`` and falls along a cosine to ``final * lr`` at the end, where
    the end is counted in steps or in seconds: a run of two minutes decays fully on a slow machine, too. Matrices
    decay by ``weight_decay``; biases, gains, embeddings and the scalars of the heads do not.

    Args:
        model: what to train. loss: ``(model, batch) -> 0-d Tensor``.
        steps, seconds: the length of the run; at least one of them.
        clip: the largest norm of the gradient.
        autocast: run the forward pass under autocast to this dtype (bfloat16).

    `state_dict` and `load_state_dict` carry model, optimizer and step: with the same batches a resumed run goes on as
    if it had never stopped.
    """

    def __init__(
        self, model: nn.Module, *, loss: Callable[[nn.Module, tuple], Tensor] = language_model_loss,
        steps: int | None = None, seconds: float | None = None, lr: float = 2e-3, warmup: int = 50, final: float = 0.02,
        weight_decay: float = 0.01, betas: tuple[float, float] = (0.9, 0.99), clip: float = 1.0,
        autocast: torch.dtype | None = None,
    ):  # fmt: skip
        if steps is None and seconds is None:
            raise ValueError("Trainer: steps or seconds must be given")
        self.model, self.loss = model, loss
        self.steps, self.seconds, self.autocast = steps, seconds, autocast
        self.lr, self.warmup, self.final, self.clip = lr, warmup, final, clip
        self.step, self.elapsed = 0, 0.0
        embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag)}
        matrix = [p for p in model.parameters() if p.ndim > 1 and id(p) not in embeddings]
        other = [p for p in model.parameters() if p.ndim <= 1 or id(p) in embeddings]
        groups = [{"params": matrix, "weight_decay": weight_decay}, {"params": other, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=lr, betas=betas, fused=True)

    @property
    def progress(self) -> float:
        """The share of the run that is done, 0 to 1."""
        by_steps = self.step / self.steps if self.steps else 0.0
        by_time = self.elapsed / self.seconds if self.seconds else 0.0
        return min(1.0, max(by_steps, by_time))

    def learning_rate(self) -> float:
        decay = self.final + (1 - self.final) * 0.5 * (1 + math.cos(math.pi * self.progress))
        return self.lr * min(1.0, (self.step + 1) / self.warmup if self.warmup else 1.0) * decay

    def train_step(self, batch: tuple) -> float:
        """One step; returns the loss. Raises NonFiniteLoss before it would spoil the parameters."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        loss = self._loss(batch)
        value = loss.item()
        if not math.isfinite(value):
            raise NonFiniteLoss("the loss", self.step, self._first_bad_layer(batch) or "the loss itself")
        self.optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.clip, foreach=True)
        if not math.isfinite(norm.item()):
            named = self.model.named_parameters()
            bad = [name for name, p in named if p.grad is not None and not p.grad.isfinite().all()]
            raise NonFiniteLoss("the gradient", self.step, ", ".join(bad[:3]) or "its norm, which overflows")
        self.optimizer.step()
        self.step += 1
        return value

    def _loss(self, batch: tuple) -> Tensor:
        device = next(self.model.parameters()).device.type
        try:
            with torch.autocast(device, self.autocast or torch.bfloat16, enabled=self.autocast is not None):
                return self.loss(self.model, batch)
        except ValueError as error:  # the neighbour search refuses positions that are not finite
            layer = self._first_bad_layer(batch)
            if layer is None:
                raise
            raise NonFiniteLoss("the forward pass", self.step, layer) from error

    def _first_bad_layer(self, batch: tuple) -> str | None:
        """The name of the first parameter that is not finite, else of the first layer with such an output."""
        for name, p in self.model.named_parameters():
            if not p.isfinite().all():
                return name
        found: list[str] = []

        def look(name):
            def hook(module, inputs, output):
                tensors = output if isinstance(output, tuple | list) else [output]
                if not found and any(isinstance(t, Tensor) and not t.isfinite().all() for t in tensors):
                    found.append(name)

            return hook

        hooks = [m.register_forward_hook(look(name or "the model")) for name, m in self.model.named_modules()]
        try:
            with torch.no_grad():
                self.loss(self.model, batch)
        except ValueError:
            pass
        finally:
            for hook in hooks:
                hook.remove()
        return found[0] if found else None

    def fit(
        self,
        batches: Iterable[tuple] | Iterator[tuple],
        *,
        evaluate: Callable[[], float] | None = None,
        evaluations: int = 8,
        progress: bool = True,
    ) -> History:
        """Trains to the end, calling ``evaluate`` at ``evaluations`` evenly spaced points and at the end.

        The time that evaluating takes is not counted.
        """
        history, batches = History(), iter(batches)
        self.model.train()
        bar = _Bar(self) if progress else None
        due, tokens = 1 / evaluations if evaluations else math.inf, 0
        while self.progress < 1:
            began = time.perf_counter()
            batch = next(batches)
            value = self.train_step(batch)
            self.elapsed += time.perf_counter() - began
            tokens += batch[0].numel()
            for values, entry in ((history.steps, self.step), (history.losses, value),
                                  (history.seconds, self.elapsed), (history.tokens, tokens)):  # fmt: skip
                values.append(entry)
            if bar:
                bar.update(value, tokens)
            if evaluate and (self.progress >= due or self.progress >= 1):
                due = max(due, self.progress) + 1 / evaluations if self.progress < 1 else math.inf
                self.model.eval()
                history.evaluated.append((self.step, self.elapsed, evaluate()))
                self.model.train()
                if bar:
                    bar.held_out = history.evaluated[-1][2]
        if bar:
            bar.close()
        self.model.eval()
        return history

    def state_dict(self) -> dict:
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "step": self.step,
                "elapsed": self.elapsed}  # fmt: skip

    def load_state_dict(self, state: dict) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.elapsed = state["step"], state["elapsed"]


class _Bar:
    """A bar over steps or seconds, with the loss, smoothed, in bits, and tokens per second."""

    def __init__(self, trainer: Trainer):
        from tqdm import tqdm

        self.trainer, self.loss, self.weight, self.held_out = trainer, 0.0, 0.0, None
        interval = 0.25 if sys.stderr.isatty() else 10.0  # a log file wants few lines
        form = "{desc} {percentage:3.0f}%|{bar:24}|{postfix}"
        self.bar = tqdm(total=1000, desc="training", mininterval=interval, dynamic_ncols=True, bar_format=form)

    def update(self, value: float, tokens: int) -> None:
        t = self.trainer
        self.loss, self.weight = 0.95 * self.loss + 0.05 * value, 0.95 * self.weight + 0.05
        parts = [
            f"{t.elapsed:.0f} of {t.seconds:.0f} s" if t.seconds else f"{t.elapsed:.0f} s",
            f"step {t.step:,}" + (f" of {t.steps:,}" if t.steps else ""),
            f"{self.loss / self.weight / math.log(2):.3f} bits",
            *([f"held out {self.held_out:.3f}"] if self.held_out is not None else []),
            f"{tokens / max(t.elapsed, 1e-9):,.0f} tokens/s",
        ]
        self.bar.set_postfix_str(", ".join(parts), refresh=False)
        self.bar.update(round(1000 * t.progress) - self.bar.n)

    def close(self) -> None:
        self.bar.close()
