"""torch_cluster's functions, which PyG has under the same names."""

import torch
from torch import Tensor

from .._checks import are_flags, is_integer, is_number
from ..farthest_points import farthest_points
from ..knn import MOST_NEIGHBORS
from .sets import alone, edges, neighbors, offsets, side


def knn(
    x: Tensor,
    y: Tensor,
    k: int,
    batch_x: Tensor | None = None,
    batch_y: Tensor | None = None,
    cosine: bool = False,
    num_workers: int = 1,
    batch_size: int | None = None,
    *,
    ptr_x: Tensor | None = None,
    ptr_y: Tensor | None = None,
) -> Tensor:
    """For each point of y, the k nearest points of x of the same batch: int64 ``[2, E]``, (index in y, index in x).

    Args:
        x, y: ``[N, D]`` and ``[M, D]`` (or ``[N]`` and ``[M]``).
        batch_x, batch_y: int64 ``[N]`` and ``[M]``, ascending: which batch a point belongs to. One alone may be given
            if it speaks of one batch.
        cosine: not offered.
        num_workers: ignored; torch.set_num_threads decides.
        batch_size: number of batches, which saves looking for it.
        ptr_x, ptr_y: int64 ``[S + 1]``, instead of batch vectors: offsets of the batches.

    >>> import torch
    >>> knn(torch.tensor([[0.0], [1.0], [5.0]]), torch.tensor([[4.0]]), 2)
    tensor([[0, 0],
            [2, 1]])
    """
    _no_cosine("knn", cosine)
    of_x, of_y = side("knn", "x", x, batch_x, ptr_x), side("knn", "y", y, batch_y, ptr_y)
    return edges(neighbors("knn", of_x, of_y, k, batch_size).indices)


def knn_graph(
    x: Tensor,
    k: int,
    batch: Tensor | None = None,
    loop: bool = False,
    flow: str = "source_to_target",
    cosine: bool = False,
    num_workers: int = 1,
    batch_size: int | None = None,
    *,
    ptr: Tensor | None = None,
) -> Tensor:
    """The graph of k nearest neighbours: int64 ``[2, E]``.

    With ``flow="source_to_target"`` an edge is (neighbour, centre), with "target_to_source" (centre, neighbour).
    ``loop=False`` excludes a point itself, by its index: copies of it stay. ``ptr``: as in `knn`.
    """
    _no_cosine("knn_graph", cosine)
    are_flags("knn_graph", loop=loop)
    found = neighbors("knn_graph", alone(side("knn_graph", "x", x, batch, ptr)), None, k, batch_size, loop=loop)
    return edges(found.indices, _leads_to_query("knn_graph", flow))


def radius(
    x: Tensor,
    y: Tensor,
    r: float,
    batch_x: Tensor | None = None,
    batch_y: Tensor | None = None,
    max_num_neighbors: int = 32,
    num_workers: int = 1,
    batch_size: int | None = None,
    ignore_same_index: bool = False,
    *,
    ptr_x: Tensor | None = None,
    ptr_y: Tensor | None = None,
) -> Tensor:
    """For each point of y, the points of x of the same batch that are nearer than r: int64 ``[2, E]``, (y, x).

    Where there are more than ``max_num_neighbors`` (at most 1024), the nearest ones, ties by index; torch_cluster gives
    whichever it meets first. "Nearer" is ``|x - y|^2 < r * r`` in float32, or in float64 for float64 points.
    ``ignore_same_index`` leaves out pairs of equal index. The other arguments are those of `knn`.

    >>> import torch
    >>> radius(torch.tensor([[0.0], [1.0], [5.0]]), torch.tensor([[0.7]]), 1.0)
    tensor([[0, 0],
            [1, 0]])
    """
    are_flags("radius", ignore_same_index=ignore_same_index)
    k = max_num_neighbors
    of_x, of_y = side("radius", "x", x, batch_x, ptr_x), side("radius", "y", y, batch_y, ptr_y)
    options = dict(within=_square("radius", r), k_name="max_num_neighbors")
    if not ignore_same_index:
        return edges(neighbors("radius", of_x, of_y, k, batch_size, **options).indices)
    is_integer("radius", "max_num_neighbors", k, 1, MOST_NEIGHBORS - 1)
    # One more, of which the pair of equal index, or the last one, goes.
    found = neighbors("radius", of_x, of_y, k + 1, batch_size, **options).indices
    found = found.masked_fill(found == torch.arange(len(found), device=found.device)[:, None], -1)
    kept = (found >= 0).cumsum(1) <= k
    return edges(found.where(kept, -1))


