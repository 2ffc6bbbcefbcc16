"""Training: AdamW, warm-up and cosine decay, accumulation, clipping, a progress bar; NaN stops it."""

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from . import graphed
from .batches import map_tensors, rows, tokens_in
from .losses import language_modelling
from .progress import TrainingBar


class NonFiniteLoss(RuntimeError):
    """A loss or a gradient became NaN or infinite: in which step, and where it was first seen."""

    def __init__(self, what: str, step: int, layer: str):
        super().__init__(f"{what} is not finite in step {step}; first seen in {layer}")
        self.step, self.layer = step, layer


def language_model_loss(model: nn.Module, batch: tuple[Tensor, ...], confidence_penalty: float = 0.0) -> Tensor:
    """Mean cross entropy of the next token, in nats. ``batch`` is (ids, targets), [B, N]; -100 does not count.
    ``confidence_penalty`` as in `language_modelling`.

    A third part, int64 ``[B, S + 1]``, are the offsets of the documents of each row, as `packed_batches` gives them.
    """
    ids, targets, *ptr = batch
    if not ptr:
        return language_modelling(model(ids)[0], targets, confidence_penalty)
    B, N = ids.shape
    firsts = ptr[0][:, :-1] + torch.arange(0, B * N, N, device=ids.device)[:, None]
    sets = torch.cat([firsts.flatten(), firsts.new_full((1,), B * N)])  # of the rows one after another
    logits = model(ids.reshape(1, B * N), ptr=sets)[0]
    return language_modelling(logits, targets.reshape(1, B * N), confidence_penalty)


@dataclass
class History:
    """What happened: one entry per step, and one per evaluation."""

    steps: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)  # nats
    seconds: list[float] = field(default_factory=list)  # since training began, evaluations left out
    tokens: list[int] = field(default_factory=list)  # seen so far
    evaluated: list[tuple[int, float, float]] = field(default_factory=list)  # step, seconds, what `evaluate` returned

    def tensors(self) -> dict[str, Tensor]:
        """For a checkpoint."""
        return {name: torch.tensor(values, dtype=torch.float64) for name, values in vars(self).items()}

    @classmethod
    def of(cls, tensors: dict[str, Tensor]) -> "History":
        whole = {name: tensors[name].long().tolist() for name in ("steps", "tokens")}
        real = {name: tensors[name].tolist() for name in ("losses", "seconds")}
        return cls(**whole, **real, evaluated=[(int(n), s, x) for n, s, x in tensors["evaluated"].tolist()])


def parameter_groups(
    model: nn.Module, lr: float = 2e-3, *, weight_decay: float = 0.01, geometry_rate: float = 1.0
) -> list[dict]:
    """Groups for an optimizer such as AdamW.

    Matrices decay by ``weight_decay``; biases, gains, embeddings, positions and the scalars of the heads do not, nor do
    the parameters that a module names in ``undecayed``. The geometry of the heads (widths, step lengths, time scales,
    the receiver's offset: what modules name in ``geometry``) takes steps of ``geometry_rate * lr``: Adam moves a number
    by about lr a step, and a head whose width is to change tenfold has a long way to go.
    """
    if not 0 < geometry_rate < math.inf:
        raise ValueError(f"parameter_groups: geometry_rate must be positive and finite, got {geometry_rate}")

    def named(attribute: str) -> set[int]:
        return {id(m.get_parameter(n)) for m in model.modules() for n in getattr(m, attribute, ())}

    kept = named("undecayed") | {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag)}
    fast = set() if geometry_rate == 1 else named("geometry")
    slow = [p for p in model.parameters() if id(p) not in fast]
    groups = [
        {"params": [p for p in slow if p.ndim > 1 and id(p) not in kept], "weight_decay": weight_decay, "lr": lr},
        {"params": [p for p in slow if p.ndim <= 1 or id(p) in kept], "weight_decay": 0.0, "lr": lr},
    ]
    if fast:
        moving = [p for p in model.parameters() if id(p) in fast]
        groups.append({"params": moving, "weight_decay": 0.0, "lr": geometry_rate * lr})
    return groups


