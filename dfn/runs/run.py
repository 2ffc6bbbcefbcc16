"""A run: a task trained in a folder that holds its checkpoints, and is gone on with, judged and drawn from there."""

import contextlib
import copy
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dfn_kernels._native import cpu_name

from ..models.layers import count_parameters
from ..training import checkpoints
from ..training.batches import rows
from ..training.checkpoints import Checkpoint, CheckpointError
from ..training.trainer import History, NonFiniteLoss, Trainer
from .options import MODEL, SHAPE, Options, UsageError
from .stopping import Interruption, Stopped
from .tasks import KINDS, Task
from .threads import fast_threads

Say = Callable[[str], object]
BEST = "best.safetensors"


@dataclass
class Run:
    """A trained model and where it came from."""

    options: Options
    task: Task
    model: nn.Module
    history: History
    folder: Path
    weights: Path | None  # the file that holds the model; None in a process of several that writes nothing

    @classmethod
    def load(cls, folder: Path, say: Say = print) -> "Run":
        """The last good checkpoint of a folder. Raises CheckpointError where there is none."""
        checkpoint = checkpoints.latest(Path(folder), say)
        if checkpoint is None:
            raise CheckpointError(f"{folder} holds no checkpoint; `dfn train KIND --out {folder}` makes them")
        options = Options.restored(checkpoint.facts, checkpoint.path)
        task = KINDS[options.kind](options)
        model = task.model()
        best = _best(Path(folder), options)
        _load_weights(model, best or checkpoint)
        history = History.of(checkpoint.part("history"))
        model = model.to(default_device()).eval()
        return cls(options, task, model, history, Path(folder), (best or checkpoint).path)

    def set_threads(self) -> None:
        """As many threads as the run took, if there are so many here."""
        torch.set_num_threads(min(self.options.threads or torch.get_num_threads(), torch.get_num_threads()))

    def _last_step(self) -> int:
        """Where in the history the weights are from: from its end, or those that are kept as the best."""
        if self.weights is None or self.weights.name != BEST:
            return -1
        return self.history.steps.index(checkpoints.load(self.weights).facts["step"])

    def judge(self, progress: bool = False, say: Say = print) -> dict[str, float]:
        """The figures of the task, held out; also written to ``figures.json``, with where they come from.

        ``progress`` says on what it judges, and shows a bar for what takes longer than a second.
        """
        self.task.progress = progress
        if progress:
            say(f"judging on {self.task.judged_on()}")
        h = self.history
        at = self._last_step()
        step = h.steps[at] if h.steps else 0
        try:
            figures = self.task.figures(self.model)
        except ValueError as error:  # the neighbour search refuses positions that are not finite
            if "finite" not in str(error):
                raise
            raise RuntimeError(f"the model of step {step} in {self.folder} is not finite on held-out data") from error
        facts = {
            "figures": figures,
            "step": step,
            "tokens": h.tokens[at] if h.tokens else 0,
            "seconds": h.seconds[at] if h.seconds else 0.0,
            "parameters": count_parameters(self.model),
            "machine": machine(),
            "options": asdict(self.options),
        }
        path = self.folder / "figures.json"
        try:
            checkpoints.write_whole(path, (json.dumps(facts, indent=1) + "\n").encode())
        except OSError as error:
            say(f"{path} cannot be written, so the figures are not kept: {error.strerror}")
        return figures


def train(
    options: Options, folder: Path, *, resume: bool = False, given: dict | None = None, init: Path | None = None,
    every: int = 100, evaluations: int = 8, progress: bool = True, say: Say = print,
    make_task: Callable[[Options], Task] | None = None,
) -> Run:  # fmt: skip
    """Trains a task, with a checkpoint every ``every`` steps and at the end; with ``resume`` from the last good one.

    A resumed run ends with the same weights, to the bit, as one that never stopped, on the same machine: model,
    optimizer, random generators, the place in the data, memory and number of threads come from the checkpoint.
    ``given`` are the options that the caller insists on: those of the checkpoint must agree, except for more steps.
    Ctrl-C ends the step that is under way and keeps it. A new run begins with the weights of the run in ``init``.
    ``make_task`` makes another task than that of the kind. With ``keep="best"`` the weights with the least held-out
    loss of all evaluations are kept in ``best.safetensors`` and are those of the finished run.

    Raises UsageError (the folder holds a run and ``resume`` is not asked for, or options, weights or data disagree),
    `checkpoints.Busy` (another run writes in the folder), CheckpointError (no checkpoint is good), OSError (the folder
    cannot be written), NonFiniteLoss, which names the last good checkpoint, and `Stopped` (Ctrl-C).
    """
    folder = Path(folder)
    rank = dist.get_rank() if dist.is_initialized() else 0
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file; a run needs a folder")
    with checkpoints.locked(folder) if rank == 0 else contextlib.nullcontext():
        return _train(
            options, folder, resume, given or {}, init, every, evaluations, progress, _nothing if rank else say,
            make_task or KINDS[options.kind],
        )  # fmt: skip