def radius_graph(
    x: Tensor,
    r: float,
    batch: Tensor | None = None,
    loop: bool = False,
    max_num_neighbors: int = 32,
    flow: str = "source_to_target",
    num_workers: int = 1,
    batch_size: int | None = None,
    *,
    ptr: Tensor | None = None,
) -> Tensor:
    """The graph of the points nearer than r: int64 ``[2, E]``, directed as in `knn_graph`.

    Every point has its nearest ``max_num_neighbors``, ties by index; itself is one of them with ``loop``.
    """
    are_flags("radius_graph", loop=loop)
    of_x = alone(side("radius_graph", "x", x, batch, ptr))
    found = neighbors("radius_graph", of_x, None, max_num_neighbors, batch_size, loop=loop,
                      within=_square("radius_graph", r), k_name="max_num_neighbors")  # fmt: skip
    return edges(found.indices, _leads_to_query("radius_graph", flow))


def nearest(
    x: Tensor,
    y: Tensor,
    batch_x: Tensor | None = None,
    batch_y: Tensor | None = None,
    *,
    batch_size: int | None = None,
    ptr_x: Tensor | None = None,
    ptr_y: Tensor | None = None,
) -> Tensor:
    """For each point of x the nearest point of y of the same batch: int64 ``[N]``; -1 where its batch has none.

    >>> import torch
    >>> nearest(torch.tensor([[0.0], [1.0], [5.0]]), torch.tensor([[0.9], [4.0]]))
    tensor([0, 0, 1])
    """
    of_x, of_y = side("nearest", "x", x, batch_x, ptr_x), side("nearest", "y", y, batch_y, ptr_y)
    return neighbors("nearest", of_y, of_x, 1, batch_size).indices[:, 0]


def fps(
    src: Tensor,
    batch: Tensor | None = None,
    ratio: float | Tensor | None = None,
    random_start: bool = True,
    batch_size: int | None = None,
    ptr: Tensor | list[int] | None = None,
) -> Tensor:
    """Farthest point sampling: of every batch ``ceil(ratio * n)`` points, int64, batch after batch.

    Each is the one farthest from those already chosen; ties go to the lower index, and no point is chosen twice.

    Args:
        src: ``[N, D]`` (or ``[N]``). batch: int64 ``[N]``, ascending.
        ratio: above 0 and at most 1, 0.5 without it; or a tensor, one per batch.
        random_start: begin with a random point of each batch instead of its first.
        batch_size, ptr: as in `knn`.

    >>> import torch
    >>> fps(torch.tensor([[0.0], [1.0], [5.0], [4.0]]), ratio=0.5, random_start=False)
    tensor([0, 2])
    """
    are_flags("fps", random_start=random_start)
    if isinstance(ptr, (list, tuple)):
        ptr = torch.tensor(ptr, device=src.device if isinstance(src, Tensor) else None)
    one = alone(side("fps", "src", src, batch, ptr))
    (offset,) = offsets("fps", [one], batch_size)
    if offset is None:
        offset = torch.tensor([0, len(one.points)], device=src.device)
    ratio = 0.5 if ratio is None else ratio
    if isinstance(ratio, Tensor):
        if ratio.numel() not in (1, len(offset) - 1):
            raise ValueError(
                f"fps: ratio must hold one number or one per batch, {len(offset) - 1}, got {ratio.numel()}"
            )
        ratio = ratio.to(offset.device, torch.float32).flatten()
    else:
        is_number("fps", "ratio", ratio)
    if not (0 < torch.as_tensor(ratio)).logical_and(torch.as_tensor(ratio) <= 1).all():
        raise ValueError(f"fps: ratio must be above 0 and at most 1, got {ratio}")
    sizes = offset.diff()
    out_ptr = torch.nn.functional.pad((sizes.float() * ratio).ceil().long().cumsum(0), (1, 0))
    start = (torch.rand(len(sizes), device=offset.device) * sizes).long() if random_start else None
    return farthest_points(one.points, offset, out_ptr, int(out_ptr[-1]), start)


def _no_cosine(op: str, cosine: bool) -> None:
    if cosine:
        raise NotImplementedError(
            f"{op}: cosine=True is not offered: pass torch.nn.functional.normalize(x, dim=-1), it orders the same"
        )


def _leads_to_query(op: str, flow: str) -> bool:
    if flow not in ("source_to_target", "target_to_source"):
        raise ValueError(f"{op}: flow must be 'source_to_target' or 'target_to_source', got {flow!r}")
    return flow == "source_to_target"


def _square(op: str, r: object) -> float:
    is_number(op, "r", r)
    if not r >= 0:
        raise ValueError(f"{op}: r must not be negative, got {r}")
    return float(r) ** 2
