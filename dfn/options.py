"""The documented path of `dfn.runs.options`."""

from .runs.options import *  # noqa: F403
