"""``python -m bench.demo``: the demonstration of `dfn.demo`, and ten lines of the kernels' times in its report."""

import sys

from dfn.demo import main

from .report import quick_table

if __name__ == "__main__":
    sys.exit(main(kernel_table=quick_table, prog="python -m bench.demo"))
