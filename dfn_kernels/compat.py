"""Neighbour searches under the names and with the layouts that users of other packages know.

`knn` and `knn_graph` answer as torch_cluster's do, `knn_points` and `knn_gather` as pytorch3d's, `knn_interpolate` as
PyG's. All of them search with `dfn_kernels.knn`: exactly, ties by index. What is not offered raises NotImplementedError
and says what to use. The edge lists have a size that depends on the data, so on a GPU these functions wait for it;
`dfn_kernels.knn` does not.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ._checks import has_shape, is_float_tensor, is_index_tensor, is_integer, same_device
from .knn import MOST_NEIGHBORS
from .knn import knn as search

__all__ = ["knn", "knn_gather", "knn_graph", "knn_interpolate", "knn_points"]


# ---- torch_cluster --------------------------------------------------------------------------------------------------
def knn(
    x: Tensor,
    y: Tensor,
    k: int,
    batch_x: Tensor | None = None,
    batch_y: Tensor | None = None,
    cosine: bool = False,
    num_workers: int = 1,
    batch_size: int | None = None,
) -> Tensor:
    """For each point of y, the k nearest points of x of the same batch: int64 ``[2, E]``, (index in y, index in x).

    Args:
        x, y: ``[N, D]`` and ``[M, D]`` (or ``[N]`` and ``[M]``).
        batch_x, batch_y: int64 ``[N]`` and ``[M]``, ascending: which batch a point belongs to.
        cosine: not offered.
        num_workers: ignored; torch.set_num_threads decides.
        batch_size: number of batches; found from batch_x and batch_y without it.

    >>> import torch
    >>> knn(torch.tensor([[0.0], [1.0], [5.0]]), torch.tensor([[4.0]]), 2)
    tensor([[0, 0],
            [2, 1]])
    """
    _no_cosine("knn", cosine)
    return _edges("knn", x, y, k, batch_x, batch_y, batch_size, loop=True)


def knn_graph(
    x: Tensor,
    k: int,
    batch: Tensor | None = None,
    loop: bool = False,
    flow: str = "source_to_target",
    cosine: bool = False,
    num_workers: int = 1,
    batch_size: int | None = None,
) -> Tensor:
    """The graph of k nearest neighbours: int64 ``[2, E]``.

    With ``flow="source_to_target"`` an edge is (neighbour, centre), with "target_to_source" (centre, neighbour).
    ``loop=False`` excludes a point itself, by its index: copies of it stay.
    """
    _no_cosine("knn_graph", cosine)
    if flow not in ("source_to_target", "target_to_source"):
        raise ValueError(f"knn_graph: flow must be 'source_to_target' or 'target_to_source', got {flow!r}")
    edges = _edges("knn_graph", x, None, k, batch, batch, batch_size, loop)
    return edges.flip(0) if flow == "source_to_target" else edges


def _no_cosine(op: str, cosine: bool) -> None:
    if cosine:
        raise NotImplementedError(
            f"{op}: cosine=True is not offered: pass torch.nn.functional.normalize(x, dim=-1), it orders the same"
        )


def _edges(op, x, y, k, batch_x, batch_y, batch_size, loop) -> Tensor:
    """Edges (query, neighbour). y None: the queries are x itself."""
    is_float_tensor(op, "x", x)
    x = x.view(-1, 1) if x.ndim == 1 else x
    if x.ndim != 2:
        raise ValueError(f"{op}: x must have shape [N, D], got {list(x.shape)}")
    if y is not None:
        is_float_tensor(op, "y", y)
        y = y.view(-1, 1) if y.ndim == 1 else y
        has_shape(op, "y", y, (y.shape[0], x.shape[1]), "[M, D]")
        if (batch_x is None) != (batch_y is None) and batch_size != 1:
            raise ValueError(f"{op}: batch_x and batch_y must be given both or neither")
    for name, batch, points in (("batch_x", batch_x, x), ("batch_y", batch_y, x if y is None else y)):
        if batch is not None:
            is_index_tensor(op, name, batch)
            has_shape(op, name, batch, points.shape[:1], "[N]" if name == "batch_x" else "[M]")
            if (batch[1:] < batch[:-1]).any():
                raise ValueError(f"{op}: {name} must ascend")
    same_device(op, "x", x, y=y, batch_x=batch_x, batch_y=batch_y)

    if batch_x is None or batch_y is None:
        found = search(x.detach(), k, queries=None if y is None else y.detach(), include_self=loop, check=False).indices
        query, slot = (found >= 0).nonzero(as_tuple=True)
        return torch.stack([query, found[query, slot]])
    batches = [batch_x] if y is None else [batch_x, batch_y]
    size = max([int(b[-1]) + 1 for b in batches if len(b)] + [batch_size or 0])
    points, starts, lengths = _padded(x.detach(), batch_x, size)
    if y is None:
        found = search(points, k, include_self=loop, lengths=lengths, check=False).indices
        query_starts = starts
    else:
        queries, query_starts, query_lengths = _padded(y.detach(), batch_y, size)
        found = search(points, k, queries=queries, lengths=lengths, query_lengths=query_lengths, check=False).indices
    b, row, slot = (found >= 0).nonzero(as_tuple=True)
    return torch.stack([row + query_starts[b], found[b, row, slot] + starts[b]])


def _padded(x: Tensor, batch: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Points of ascending batches as [size, most, D], with the first row and the length of each batch."""
    lengths = torch.bincount(batch, minlength=size)
    starts = lengths.cumsum(0) - lengths
    most = int(lengths.max()) if size else 0
    out = x.new_zeros(size, most, x.shape[1])
    out[batch, torch.arange(len(x), device=x.device) - starts[batch]] = x
    return out, starts, lengths


