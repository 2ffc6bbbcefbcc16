"""pytorch3d's functions on padded clouds ``[N, P, D]`` with lengths."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .._checks import are_flags, has_shape, is_float_tensor, is_index_tensor, is_integer, is_number, same_device
from ..farthest_points import farthest_points
from ..knn import MOST_NEIGHBORS
from ..knn import _search as search


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
        norm: 2 for squared Euclidean distances, 1 for sums of absolute differences.
        version: ignored: there is one.
        return_nn: also return the neighbours, ``[N, P1, K, D]``.
        return_sorted: results are always sorted.

    Rows past lengths1 and columns past the size of a cloud are 0 in dists, idx and knn. What is not a number stays so:
    where fewer than K distances are finite, the other points follow in the order of their indices, with a distance of
    inf or NaN, which the loss of a diverged model then shows.
    """
    _clouds("knn_points", p1, p2, lengths1, lengths2)
    if norm not in (1, 2):
        raise ValueError(f"knn_points: norm must be 1 or 2, got {norm!r}")
    is_integer("knn_points", "K", K, 1, MOST_NEIGHBORS)
    idx, dists = search(p2, K, p1, False, True, lengths2, lengths1, False, None, absolute=norm == 1)

    N, P1, _ = p1.shape
    P2 = p2.shape[1]
    slots = torch.arange(K, device=p1.device)
    exists = (slots < P2 if lengths2 is None else slots < lengths2.view(N, 1, 1)).expand(N, P1, K)
    if lengths1 is not None:
        exists = exists & (torch.arange(P1, device=p1.device)[:, None] < lengths1.view(N, 1, 1))
    beyond = exists & (idx < 0)  # their distance overflows, or is none
    if P2 and (not _is_eager_cpu(idx) or beyond.any()):
        idx = torch.where(beyond, _not_listed(idx), idx)
        step = (p1.unsqueeze(2) - _rows(p2, idx)).where(beyond.unsqueeze(-1), 0)
        dists = torch.where(beyond, (step.abs() if norm == 1 else step.square()).sum(-1).to(dists.dtype), dists)
    dists = dists.where(exists, 0).to(p1.dtype)
    neighbors = _rows(p2, idx).where(exists.unsqueeze(-1), 0) if return_nn else None
    return _KNN(dists, idx.where(exists, 0), neighbors)


def knn_gather(x: Tensor, idx: Tensor, lengths: Tensor | None = None) -> Tensor:
    """``out[n, l, k] = x[n, idx[n, l, k]]``: x ``[N, M, U]``, idx int64 ``[N, L, K]`` -> ``[N, L, K, U]``.

    Slots k from lengths[n] on (from M on without lengths) are 0: that cloud has no such neighbour. So are those of an
    index below 0.
    """
    if not isinstance(x, Tensor) or x.ndim != 3:
        raise ValueError("knn_gather: x must be a tensor of shape [N, M, U], got "
                         f"{list(x.shape) if isinstance(x, Tensor) else type(x).__name__}")  # fmt: skip
    is_index_tensor("knn_gather", "idx", idx)
    if idx.ndim != 3 or idx.shape[0] != x.shape[0]:
        raise ValueError(f"knn_gather: idx must have shape [N, L, K] with N = {x.shape[0]}, got {list(idx.shape)}")
    slots = torch.arange(idx.shape[2], device=idx.device)
    _lengths("knn_gather", "lengths", lengths, x, "x")
    same_device("knn_gather", "x", x, idx=idx)
    exists = (idx >= 0) & (slots < (x.shape[1] if lengths is None else lengths.view(-1, 1, 1)))
    return _rows(x, idx.where(exists, 0)).where(exists.unsqueeze(-1), 0)


def ball_query(
    p1: Tensor,
    p2: Tensor,
    lengths1: Tensor | None = None,
    lengths2: Tensor | None = None,
    K: int = 500,
    radius: float = 0.2,
    return_nn: bool = True,
    skip_points_outside_cube: bool = False,
) -> _KNN:
    """Of each point of p1, the K nearest points of p2 that are nearer than radius: ``_KNN(dists, idx, knn)``.

    Ascending by (distance, index), where pytorch3d gives the first K by index. Where there are fewer, idx is -1 and
    dists and knn are 0. dists are squared, with gradients to both clouds. ``skip_points_outside_cube`` is ignored: it
    changes no result.
    """
    _clouds("ball_query", p1, p2, lengths1, lengths2)
    is_integer("ball_query", "K", K, 1, MOST_NEIGHBORS)
    is_number("ball_query", "radius", radius)
    idx, dists = search(p2, K, p1, False, True, lengths2, lengths1, False, None, within=float(radius) ** 2)
    found = idx >= 0
    neighbors = _rows(p2, idx.where(found, 0)).where(found.unsqueeze(-1), 0) if return_nn else None
    return _KNN(dists.where(found, 0).to(p1.dtype), idx, neighbors)


