"""The cases, named once: inputs, our op, the best that one can compose or install instead, what counts as right.

Tests take their inputs from here too (tests/test_bench.py runs every case at its small size).
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

import dfn_kernels as dk


@dataclass(frozen=True)
class Case:
    op: str
    sizes: dict[str, int]
    make: Callable[..., dict]  # (device=, dtype=, **sizes) -> inputs
    ours: Callable[..., Tensor]  # (**inputs) -> one tensor; run under use_backend for each backend
    peers: dict[str, Callable[..., Tensor]] = field(default_factory=dict)  # the same, by other means
    gpu_peers: dict[str, Callable[..., Tensor]] = field(default_factory=dict)  # those that take CUDA tensors only
    grads: tuple[str, ...] = ()  # inputs whose gradients the training step needs
    small: dict[str, int] = field(default_factory=dict)  # sizes for tests and for a quick look
    other_work: tuple[str, ...] = ()  # peers that do a comparable job, not the same one: their result is not compared
    work: Callable[..., tuple[float, float]] | None = None  # (**sizes, itemsize=) -> bytes moved, operations
    exact: bool = False  # the result must be equal, not just close

    @property
    def name(self) -> str:
        return self.op + "".join(f"-{letter}{size}" for letter, size in self.sizes.items())


# ---- flow_drift -----------------------------------------------------------------------------------------------------
def make_drift(B, N, d, D, *, device, dtype):
    return {
        "states": torch.randn(B, N, d, device=device, dtype=dtype),
        "positions": torch.rand(B, N, D, device=device),
        "weight": torch.randn(D, d, device=device) / d**0.5,
        "bias": torch.randn(D, device=device),
    }


def our_drift(**inputs):
    return torch.cat([x if x.ndim == 3 else x.unsqueeze(-1) for x in dk.flow_drift(**inputs)], -1)


def composed_drift(states, positions, weight, bias):
    flow = F.linear(states, weight.to(states.dtype), bias.to(states.dtype)).float()
    return torch.cat([positions + 0.1 * flow, flow, flow.square().sum(-1, keepdim=True)], -1)


# ---- flow_norm ------------------------------------------------------------------------------------------------------
def make_norm(B, N, d, *, device, dtype):
    return {
        "states": torch.randn(B, N, d, device=device, dtype=dtype),
        "energy": torch.rand(B, N, device=device) + 0.1,
    }


def our_norm(states, energy):
    return dk.flow_norm(states, energy, mode="causal")


def composed_norm(states, energy):
    mean = energy.cumsum(1) / torch.arange(1, energy.shape[1] + 1, device=energy.device)
    return (states * (mean + 1e-6).rsqrt().unsqueeze(-1)).to(states.dtype)


# ---- knn ------------------------------------------------------------------------------------------------------------
def make_points(B, N, D, k, *, device, dtype):
    return {"positions": torch.rand(B, N, D, device=device), "k": k}


def our_knn(positions, k):
    return dk.knn(positions, k).indices


def causal_knn(positions, k):
    return dk.knn(positions, k, causal=True).indices


def composed_knn(positions, k):
    """Distances and top-k, in slices that fit the cache: the way without a package."""
    found = []
    for points in positions:
        step = max(1, 2**24 // len(points))
        slices = [torch.cdist(q, points, compute_mode="donot_use_mm_for_euclid_dist") for q in points.split(step)]
        found.append(torch.cat([d.topk(k, largest=False).indices for d in slices]))
    return torch.stack(found)


def scipy_knn(positions, k):
    from scipy.spatial import cKDTree

    found = [cKDTree(p).query(p, k, workers=-1)[1].reshape(len(p), k) for p in positions.cpu().numpy()]
    return torch.stack([torch.from_numpy(x) for x in found]).to(positions.device)


def cupy_knn(positions, k):
    import cupy
    from cupyx.scipy.spatial import KDTree

    points = [cupy.from_dlpack(p) for p in positions]
    return torch.stack([torch.from_dlpack(KDTree(p).query(p, k)[1].reshape(len(p), k)).long() for p in points])


# ---- gaussian_gather ------------------------------------------------------------------------------------------------
def make_gather(B, H, N, D, c, k, *, device, dtype):
    positions = torch.rand(B, H, N, D, device=device)
    return {
        "positions": positions,
        "values": torch.randn(B, H, N, c, device=device, dtype=dtype),
        "indices": dk.knn(positions, k).indices,
        "sigma": torch.full((H,), (k / N) ** (1 / D), device=device),
    }


def our_gather(**inputs):
    return dk.gaussian_gather(**inputs)


def indexed_gather(positions, values, indices, sigma):
    """What one writes first: index, then einsum; [N, k, c] exists."""
    B, H, N, k = indices.shape
    b, h = torch.arange(B).view(B, 1, 1, 1), torch.arange(H).view(1, H, 1, 1)
    b, h = b.to(indices.device), h.to(indices.device)
    sq_dists = (positions.unsqueeze(3) - positions[b, h, indices]).square().sum(-1)
    weights = torch.exp(-sq_dists / (2 * sigma.view(1, H, 1, 1) ** 2))
    return torch.einsum("bhnk,bhnkc->bhnc", weights.to(values.dtype), values[b, h, indices])


def _bag_weights(positions, indices, sigma):
    B, H, N, k = indices.shape
    rows = positions.flatten(0, 2)
    offset = torch.arange(B * H, device=indices.device).view(B, H, 1, 1) * N
    flat = (indices + offset).flatten(0, 2)
    sq_dists = (rows.unsqueeze(1) - rows[flat]).square().sum(-1)
    inverse = (-0.5 / sigma.square()).view(1, H, 1, 1).expand(B, H, N, 1).reshape(-1, 1)
    return flat, torch.exp(sq_dists * inverse)


_compiled_bag_weights = torch.compile(_bag_weights, dynamic=True)


def bagged_gather(positions, values, indices, sigma):
    """The best composition: compiled weights around F.embedding_bag, which never builds [N, k, c]."""
    flat, weights = _compiled_bag_weights(positions, indices, sigma)
    table = values.flatten(0, 2)
    return F.embedding_bag(flat, table, per_sample_weights=weights.to(table.dtype), mode="sum").view(values.shape)


# ---- flow_attention -------------------------------------------------------------------------------------------------
def make_attention(B, H, N, D, d, k, *, device, dtype):
    return {
        "states": torch.randn(B, N, d, device=device, dtype=dtype),
        "positions": torch.rand(B, H, N, D, device=device),
        "flow_weight": torch.randn(H, D, d, device=device) * 0.1 / (d**0.5 * N ** (1 / D)),
        "values": torch.randn(B, H, N, d // H, device=device, dtype=dtype),
        "sigma": torch.full((H,), (k / N) ** (1 / D), device=device),
        "k": k,
    }


def our_attention(k, **inputs):
    return dk.flow_attention(**inputs, k=k, causal=True)[0]


def sdpa(states, values, **unused):
    heads = states.unflatten(-1, (values.shape[1], -1)).transpose(1, 2)
    return F.scaled_dot_product_attention(heads, heads, values, is_causal=True)


# ---- routing --------------------------------------------------------------------------------------------------------
def make_route(T, P, I, O, *, device, dtype):
    return {
        "x": torch.randn(T, I, device=device, dtype=dtype),
        "weights": torch.randn(T, P, device=device).softmax(-1).to(dtype),
        "patterns": torch.randn(P, O, I, device=device, dtype=dtype) / I**0.5,
    }


def our_route(**inputs):
    return dk.pattern_route(**inputs)


def published_route(x, weights, patterns):
    mixed = torch.einsum("tp,poi->toi", weights, patterns)
    return torch.einsum("toi,ti->to", mixed, x)


def prescaled_route(x, weights, patterns):
    """The best composition: scale x by every weight, then one GEMM; [T, P*I] exists."""
    P, O, I = patterns.shape
    scaled = (weights.unsqueeze(-1) * x.unsqueeze(-2)).flatten(-2)
    return scaled @ patterns.transpose(1, 2).reshape(P * I, O)


def make_low_rank(T, P, I, O, r, *, device, dtype):
    inputs = make_route(T, P, I, O, device=device, dtype=dtype)
    del inputs["patterns"]
    inputs["up"] = torch.randn(P, O, r, device=device, dtype=dtype) / r**0.5
    inputs["down"] = torch.randn(P, r, I, device=device, dtype=dtype) / I**0.5
    return inputs


def our_low_rank(**inputs):
    return dk.low_rank_route(**inputs)


def composed_low_rank(x, weights, up, down):
    return torch.einsum("por,tpr->to", up, weights.unsqueeze(-1) * torch.einsum("pri,ti->tpr", down, x))


# ---- field_sample ---------------------------------------------------------------------------------------------------
def make_density(B, G, n, *, device, dtype):
    return {"density": torch.rand(B, G, device=device).square(), "n": n}


def our_sample(density, n):
    return dk.field_sample(density, n)[0]


def multinomial(density, n):
    cell = torch.multinomial(density, n, replacement=True)
    return ((cell + torch.rand(cell.shape, device=cell.device)) / density.shape[1]).unsqueeze(-1)


def _gather_work(B, H, N, D, c, k, itemsize):
    return B * H * N * (2 * c * itemsize + k * 8 + D * 4), 2 * B * H * N * k * (c + D)


def _route_work(T, P, I, O, itemsize):
    return (T * (I + P + O) + P * O * I) * itemsize, 2 * T * P * O * I


def _gather_case(B, H, N, D, c, k):
    return Case(
        "gaussian_gather",
        dict(B=B, H=H, N=N, D=D, c=c, k=k),
        make_gather,
        our_gather,
        {"index + einsum": indexed_gather, "embedding_bag, compiled weights": bagged_gather},
        grads=("positions", "values", "sigma"),
        small=dict(B=2, H=2, N=257, D=3, c=37, k=5),
        work=_gather_work,
    )


def _knn_case(N, D, k, causal=False):
    return Case(
        "knn",
        dict(B=1, N=N, D=D, k=k),
        make_points,
        causal_knn if causal else our_knn,
        {} if causal else {"scipy cKDTree": scipy_knn, **({"cdist + topk": composed_knn} if N <= 2**15 else {})},
        gpu_peers={} if causal else {"CuPy KDTree": cupy_knn},
        small=dict(B=2, N=301, D=D, k=min(k, 7)),
        exact=True,
    )


def _route_case(T, P, I, O):
    return Case(
        "pattern_route",
        dict(T=T, P=P, I=I, O=O),
        make_route,
        our_route,
        {**({"published einsums": published_route} if T <= 1024 else {}), "prescaled GEMM": prescaled_route},
        grads=("x", "weights", "patterns"),
        small=dict(T=67, P=5, I=23, O=31),
        work=_route_work,
    )


CASES = [
    Case("flow_drift", dict(B=4, N=8192, d=256, D=3), make_drift, our_drift, {"F.linear": composed_drift},
         grads=("states", "positions", "weight", "bias"), small=dict(B=2, N=67, d=37, D=3),
         work=lambda B, N, d, D, itemsize: (B * N * (d * itemsize + 3 * D * 4 + 4), 2 * B * N * d * D)),
    Case("flow_norm", dict(B=4, N=8192, d=256), make_norm, our_norm, {"cumsum, rsqrt": composed_norm},
         grads=("states", "energy"), small=dict(B=2, N=67, d=37),
         work=lambda B, N, d, itemsize: (B * N * (2 * d * itemsize + 4), B * N * d)),
    _knn_case(32_768, 3, 16),
    _knn_case(32_768, 2, 16),
    _knn_case(1_000_000, 2, 16),
    _knn_case(1_000_000, 3, 16),
    _gather_case(1, 1, 32_768, 3, 64, 16),
    _gather_case(1, 1, 32_768, 3, 256, 16),
    _gather_case(1, 1, 262_144, 3, 64, 16),
    Case("flow_attention", dict(B=1, H=4, N=32_768, D=3, d=256, k=16), make_attention, our_attention,
         {"causal SDPA, same d": sdpa}, grads=("states", "positions", "flow_weight", "values", "sigma"),
         small=dict(B=2, H=2, N=131, D=3, d=26, k=5), other_work=("causal SDPA, same d",)),
    _route_case(1024, 8, 512, 512),
    _route_case(8192, 8, 512, 512),
    Case("low_rank_route", dict(T=8192, P=8, I=512, O=512, r=32), make_low_rank, our_low_rank,
         {"two einsums": composed_low_rank}, grads=("x", "weights", "up", "down"),
         small=dict(T=67, P=5, I=23, O=31, r=3)),
    Case("field_sample", dict(B=4, G=65_536, n=16_384), make_density, our_sample, {"multinomial": multinomial},
         small=dict(B=2, G=301, n=67), other_work=("multinomial", "reference")),
]  # fmt: skip

# One case an op, for the demo's table: small enough that the reference, too, answers at once.
QUICK = {
    "flow_drift": dict(B=1), "flow_norm": dict(B=1), "knn": dict(N=8192), "gaussian_gather": dict(N=16_384),
    "flow_attention": dict(N=2048), "pattern_route": {}, "low_rank_route": dict(T=1024), "field_sample": {},
}  # fmt: skip


def quick_cases() -> list[Case]:
    first = {op: next(case for case in CASES if case.op == op) for op in QUICK}
    return [replace(first[op], sizes={**first[op].sizes, **sizes}) for op, sizes in QUICK.items()]