def _train(
    options: Options, folder: Path, resume: bool, given: dict, init: Path | None, every: int, evaluations: int,
    progress: bool, say: Say, make_task: Callable[[Options], Task],
) -> Run:  # fmt: skip
    rank, processes = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    checkpoint = _to_resume(folder, rank, say)
    if checkpoint is not None and not resume:
        raise UsageError(f"{folder} holds a run; --resume goes on with it, another --out begins one")
    if checkpoint is not None:
        options = _agreed(options, checkpoint, given)
        if rank == 0:
            checkpoints.set_aside(folder, checkpoint.path)
    elif resume:
        say(f"{folder} holds no checkpoint: the run begins")
    if options.batch % (processes * options.accumulate):
        raise UsageError(f"batch must be a multiple of the {processes} processes, got {options.batch}")

    torch.manual_seed(options.seed)
    task = make_task(options)
    say(f"data: {task.summary()}")
    model = task.model().to(default_device())
    if init is not None and checkpoint is None:
        source = _source(init, say)
        _load_weights(model, source, UsageError)
        say(f"begins with the weights of {source.path}")
    options = replace(options, threads=options.threads or _threads(task, model, processes, say))
    torch.set_num_threads(options.threads)
    generator = torch.Generator().manual_seed(options.seed)
    say(f"model: {type(model).__name__}, {count_parameters(model):,} parameters; {machine()}, {options.dtype}")
    say(f"run: {options.steps:,} steps; {folder} keeps a checkpoint every {every:,} steps and at the end")
    trainer = _trainer(task, model, options, say)
    history, last = History(), None
    if checkpoint is not None:
        if checkpoint.facts["data"] != task.fingerprint():
            raise UsageError(f"the data is not what the run in {folder} began with; another --out begins a new one")
        history, last = _restore(checkpoint, trainer, task, generator), checkpoint.path
        say(f"goes on from {last}, step {trainer.step} of {options.steps}")
        _say_schedule(trainer, checkpoint.facts["options"]["steps"], say)
    interruption = Interruption(processes == 1)

    def keep(history: History) -> None:
        nonlocal last
        values = [x for _, _, x in history.evaluated]
        judged_now = options.keep == "best" and rank == 0 and values and history.evaluated[-1][0] == trainer.step
        if judged_now and values[-1] == min(values):
            weights = {f"model.{name}": x for name, x in model.state_dict().items()}
            checkpoints.write(folder / BEST, weights, {"step": trainer.step})
        if trainer.step % every and trainer.step < options.steps and not interruption.asked:
            return
        row_state = _gathered(task.row_state())
        if rank == 0:
            facts = {"options": asdict(options), "data": task.fingerprint(), "step": trainer.step,
                     "elapsed": trainer.elapsed}  # fmt: skip
            tensors = _tensors(trainer, task, generator, history, row_state)
            last = checkpoints.save(folder, trainer.step, tensors, facts)
        if interruption.asked:
            raise Stopped(f"stopped after step {trainer.step}, which {last} holds; --resume goes on from there")

    batches = (task.batch(generator) for _ in iter(int, 1))
    unit = 1 / math.log(2) if task.unit == "bits" else 1.0
    evaluate = (lambda: unit * task.held_out_loss(model)) if rank == 0 else (lambda: 0.0)
    try:
        with interruption:
            history = trainer.fit(
                batches, evaluate=evaluate, evaluations=evaluations, progress=progress and rank == 0, history=history,
                after_step=keep,
            )  # fmt: skip
    except NonFiniteLoss as error:
        kept = f"the last good checkpoint is {last}" if last else "there is no checkpoint yet"
        error.args = (f"{error}; {kept}",)
        raise
    best = _best(folder, options) if rank == 0 else None
    if best is not None:
        model.load_state_dict(best.part("model"))
        say(f"the least held-out loss was that of step {best.facts['step']}: {best.path}")
    return Run(options, task, model, history, folder, last if best is None else best.path)


def _best(folder: Path, options: Options) -> Checkpoint | None:
    if options.keep != "best" or not (folder / BEST).exists():
        return None
    return checkpoints.load(folder / BEST)


