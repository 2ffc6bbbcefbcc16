"""The microbenchmarks under pytest-benchmark: `pytest bench --benchmark-only`."""

import pytest
import torch

from bench.cases import cases_for
from bench.measure import contenders, training_step

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CASES = [case for case in cases_for(DEVICE) if case.sizes.get("N", 0) <= 2**16]
RUNS = [(case, who) for case in CASES for who in contenders(case, DEVICE)]


@pytest.mark.parametrize("case, who", RUNS, ids=[f"{case.name}-{who}" for case, who in RUNS])
@pytest.mark.parametrize("mode", ["forward", "training"])
def test_speed(benchmark, case, who, mode):
    if mode == "training" and not case.grads:
        pytest.skip("no gradients")
    benchmark.group = f"{case.name} {mode}"
    op = contenders(case, DEVICE)[who]
    inputs = case.make(**case.sizes, device=DEVICE, dtype=torch.float32)
    run = (
        (lambda: op(**inputs)) if mode == "forward" else training_step(case, op, inputs, torch.randn_like(op(**inputs)))
    )

    def finished():
        run()
        if DEVICE != "cpu":
            torch.cuda.synchronize()

    benchmark.pedantic(finished, warmup_rounds=1, rounds=5)
