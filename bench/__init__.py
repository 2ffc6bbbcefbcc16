"""The benchmark: `python -m bench`. Cases are named in cases.py, measured in measure.py, shown by report.py."""

from .report import quick_table

__all__ = ["quick_table"]
