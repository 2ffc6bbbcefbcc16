"""What PyG adds to torch_cluster's functions."""

import torch
from torch import Tensor

from .._checks import has_shape, is_float_tensor, same_device
from .sets import neighbors, side


def knn_interpolate(
    x: Tensor,
    pos_x: Tensor,
    pos_y: Tensor,
    batch_x: Tensor | None = None,
    batch_y: Tensor | None = None,
    k: int = 3,
    num_workers: int = 1,
    *,
    batch_size: int | None = None,
    ptr_x: Tensor | None = None,
    ptr_y: Tensor | None = None,
) -> Tensor:
    """Features at pos_y from the k nearest pos_x, weighted by 1 / squared distance (at least 1e-16).

    x ``[N, c]``, pos_x ``[N, D]``, pos_y ``[M, D]`` -> ``[M, c]`` in x's dtype; weights are float32, or float64 for
    float64 positions. Gradients to x; weights are constants. A point without any neighbour gets NaN. Batches as in
    `knn`. The source of the formula is PointNet++.
    """
    op = "knn_interpolate"
    is_float_tensor(op, "x", x)
    of_x, of_y = side(op, "pos_x", pos_x, batch_x, ptr_x), side(op, "pos_y", pos_y, batch_y, ptr_y)
    N, M = len(of_x.points), len(of_y.points)
    if x.ndim != 2:
        raise ValueError(f"{op}: x must have shape [N, c], got {list(x.shape)}")
    has_shape(op, "x", x, (N, x.shape[1]), "[N, c]")
    same_device(op, "pos_x", pos_x, x=x)
    with torch.no_grad():
        found = neighbors(op, of_x, of_y, k, batch_size)
        weight = (1 / found.sq_dists.clamp(min=1e-16)).where(found.indices >= 0, 0)
        weight = weight / weight.sum(1, keepdim=True)
    if N == 0:
        return x.new_full((M, x.shape[1]), torch.nan)
    rows = x.index_select(0, found.indices.clamp(min=0).flatten()).view(M, k, -1)
    rows = rows.where((found.indices >= 0).unsqueeze(-1), 0)
    wide = torch.promote_types(weight.dtype, x.dtype)
    return (weight.to(wide).unsqueeze(-1) * rows).sum(1).to(x.dtype)