def options_like(init: Path, kind: str, given: dict, say: Say = print) -> Options:
    """Those of a run of ``kind`` that begins with the weights of the run in ``init``: its model's, unless given."""
    kept, task = Options.restored(*_facts(_source(init, say))), KINDS.get(kind)
    if kept.block == "first":
        kept = replace(kept, convolution=0)  # which it never has, whatever the option says
    names = [n for n in MODEL if task is None or task.own is None or n in (*SHAPE, *task.own)]
    return Options.of(kind, **{**{name: getattr(kept, name) for name in names}, **given})


def _source(init: Path, say: Say) -> Checkpoint:
    checkpoint = checkpoints.latest(Path(init), say)
    if checkpoint is None:
        raise UsageError(f"--init: {init} holds no checkpoint")
    return _best(Path(init), Options.restored(*_facts(checkpoint))) or checkpoint


def _facts(checkpoint: Checkpoint) -> tuple[dict, Path]:
    return checkpoint.facts, checkpoint.path


def _load_weights(model: nn.Module, checkpoint: Checkpoint, error: type[Exception] = CheckpointError) -> None:
    have, want = checkpoint.part("model"), model.state_dict()
    for name in [*want, *have]:
        a, b = have.get(name), want.get(name)
        if a is None or b is None or a.shape != b.shape:
            sizes = " and ".join("nothing" if x is None else str(list(x.shape)) for x in (a, b))
            raise error(f"the weights in {checkpoint.path} are of another model: {name} is {sizes} here")
    model.load_state_dict(have)


def _trainer(task: Task, model: nn.Module, options: Options, say: Say) -> Trainer:
    return Trainer(
        model, loss=task.loss, steps=options.steps, lr=options.lr, warmup=options.warmup, clip=options.clip,
        weight_decay=options.weight_decay, geometry_rate=options.geometry_rate, accumulate=options.accumulate,
        unit=task.unit, counted=task.counted, partial=task.partial,
        autocast=torch.bfloat16 if options.dtype == "bfloat16" else None,
        cuda_graph="auto" if task.graphable else False, say=say,
    )  # fmt: skip


def _threads(task: Task, model: nn.Module, processes: int, say: Say) -> int:
    most = torch.get_num_threads()
    if processes > 1 or default_device().type != "cpu":
        return most

    def make() -> Callable[[], float]:
        trial, generator = copy.copy(task), torch.Generator().manual_seed(task.options.seed)
        trainer = _trainer(trial, copy.deepcopy(model), task.options, _nothing)
        return lambda: trainer.train_step(trial.batch(generator))

    threads = fast_threads(make)
    if most > 1:
        passive = os.environ.get("OMP_WAIT_POLICY", "").lower() == "passive"
        waits = ", and sleep while they wait" if passive else ""
        say(f"{threads} of {most} threads take the least time for a step{waits} (--threads sets their number)")
    return threads


def _say_schedule(trainer: Trainer, before: int, say: Say) -> None:
    after = trainer.steps
    if after != before:
        rate = trainer.learning_rate()
        trainer.steps = before
        was, trainer.steps = trainer.learning_rate(), after
        say(f"{after} steps instead of {before}: step length {rate:.2g} after {was:.2g}, as in a run of {after}")
    elif trainer.step >= after:
        say(f"all {after} steps are done; --steps M with a larger M goes on")


def default_device() -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


def machine() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    threads = torch.get_num_threads()
    return f"{cpu_name()}, {threads} thread{'s' if threads > 1 else ''}"


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
            # DDP keeps the threads of gloo alive, and one that is still to free a tensor when the interpreter ends
            # aborts the process: here it gets its turn.
            time.sleep(0.1)


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
    """Those of the checkpoint, with the number of steps that is given."""
    kept = Options.restored(*_facts(checkpoint))
    done, steps = checkpoint.facts["step"], given.get("steps", kept.steps)
    if steps < done:
        raise UsageError(f"steps must be at least the {done} that are done in {checkpoint.path}, got {steps}")
    for name, value in {"kind": options.kind, **given}.items():
        was = getattr(kept, name)
        same = was == value or name == "steps" or (name == "threads" and value == 0)
        if not same and not (name == "data" and value and was and os.path.abspath(was) == os.path.abspath(value)):
            raise UsageError(f"{name} is {was} in {checkpoint.path}, got {value}; another --out begins a new run")
    return replace(kept, steps=steps)


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
    params = [p for group in trainer.optimizer.param_groups for p in group["params"]]
    if any("exp_avg" in x and x["exp_avg"].shape != params[i].shape for i, x in state.items()):
        raise CheckpointError(f"{checkpoint.path} is of an older version; --init begins a new run with its weights")
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
