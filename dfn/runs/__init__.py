"""What `dfn train KIND` does: options, tasks and the data of each kind, a run in its folder, and how it is judged."""

from .options import KINDS, Options, UsageError
from .run import Run, cpu_name, default_device, machine, options_like, processes, train
from .tasks import Task

__all__ = [
    "KINDS",
    "Options",
    "Run",
    "Task",
    "UsageError",
    "cpu_name",
    "default_device",
    "machine",
    "options_like",
    "processes",
    "train",
]
