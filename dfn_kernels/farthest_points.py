"""Farthest point sampling within packed sets. Read from top to bottom: schema, fake, function."""

import torch
from torch import Tensor

from . import _backends, _native
from ._transforms import OpFunction, call, custom_op
from .reference.farthest_points import farthest_points as reference

_backends.register("farthest_points")


# ---- schema ---------------------------------------------------------------------------------------------------------
@custom_op("dfn::farthest_points")
def _op(
    points: Tensor,  # [N, D], float32 or float64
    ptr: Tensor,  # [S + 1] offsets of the sets
    out_ptr: Tensor,  # [S + 1] offsets of what is chosen
    start: Tensor | None,  # [S] the first choice, counted within its set
    total: int,
    backend: str,
) -> Tensor:  # int64 [total]
    points, ptr, out_ptr = points.contiguous(), ptr.contiguous(), out_ptr.contiguous()
    start = None if start is None else start.contiguous()
    return _launcher(backend)(points, ptr, out_ptr, start, total)


def _launcher(backend: str):
    if backend == "reference":
        return reference
    if backend == "triton":
        from .triton.farthest_points import farthest_points

        return farthest_points
    return _native.cpu.farthest_points


# ---- fake -----------------------------------------------------------------------------------------------------------
@_op.register_fake
def _(points, ptr, out_ptr, start, total, backend):
    return points.new_empty(total, dtype=torch.int64)


class _Function(OpFunction):
    op = _op

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.mark_non_differentiable(output)


# ---- function -------------------------------------------------------------------------------------------------------
def farthest_points(points: Tensor, ptr: Tensor, out_ptr: Tensor, total: int, start: Tensor | None = None) -> Tensor:
    """Chooses from every set, one after the other, the point that is farthest from those already chosen: ``[total]``.

    Of equally far ones it is the one of lower index, on every backend; squared distances are summed as `knn` does. No
    point is chosen twice: a set with fewer points than ``out_ptr`` asks for ends with -1. Points that are not finite
    are far from nobody and come last. The first choice is ``start [S]``, counted within the set, or point 0.
    """
    real = torch.float64 if points.dtype == torch.float64 else torch.float32
    backend = _backends.choose("farthest_points", points.device.type)
    return call(_op, _Function, points.detach().to(real), ptr, out_ptr, start, total, backend)