# ---- pytorch3d ------------------------------------------------------------------------------------------------------
class _KNN(NamedTuple):
    dists: Tensor  # [N, P1, K], squared for norm=2
    idx: Tensor  # int64 [N, P1, K]
    knn: Tensor | None  # [N, P1, K, D]


def knn_points(
    p1: Tensor,
    p2: Tensor,
    lengths1: Tensor | None = None,
    lengths2: Tensor | None = None,
    norm: int = 2,
    K: int = 1,
    version: int = -1,
    return_nn: bool = False,
    return_sorted: bool = True,
) -> _KNN:
    """Of each point of p1, the K nearest points of p2: ``_KNN(dists, idx, knn)``.

    Args:
        p1, p2: ``[N, P1, D]`` and ``[N, P2, D]``, with gradients from dists.
        lengths1, lengths2: int64 ``[N]``, how many points of each cloud count.
        norm: 2 for squared Euclidean distances, 1 for sums of absolute differences (all pairs in plain PyTorch).
        version: ignored: there is one.
        return_nn: also return the neighbours, ``[N, P1, K, D]``.
        return_sorted: results are always sorted.

    Rows past lengths1 and columns past the size of a cloud are 0 in dists, idx and knn.
    """
    for name, p in (("p1", p1), ("p2", p2)):
        is_float_tensor("knn_points", name, p)
        if p.ndim != 3:
            raise ValueError(f"knn_points: {name} must have shape [N, P, D], got {list(p.shape)}")
    has_shape("knn_points", "p2", p2, (p1.shape[0], p2.shape[1], p1.shape[2]), "[N, P2, D]")
    if norm not in (1, 2):
        raise ValueError(f"knn_points: norm must be 1 or 2, got {norm!r}")
    is_integer("knn_points", "K", K, 1, MOST_NEIGHBORS)
    for name, lengths in (("lengths1", lengths1), ("lengths2", lengths2)):
        if lengths is not None:
            is_index_tensor("knn_points", name, lengths)
            has_shape("knn_points", name, lengths, p1.shape[:1], "[N]")
    same_device("knn_points", "p1", p1, p2=p2, lengths1=lengths1, lengths2=lengths2)

    if norm == 2:
        found = search(p2, K, queries=p1, lengths=lengths2, query_lengths=lengths1, check=False)
        idx, dists = found
    else:
        idx = _nearest_by_absolute_differences(p1.detach(), p2.detach(), lengths1, lengths2, K)
        dists = (p1.unsqueeze(2) - _rows(p2, idx)).abs().sum(-1)
    present = idx >= 0
    dists = dists.where(present, 0).to(p1.dtype)
    idx = idx.where(present, 0)
    neighbors = _rows(p2, idx).where(present.unsqueeze(-1), 0) if return_nn else None
    return _KNN(dists, idx, neighbors)