class Trainer:
    """Trains a model for so many steps, or so many seconds, or whichever comes first.

    The step length rises over ``warmup`` steps to ``lr`` and falls along a cosine to ``final * lr`` at the end, where
    the end is counted in steps or in seconds: a run of two minutes decays fully on a slow machine, too. What
    ``weight_decay`` and ``geometry_rate`` are for: `parameter_groups`.

    Args:
        model: what to train. loss: ``(model, batch) -> 0-d Tensor``, the mean over the rows of the batch.
        steps, seconds: the length of the run; at least one of them.
        accumulate: the gradient of a batch is summed up over so many equal parts of its rows, one after the other.
        clip: the largest norm of the gradient.
        autocast: run the forward pass under autocast to this dtype (bfloat16).
        partial: the loss may leave parameters without a gradient; several processes then look for them in every step.
        unit: of the loss: "bits" if it is nats that the bar is to show as bits, else the name it goes by.
        counted: what a batch is made of, as the bar calls it: "tokens", "bytes", "entities".
        cuda_graph: whether the whole step, optimizer included, is captured in one CUDA graph after three steps, so that
            the host does not hold the GPU up. "auto": on a GPU, where it can be; a line says why it cannot. True: that
            line is an error. A loss with a memory of its own between steps must say False.

    A batch is a tensor, or tuples and dicts of tensors, with the same number of rows everywhere. Where
    `torch.distributed` is initialised, every process is given the whole batch and takes its own rows of it, and
    DistributedDataParallel averages the gradients: n processes train as one does, where a loss is a mean
    over rows; in a contrastive one a process tells its own rows apart.

    `history` is that of the last call of `fit`, also where an exception ended it.

    `state_dict` and `load_state_dict` carry model, optimizer and step: with the same batches a resumed run goes on as
    if it had never stopped.
    """

    def __init__(
        self, model: nn.Module, *, loss: Callable[[nn.Module, tuple], Tensor] = language_model_loss,
        steps: int | None = None, seconds: float | None = None, lr: float = 2e-3, warmup: int = 50, final: float = 0.02,
        weight_decay: float = 0.01, geometry_rate: float = 1.0, betas: tuple[float, float] = (0.9, 0.99),
        clip: float = 1.0, accumulate: int = 1, autocast: torch.dtype | None = None, unit: str = "bits",
        counted: str = "tokens", partial: bool = True, cuda_graph: bool | Literal["auto"] = "auto",
        say: Callable[[str], object] = print,
    ):  # fmt: skip
        if steps is None and seconds is None:
            raise ValueError("Trainer: steps or seconds must be given")
        if accumulate < 1:
            raise ValueError(f"Trainer: accumulate must be at least 1, got {accumulate}")
        if seconds is not None and distributed():
            raise ValueError("Trainer: seconds must be None with several processes, whose clocks differ; give steps")
        self.model, self.loss, self.unit, self.counted = model, loss, unit, counted
        self.steps, self.seconds, self.autocast, self.accumulate = steps, seconds, autocast, accumulate
        self.lr, self.warmup, self.final, self.clip = lr, warmup, final, clip
        self.step, self.elapsed, self.history = 0, 0.0, History()
        self.device = next(model.parameters()).device
        groups = parameter_groups(model, lr, weight_decay=weight_decay, geometry_rate=geometry_rate)
        self.rates = [1.0, 1.0, geometry_rate][: len(groups)]  # times the step length
        self.rank, self.processes = (dist.get_rank(), dist.get_world_size()) if distributed() else (0, 1)
        self.graph: graphed.StepGraph | None = None
        self.warm, self.said, self.say = 0, set(), say
        self.cuda_graph = cuda_graph
        self.graphs = cuda_graph not in (False, None) and self._may_be_graphed(cuda_graph)
        for group in groups if self.graphs else ():  # a graph holds addresses, not numbers
            group["lr"] = torch.tensor(group["lr"], device=self.device)
        self.optimizer = torch.optim.AdamW(
            groups, betas=betas, fused=True, capturable=self.graphs and self.device.type == "cuda"
        )
        self.run: nn.Module = _Loss(model, loss)
        if distributed():
            self.run = nn.parallel.DistributedDataParallel(self.run, find_unused_parameters=partial)

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
        """One step; returns the loss. Raises NonFiniteLoss, and the parameters are what they were before."""
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate * self.learning_rate())
            else:
                group["lr"] = rate * self.learning_rate()
        n = self.accumulate
        parts = [rows(batch, self.rank * n + i, self.processes * n) for i in range(n)]
        value, norm = (x.item() for x in (self._graphed(parts) if self.graphs else self._update(self._here(parts))))
        if not math.isfinite(value):
            raise NonFiniteLoss("the loss", self.step, self._first_bad_layer(*self._here(parts)) or "the loss itself")
        if not math.isfinite(norm):
            named = self.model.named_parameters()
            bad = [name for name, p in named if p.grad is not None and not p.grad.isfinite().all()]
            raise NonFiniteLoss("the gradient", self.step, ", ".join(bad[:3]) or "its norm, which overflows")
        self.step += 1
        return value

    def _here(self, parts: list) -> list:
        return [map_tensors(lambda x: x.to(self.device), part) for part in parts]

    def _update(self, parts: list) -> tuple[Tensor, Tensor]:
        """Loss and norm of the gradient, 0-d; the parameters move if both are finite. Nothing waits for the device."""
        self.optimizer.zero_grad()
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for i, part in enumerate(parts):
            waits = i + 1 < len(parts) and self.processes > 1  # gradients are exchanged once, with the last part
            with self.run.no_sync() if waits else contextlib.nullcontext():
                loss = self._loss(part) / len(parts)
                loss.backward()
            total += loss.detach()
        if self.processes > 1:
            dist.all_reduce(total)
            total /= self.processes
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.clip, foreach=True)
        # What torch.amp's scaler tells the fused optimizer: 1 leaves parameters and moments alone.
        self.optimizer.found_inf = (~(total.isfinite() & norm.isfinite())).float()
        self.optimizer.step()
        return total, norm.detach()

    def _may_be_graphed(self, cuda_graph: bool | str) -> bool:
        if cuda_graph not in (True, "auto"):
            raise ValueError(f"Trainer: cuda_graph must be True, False or 'auto', got {cuda_graph!r}")
        reason = None
        if self.device.type != "cuda":
            if cuda_graph == "auto":
                return False  # nothing to say: nobody expects one
            reason = f"the model is on {self.device.type}, and a CUDA graph needs a GPU"
        elif self.processes > 1:
            reason = "several processes exchange gradients within the step"
        elif name := graphed.hooked(self.model):
            reason = f"{name} has hooks, which a replay would not run"
        if reason and cuda_graph is True:
            raise ValueError(f"Trainer: cuda_graph=True is not possible: {reason}")
        if reason:
            self._once(f"no CUDA graph: {reason}")
        return reason is None

    def _graphed(self, parts: list) -> tuple[Tensor, Tensor]:
        """`_update`: in the first steps as it is, then from a graph. Batches of another shape go without it."""
        if self.graph is None and self.warm < graphed.WARM_UP:
            self.warm += 1
            return graphed.aside(lambda: self._update(self._here(parts)), self.device)
        if self.graph is None:
            try:
                own = [map_tensors(lambda x: x.to(self.device, copy=True), part) for part in parts]
                self.graph = graphed.StepGraph(self._update, own)
            except RuntimeError as error:
                reason = f"the step cannot be captured: {str(error).splitlines()[0][:150]}"
                if self.cuda_graph is True:
                    raise ValueError(f"Trainer: cuda_graph=True is not possible: {reason}") from error
                self.graphs = False
                self._once(f"no CUDA graph: {reason}")
                return self._update(self._here(parts))
        if not self.graph.suits(parts):
            self._once("a batch of another shape than the first ones': it goes without the CUDA graph")
            return self._update(self._here(parts))
        return self.graph(parts)

    def _once(self, line: str) -> None:
        if line not in self.said:
            self.said.add(line)
            self.say(line)

    def _loss(self, batch: tuple) -> Tensor:
        try:
            with torch.autocast(self.device.type, self.autocast or torch.bfloat16, enabled=self.autocast is not None):
                return self.run(batch)
        except ValueError as error:  # the neighbour search refuses positions that are not finite
            layer = self._first_bad_layer(batch)
            if layer is None:
                raise
            raise NonFiniteLoss("the forward pass", self.step, layer) from error

    def _first_bad_layer(self, *batches: tuple) -> str | None:
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
                for batch in batches:
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
        history: History | None = None,
        after_step: Callable[[History], object] | None = None,
    ) -> History:
        """Trains to the end, calling ``evaluate`` at ``evaluations`` evenly spaced points and at the end.

        ``batches`` that end, as a DataLoader's do, are gone through again. The time that evaluating takes is not
        counted. A resumed run goes on with its ``history``; ``after_step`` is called with it when a step and its
        evaluation are done.

        Raises NonFiniteLoss (a step, or an evaluation), ValueError (no batch, or an iterator that ends: `history` has
        what was trained until then).
        """
        self.history = history = history or History()
        stream = self._endless(batches)
        self.model.train()
        bar = TrainingBar(self) if progress else None
        due = self._next_point(evaluations)
        tokens = began_with = history.tokens[-1] if history.tokens else 0
        began_at = self.elapsed
        try:
            while self.progress < 1:
                began = time.perf_counter()
                batch = next(stream)
                value = self.train_step(batch)
                self.elapsed += time.perf_counter() - began
                tokens += tokens_in(batch)
                for values, entry in ((history.steps, self.step), (history.losses, value),
                                      (history.seconds, self.elapsed), (history.tokens, tokens)):  # fmt: skip
                    values.append(entry)
                if bar:
                    bar.update(value, (tokens - began_with) / max(self.elapsed - began_at, 1e-9))
                if evaluate and (self.progress >= due or self.progress >= 1):
                    due = self._next_point(evaluations)
                    if bar:
                        bar.judging(True)
                    history.evaluated.append((self.step, self.elapsed, self._evaluated(evaluate, batch)))
                    if bar:
                        bar.judging(False)
                        bar.held_out = history.evaluated[-1][2]
                if after_step:
                    after_step(history)
        finally:
            if bar:
                bar.close()
            self.model.eval()
        return history

    def _next_point(self, evaluations: int) -> float:
        """The next of ``evaluations`` evenly spaced shares of the run: the same ones when it is gone on with."""
        return (math.floor(self.progress * evaluations + 1e-9) + 1) / evaluations if evaluations else math.inf

    def _endless(self, batches: Iterable[tuple]) -> Iterator[tuple]:
        while True:
            before = self.step
            yield from batches
            if self.step == before:  # nothing came in this pass
                if before == 0 or not isinstance(batches, Iterator):
                    raise ValueError("Trainer: batches must hold at least one batch, got none")
                length = f"{self.steps} steps" if self.steps else f"{self.seconds:g} seconds"
                raise ValueError(
                    f"Trainer: batches ended after step {before} of {length}, and an iterator cannot be gone through "
                    "again; give a DataLoader, a list, or a generator that does not end"
                )

    def _evaluated(self, evaluate: Callable[[], float], batch: tuple) -> float:
        self.model.eval()
        try:
            value = evaluate()
        except ValueError as error:  # as in `_loss`
            layer = self._first_bad_layer(map_tensors(lambda x: x.to(self.device), batch))
            if layer is None:
                raise
            raise NonFiniteLoss("the evaluation", self.step, layer) from error
        finally:
            self.model.train()
        if not math.isfinite(value):
            layer = self._first_bad_layer(map_tensors(lambda x: x.to(self.device), batch))
            raise NonFiniteLoss("the evaluation", self.step, layer or "the evaluation itself")
        return value

    def state_dict(self) -> dict:
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "step": self.step,
                "elapsed": self.elapsed}  # fmt: skip

    def load_state_dict(self, state: dict) -> None:
        self.model.load_state_dict(state["model"])
        lengths = [group["lr"] for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(state["optimizer"])
        for group, length in zip(self.optimizer.param_groups, lengths, strict=True):
            group["lr"] = length  # set in every step; a tensor or a number as this device wants it
        self.graph, self.warm = None, 0  # it holds the addresses of the old moments
        self.step, self.elapsed = state["step"], state["elapsed"]


def distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


class _Loss(nn.Module):
    """The loss as a forward pass, which is what DistributedDataParallel hooks into."""

    def __init__(self, model: nn.Module, loss: Callable[[nn.Module, tuple], Tensor]):
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, batch: tuple) -> Tensor:
        return self.loss(self.model, batch)
