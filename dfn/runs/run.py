"""A run: a task trained in a folder that holds its checkpoints, and is gone on with, judged and drawn from there."""

import contextlib
import json
import math
import os
import platform
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..models.layers import count_parameters
from ..training import checkpoints
from ..training.checkpoints import Checkpoint, CheckpointError
from ..training.trainer import History, NonFiniteLoss, Trainer, rows
from .options import Options, UsageError
from .tasks import KINDS, Task

Say = Callable[[str], object]


@dataclass
class Run:
    """A trained model and where it came from."""

    options: Options
    task: Task
    model: nn.Module
    history: History
    folder: Path

    @classmethod
    def load(cls, folder: Path, say: Say = print) -> "Run":
        """The last good checkpoint of a folder. Raises CheckpointError where there is none."""
        checkpoint = checkpoints.latest(Path(folder), say)
        if checkpoint is None:
            raise CheckpointError(f"{folder} holds no checkpoint; `dfn train KIND --out {folder}` makes them")
        options = Options.of(**checkpoint.facts["options"])
        task = KINDS[options.kind](options)
        model = task.model()
        model.load_state_dict(checkpoint.part("model"))
        history = History.of(checkpoint.part("history"))
        return cls(options, task, model.to(default_device()).eval(), history, Path(folder))

    def judge(self) -> dict[str, float]:
        """The figures of the task, held out; also written to ``figures.json``, with where they come from."""
        figures, h = self.task.figures(self.model), self.history
        facts = {
            "figures": figures,
            "step": len(h.steps),
            "tokens": h.tokens[-1] if h.tokens else 0,
            "seconds": h.seconds[-1] if h.seconds else 0.0,
            "parameters": count_parameters(self.model),
            "machine": machine(),
            "options": asdict(self.options),
        }
        checkpoints.write_whole(self.folder / "figures.json", (json.dumps(facts, indent=1) + "\n").encode())
        return figures


def train(
    options: Options, folder: Path, *, resume: bool = False, given: dict | None = None, every: int = 100,
    evaluations: int = 8, progress: bool = True, say: Say = print,
) -> Run:  # fmt: skip
    """Trains a task, with a checkpoint every ``every`` steps and at the end; with ``resume`` from the last good one.

    A resumed run ends with the same weights, to the bit, as one that never stopped, on the same machine: model,
    optimizer, random generators, the place in the data, memory and number of threads come from the checkpoint.
    ``given`` are the options that the caller insists on: those of the checkpoint must agree.

    Raises UsageError (the folder holds a run and ``resume`` is not asked for, or options or data disagree),
    CheckpointError (no checkpoint is good) and NonFiniteLoss, which names the last good checkpoint.
    """
    folder = Path(folder)
    rank = dist.get_rank() if dist.is_initialized() else 0
    if rank:
        say = _nothing
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = _to_resume(folder, rank, say)
    if checkpoint is not None and not resume:
        raise UsageError(f"{folder} holds a run; --resume goes on with it, another --out begins one")
    if checkpoint is not None:
        options = _agreed(options, checkpoint, given or {})
        if rank == 0:
            checkpoints.set_aside(folder, checkpoint.path)
    elif resume:
        say(f"{folder} holds no checkpoint: the run begins")
    options = replace(options, threads=options.threads or torch.get_num_threads())
    torch.set_num_threads(options.threads)

    torch.manual_seed(options.seed)
    task = KINDS[options.kind](options)
    model = task.model().to(default_device())
    generator = torch.Generator().manual_seed(options.seed)
    say(task.summary())
    say(f"{type(model).__name__}: {count_parameters(model):,} parameters; {machine()}, {options.dtype}")
    trainer = Trainer(
        model, loss=task.loss, steps=options.steps, lr=options.lr, warmup=options.warmup, clip=options.clip,
        weight_decay=options.weight_decay, accumulate=options.accumulate, unit=task.unit, partial=task.partial,
        autocast=torch.bfloat16 if options.dtype == "bfloat16" else None,
        cuda_graph="auto" if task.graphable else False, say=say,
    )  # fmt: skip
    history, last = History(), None
    if checkpoint is not None:
        if checkpoint.facts["data"] != task.fingerprint():
            raise UsageError(f"the data is not what the run in {folder} began with; another --out begins a new one")
        history, last = _restore(checkpoint, trainer, task, generator), checkpoint.path
        say(f"goes on from {last}, step {trainer.step} of {options.steps}")

    def keep(history: History) -> None:
        nonlocal last
        if trainer.step % every and trainer.step < options.steps:
            return
        row_state = _gathered(task.row_state())
        if rank == 0:
            facts = {"options": asdict(options), "data": task.fingerprint(), "step": trainer.step,
                     "elapsed": trainer.elapsed}  # fmt: skip
            tensors = _tensors(trainer, task, generator, history, row_state)
            last = checkpoints.save(folder, trainer.step, tensors, facts)

    batches = (task.batch(generator) for _ in iter(int, 1))
    unit = 1 / math.log(2) if task.unit == "bits" else 1.0
    evaluate = (lambda: unit * task.held_out_loss(model)) if rank == 0 else (lambda: 0.0)
    try:
        history = trainer.fit(
            batches, evaluate=evaluate, evaluations=evaluations, progress=progress and rank == 0, history=history,
            after_step=keep,
        )  # fmt: skip
    except NonFiniteLoss as error:
        kept = f"the last good checkpoint is {last}" if last else "there is no checkpoint yet"
        error.args = (f"{error}; {kept}",)
        raise
    return Run(options, task, model, history, folder)