def sample_farthest_points(
    points: Tensor,
    lengths: Tensor | None = None,
    K: int | Sequence[int] | Tensor = 50,
    random_start_point: bool = False,
) -> tuple[Tensor, Tensor]:
    """Of each cloud K points, each the farthest from those before it: ``(selected [N, K, D], idx [N, K])``.

    Ties go to the lower index, and no point is chosen twice. K may differ from cloud to cloud: the largest then counts
    for the shape. Where a cloud has fewer points, or asks for fewer, idx is -1 and selected 0. Gradients go through
    selected.
    """
    op = "sample_farthest_points"
    is_float_tensor(op, "points", points)
    if points.ndim != 3:
        raise ValueError(f"{op}: points must have shape [N, P, D], got {list(points.shape)}")
    N, P, D = points.shape
    _lengths(op, "lengths", lengths, points, "points")
    are_flags(op, random_start_point=random_start_point)
    device = points.device
    wanted = None
    if isinstance(K, (list, tuple, Tensor)):
        wanted = torch.as_tensor(K, device=device)
        has_shape(op, "K", wanted, (N,), "[N]")
        K = int(wanted.max()) if N else 0
    is_integer(op, "K", K, 0, 2**31)

    x = points.detach().reshape(N * P, D)
    if lengths is not None:  # points that are not finite come last
        padding = torch.arange(P, device=device) >= lengths[:, None]
        x = x.masked_fill(padding.view(N * P, 1), torch.nan)
    start = None
    if random_start_point:
        most = lengths if lengths is not None else torch.full((N,), P, device=device)
        start = (torch.rand(N, device=device) * most).long()
    clouds = torch.arange(N + 1, device=device)
    idx = farthest_points(x, clouds * P, clouds * K, N * K, start).view(N, K)
    idx = idx.where(idx < 0, idx - clouds[:N, None] * P)
    slots = torch.arange(K, device=device)
    for most in (lengths, wanted):
        if most is not None:
            idx = idx.masked_fill(slots >= most[:, None], -1)
    selected = _rows(points, idx.clamp(min=0).unsqueeze(1)).squeeze(1) if P else points.new_zeros(N, K, D)
    return selected.where(idx.unsqueeze(-1) >= 0, 0), idx


