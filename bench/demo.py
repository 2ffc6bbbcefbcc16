"""``python -m bench.demo``: the demonstration of `dfn.demo`, and a short table of the kernels in its report."""

import sys

from dfn.demo import main

from .report import quick_table

if __name__ == "__main__":
    sys.exit(main(kernel_table=quick_table))