def default_device() -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


def machine() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    threads = torch.get_num_threads()
    return f"{cpu_name()}, {threads} thread{'s' if threads > 1 else ''}"


def cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


@contextlib.contextmanager
def processes() -> Iterator[None]:
    """Joins the other processes of `torchrun`, if it started this one: nccl between GPUs, gloo otherwise."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or dist.is_initialized():
        yield
        return
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(default_device())
    dist.init_process_group("nccl" if cuda else "gloo")
    try:
        yield
    finally:
        if sys.exc_info()[0] is None:  # after a failure the others would be waited for
            dist.destroy_process_group()


def _nothing(text: str) -> None:
    pass


def _to_resume(folder: Path, rank: int, say: Say) -> Checkpoint | None:
    """The first process chooses, all read the same file."""
    checkpoint = checkpoints.latest(folder, say) if rank == 0 else None
    if dist.is_initialized():
        path = [None if checkpoint is None else str(checkpoint.path)]
        dist.broadcast_object_list(path)
        checkpoint = checkpoint or (checkpoints.load(Path(path[0])) if path[0] else None)
    return checkpoint


def _agreed(options: Options, checkpoint: Checkpoint, given: dict) -> Options:
    kept = checkpoint.facts["options"]
    for name, value in {"kind": options.kind, **given}.items():
        if kept.get(name) != value and not (name == "threads" and value == 0):
            raise UsageError(
                f"{name} is {kept.get(name)} in {checkpoint.path}, got {value}; another --out begins a new run"
            )
    return Options.of(**kept)


def _tensors(trainer: Trainer, task: Task, generator, history: History, row_state: dict) -> dict[str, Tensor]:
    state = trainer.state_dict()
    parts = {
        "model": state["model"],
        "optimizer": {f"{i}.{n}": x for i, values in state["optimizer"]["state"].items() for n, x in values.items()},
        "random": {"torch": torch.get_rng_state(), "data": generator.get_state()},
        "state": task.state(),
        "rows": row_state,
        "history": history.tensors(),
    }
    if torch.cuda.is_available():
        parts["random"]["cuda"] = torch.cuda.get_rng_state()
    return {f"{part}.{name}": x for part, tensors in parts.items() for name, x in tensors.items()}


def _restore(checkpoint: Checkpoint, trainer: Trainer, task: Task, generator: torch.Generator) -> History:
    state: dict[int, dict] = {}
    for key, x in checkpoint.part("optimizer").items():
        i, name = key.split(".")
        state.setdefault(int(i), {})[name] = x
    groups = trainer.optimizer.state_dict()["param_groups"]
    trainer.load_state_dict({
        "model": checkpoint.part("model"), "optimizer": {"state": state, "param_groups": groups},
        "step": checkpoint.facts["step"], "elapsed": checkpoint.facts["elapsed"],
    })  # fmt: skip
    random = checkpoint.part("random")
    torch.set_rng_state(random["torch"])
    if "cuda" in random and torch.cuda.is_available():
        torch.cuda.set_rng_state(random["cuda"])
    generator.set_state(random["data"])
    mine = {n: rows(x, trainer.rank, trainer.processes).to(trainer.device) for n, x in checkpoint.part("rows").items()}
    task.load_state(checkpoint.part("state"), mine)
    return History.of(checkpoint.part("history"))


def _gathered(row_state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The rows of all processes."""
    if not dist.is_initialized():
        return row_state
    whole = {}
    for name, x in row_state.items():
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.contiguous())
        whole[name] = torch.cat(parts)
    return whole