def chamfer_distance(
    x: Tensor,
    y: Tensor,
    x_lengths: Tensor | None = None,
    y_lengths: Tensor | None = None,
    x_normals: Tensor | None = None,
    y_normals: Tensor | None = None,
    weights: Tensor | None = None,
    batch_reduction: str | None = "mean",
    point_reduction: str | None = "mean",
    norm: int = 2,
    single_directional: bool = False,
    abs_cosine: bool = True,
):
    """The distance between clouds: every point's to the nearest one of the other cloud, ``(loss, loss_normals)``.

    Args:
        x, y: ``[N, P1, D]`` and ``[N, P2, D]``. x_lengths, y_lengths: int64 ``[N]``.
        x_normals, y_normals: ``[N, P, D]`` both, for the loss ``1 - |cos|`` between normals of neighbours; or neither.
        weights: ``[N]``, not negative.
        batch_reduction: "mean" (by weight), "sum" or None. point_reduction: "mean", "sum", "max" or None: then nothing
            is reduced, and loss is a pair, or with ``single_directional`` one tensor.
        norm: 2 for squares, 1 for absolute differences.
        single_directional: from x to y only.
        abs_cosine: False for ``1 - cos``.
    """
    op = "chamfer_distance"
    for name, value, known in (("batch_reduction", batch_reduction, ("mean", "sum", None)),
                               ("point_reduction", point_reduction, ("mean", "sum", "max", None))):  # fmt: skip
        if value not in known:
            raise ValueError(f"{op}: {name} must be one of {', '.join(map(str, known))}, got {value!r}")
    _clouds(op, x, y, x_lengths, y_lengths, ("x", "y", "x_lengths", "y_lengths"))
    if (x_normals is None) != (y_normals is None):
        name = "x_normals" if x_normals is None else "y_normals"
        raise ValueError(f"{op}: {name} must be given with the other normals, got None")
    if x_normals is not None:
        if point_reduction == "max":
            raise ValueError(f"{op}: x_normals must be None with point_reduction='max'")
        has_shape(op, "x_normals", x_normals, x.shape, "like x")
        has_shape(op, "y_normals", y_normals, y.shape, "like y")
    if weights is not None:
        is_float_tensor(op, "weights", weights)
        has_shape(op, "weights", weights, x.shape[:1], "[N]")
        if _is_eager_cpu(weights) and (weights < 0).any():
            raise ValueError(f"{op}: weights must not be negative, got {weights.min().item()}")

    def one_way(p, q, lengths_p, lengths_q, normals_p, normals_q) -> list[Tensor | None]:
        near = knn_points(p, q, lengths_p, lengths_q, norm=norm, K=1)
        parts = [near.dists[..., 0], None]  # [N, P]
        if normals_p is not None:
            other = knn_gather(normals_q, near.idx, lengths_q)[..., 0, :]
            cosine = torch.nn.functional.cosine_similarity(normals_p, other, dim=2, eps=1e-6)
            parts[1] = 1 - (cosine.abs() if abs_cosine else cosine)
        if lengths_p is not None:
            real = torch.arange(p.shape[1], device=p.device) < lengths_p[:, None]
            parts = [part if part is None else part.where(real, 0) for part in parts]
        if weights is not None:
            parts = [part if part is None else part * weights[:, None] for part in parts]
        if point_reduction == "max":
            return [parts[0].amax(1), None]
        if point_reduction is None:
            return parts
        count = 1
        if point_reduction == "mean":
            count = max(p.shape[1], 1) if lengths_p is None else lengths_p.clamp(min=1)
        return [part if part is None else part.sum(1) / count for part in parts]

    forth = one_way(x, y, x_lengths, y_lengths, x_normals, y_normals)
    if single_directional:
        losses = forth
    else:
        back = one_way(y, x, y_lengths, x_lengths, y_normals, x_normals)
        if point_reduction is None:
            return (forth[0], back[0]), None if forth[1] is None else (forth[1], back[1])
        combine = torch.maximum if point_reduction == "max" else torch.add
        losses = [None if f is None else combine(f, b) for f, b in zip(forth, back, strict=True)]
    if point_reduction is None or batch_reduction is None:
        return tuple(losses)
    whole = 1
    if batch_reduction == "mean":
        whole = max(len(x), 1)
        if weights is not None:
            whole = weights.sum()
            whole = whole.where(whole != 0, 1)
    return tuple(part if part is None else part.sum() / whole for part in losses)


# ---- what they share ------------------------------------------------------------------------------------------------
def _clouds(op, p1, p2, lengths1, lengths2, names=("p1", "p2", "lengths1", "lengths2")) -> None:
    for name, p in zip(names, (p1, p2), strict=False):
        is_float_tensor(op, name, p)
        if p.ndim != 3:
            raise ValueError(f"{op}: {name} must have shape [N, P, D], got {list(p.shape)}")
    has_shape(op, names[1], p2, (p1.shape[0], p2.shape[1], p1.shape[2]), "[N, P2, D]")
    _lengths(op, names[2], lengths1, p1, names[0])
    _lengths(op, names[3], lengths2, p1, names[0])
    same_device(op, names[0], p1, **{names[1]: p2})


def _lengths(op: str, name: str, lengths: Tensor | None, like: Tensor, like_name: str) -> None:
    if lengths is not None:
        is_index_tensor(op, name, lengths)
        has_shape(op, name, lengths, like.shape[:1], "[N]")
        same_device(op, like_name, like, **{name: lengths})


def _is_eager_cpu(x: Tensor) -> bool:
    """Whether to look at values costs no wait, and nobody traces."""
    return (
        x.device.type == "cpu" and not torch.compiler.is_compiling() and not torch._C._are_functorch_transforms_active()
    )


def _rows(x: Tensor, idx: Tensor) -> Tensor:  # [N, M, U], [N, L, K] -> [N, L, K, U]; below 0 reads row 0
    N, L, K = idx.shape
    if x.shape[1] == 0:
        return x.new_zeros(N, L, K, x.shape[2])
    flat = idx.clamp(min=0).reshape(N, L * K, 1).expand(-1, -1, x.shape[2])
    return x.gather(1, flat).view(N, L, K, x.shape[2])


def _not_listed(idx: Tensor) -> Tensor:
    """For lists [.., K] that end with -1: in those places, ascending, the lowest indices that are not listed."""
    K = idx.shape[-1]
    slots = torch.arange(K, device=idx.device)
    count = (idx >= 0).sum(-1, keepdim=True)
    listed = idx.where(idx >= 0, torch.iinfo(torch.int64).max // 2).sort(-1).values
    number = slots - count  # of the place among those
    # The i-th listed index has listed[i] - i unlisted ones below it.
    return number + torch.searchsorted(listed - slots, number.clamp(min=0), right=True)
