"""Errors that point at the mistake: the argument that is blamed is the one to change."""

import pytest
import torch
from every_op import OPS, Op
from helpers import DEVICE

import dfn_kernels as dk


@pytest.mark.parametrize("op", [op for op in OPS if "route" not in op.name], ids=lambda op: op.name)
def test_a_wrong_shape_is_blamed_on_the_argument_that_has_it(op: Op):
    """A size that an earlier argument has, too, is wrong in the later one; turned dimensions as well.

    Routing is different: there the patterns, a layer's parameters, say what the other sizes must be.
    """
    inputs, earlier = op.make(torch.float32), set()
    for name, x in inputs.items():
        wrong = {place: x.repeat_interleave(2, place) for place in range(x.ndim) if x.shape[place] in earlier}
        if name != next(iter(inputs)) and x.ndim > 1:
            wrong["turned"] = x.transpose(-1, -2)
        for changed in wrong.values():
            with pytest.raises(ValueError, match=f"^{op.name}: {name} must have .*, got "):
                op.call(**{**inputs, name: changed})
        earlier |= set(x.shape)


def test_messages():
    p, v = torch.rand(5, 2, device=DEVICE), torch.rand(5, 3, device=DEVICE)
    near = dk.knn(p, 2)
    with pytest.raises(TypeError, match="indices must be a tensor, got Neighbors, whose .indices is one"):
        dk.gaussian_gather(p, v, near, 1.0)
    with pytest.raises(ValueError, match=r"sigma must have shape \[\] or \[1\], got \[4\]"):
        dk.gaussian_gather(p, v, near.indices, torch.ones(4, device=DEVICE))


@pytest.mark.skipif(DEVICE != "cpu", reason="looking at values would make a GPU wait")
@pytest.mark.parametrize("value", [-2.0, float("nan"), float("inf")])
def test_a_density_that_cannot_be_is_said(value):
    with pytest.raises(ValueError, match=f"density must be finite and not negative, got {value:g}"):
        dk.field_sample(torch.tensor([[1.0, value, 3.0]]), 2)
