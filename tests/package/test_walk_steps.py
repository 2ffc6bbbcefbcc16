"""What packets of the GPU's search do on hostile sets, as bench/walk_steps counts it: none holds all others up."""

import pytest
import torch

from bench import walk_steps


@pytest.fixture(scope="module")
def library():
    return walk_steps.build()


@pytest.mark.parametrize("D", [2, 3])
def test_every_packet_ends_soon(library, D):
    n, k = 30_011, 16
    torch.manual_seed(1)
    uniform = walk_steps.count(library, walk_steps.points("uniform", n, D), k, False, n)
    for name in walk_steps.SETS:
        x = walk_steps.points(name, n, D)
        found = walk_steps.count(library, x, k, False, n)
        assert found["most"] < 20 * uniform["tests"] < n / 16, name
        assert found["instructions"] < 4 * uniform["instructions"], name
        causal = walk_steps.count(library, x, k, True, n)["instructions"]
        assert causal < 2 * max(found["instructions"], uniform["instructions"] / 2), name
