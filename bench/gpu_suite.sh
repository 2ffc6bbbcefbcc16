#!/usr/bin/env bash
# bash bench/gpu_suite.sh OUT [--minutes M] [--only GROUP]: what only a GPU can tell; the groups stand in gpu_suite.py.
# Needs PyTorch, Triton and pytest; runs from the checkout, with the built libraries beside dfn_kernels/__init__.py if there
# are any. PYTHON chooses another interpreter than python3.
set -eu
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
exec "${PYTHON:-python3}" "$root/bench/gpu_suite.py" "$@"
