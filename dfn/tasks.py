"""The documented path of `dfn.runs.tasks`."""

from .runs.tasks import *  # noqa: F403