def knn_gather(x: Tensor, idx: Tensor, lengths: Tensor | None = None) -> Tensor:
    """``out[n, l, k] = x[n, idx[n, l, k]]``: x ``[N, M, U]``, idx int64 ``[N, L, K]`` -> ``[N, L, K, U]``.

    Slots k from lengths[n] on are 0: that cloud has no such neighbour.
    """
    if not isinstance(x, Tensor) or x.ndim != 3:
        raise ValueError("knn_gather: x must be a tensor of shape [N, M, U], got "
                         f"{list(x.shape) if isinstance(x, Tensor) else type(x).__name__}")  # fmt: skip
    is_index_tensor("knn_gather", "idx", idx)
    if idx.ndim != 3 or idx.shape[0] != x.shape[0]:
        raise ValueError(f"knn_gather: idx must have shape [N, L, K] with N = {x.shape[0]}, got {list(idx.shape)}")
    out = _rows(x, idx)
    if lengths is not None:
        slots = torch.arange(idx.shape[2], device=x.device)
        out = out.where((slots < lengths.view(-1, 1)).view(x.shape[0], 1, -1, 1), 0)
    return out


def _rows(x: Tensor, idx: Tensor) -> Tensor:  # [N, M, U], [N, L, K] -> [N, L, K, U]; -1 reads row 0
    N, L, K = idx.shape
    if x.shape[1] == 0:
        return x.new_zeros(N, L, K, x.shape[2])
    flat = idx.clamp(min=0).reshape(N, L * K, 1).expand(-1, -1, x.shape[2])
    return x.gather(1, flat).view(N, L, K, x.shape[2])


def _nearest_by_absolute_differences(p1, p2, lengths1, lengths2, K) -> Tensor:
    N, P1, _ = p1.shape
    P2 = p2.shape[1]
    idx = torch.full((N, P1, K), -1, dtype=torch.int64, device=p1.device)
    step = max(1, (1 << 22) // max(1, P2 * p1.shape[2]))
    for n in range(N):
        m = P2 if lengths2 is None else int(lengths2[n])
        rows = P1 if lengths1 is None else int(lengths1[n])
        for first in range(0, rows, step):
            block = p1[n, first : min(first + step, rows)]
            dists = (block.unsqueeze(1) - p2[n, :m]).abs().sum(-1)
            order = dists.sort(dim=1, stable=True).indices[:, :K]
            idx[n, first : first + len(block), : order.shape[1]] = order
    return idx


# ---- PyG ------------------------------------------------------------------------------------------------------------
def knn_interpolate(
    x: Tensor,
    pos_x: Tensor,
    pos_y: Tensor,
    batch_x: Tensor | None = None,
    batch_y: Tensor | None = None,
    k: int = 3,
    num_workers: int = 1,
) -> Tensor:
    """Features at pos_y from the k nearest pos_x, weighted by 1 / squared distance (at least 1e-16).

    x ``[N, c]``, pos_x ``[N, D]``, pos_y ``[M, D]`` -> ``[M, c]``. Gradients to x; weights are constants. The source of
    the formula is PointNet++.
    """
    is_float_tensor("knn_interpolate", "x", x)
    has_shape("knn_interpolate", "x", x, (pos_x.shape[0], x.shape[-1]), "[N, c]")
    with torch.no_grad():
        query, neighbor = _edges("knn_interpolate", pos_x, pos_y, k, batch_x, batch_y, None, loop=True)
        step = pos_x[neighbor] - pos_y[query]
        weight = 1 / step.square().sum(-1, keepdim=True).clamp(min=1e-16)
        total = weight.new_zeros(pos_y.shape[0], 1).index_add(0, query, weight)
    weighted = x[neighbor] * weight
    return weighted.new_zeros(pos_y.shape[0], x.shape[1]).index_add(0, query, weighted) / total
