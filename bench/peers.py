"""What one can compose of PyTorch, or install, instead of our ops: the peers of the benchmark.

Each takes the inputs of its case and returns what our op returns. A package that is not installed raises ImportError:
its row says so. `make bench` installs those that pip has.
"""

import torch
import torch.nn.functional as F
from torch import nn


# ---- flow_drift, flow_norm -------------------------------------------------------------------------------------------
def composed_drift(states, positions, weight, bias):
    flow = F.linear(states, weight.to(states.dtype), bias.to(states.dtype)).float()
    return torch.cat([positions + 0.1 * flow, flow, flow.square().sum(-1, keepdim=True)], -1)


def composed_norm(states, energy):
    mean = energy.cumsum(1) / torch.arange(1, energy.shape[1] + 1, device=energy.device)
    return (states * (mean + 1e-6).rsqrt().unsqueeze(-1)).to(states.dtype)


# ---- short_convolution ----------------------------------------------------------------------------------------------
def depthwise_convolution(x, weight):
    before = F.pad(x.transpose(1, 2), (len(weight) - 1, 0))
    taps = weight.to(x.dtype).t().flip(1).unsqueeze(1)
    return F.conv1d(before, taps, groups=x.shape[2]).transpose(1, 2)


def shifted_sums(x, weight):
    W, N = len(weight), x.shape[1]
    before = F.pad(x, (0, 0, W - 1, 0))
    return sum(before[:, W - 1 - t : W - 1 - t + N] * weight[t] for t in range(W)).to(x.dtype)


# ---- knn ------------------------------------------------------------------------------------------------------------
def composed_knn(positions, k):
    """Distances and top-k, in slices that fit the cache: the way without a package."""
    found = []
    for points in positions:
        step = max(1, 2**24 // len(points))
        slices = [torch.cdist(q, points, compute_mode="donot_use_mm_for_euclid_dist") for q in points.split(step)]
        found.append(torch.cat([d.topk(k, largest=False).indices for d in slices]))
    return torch.stack(found)


def product_knn(positions, k):
    """|p|^2 - 2 q.p by a matrix product, and top-k: the fastest that PyTorch has. Neighbours that are nearly as far as
    the right ones may stand in their place."""
    found = []
    for points in positions:
        norms = points.square().sum(-1)
        slices = points.split(max(1, 2**24 // len(points)))
        found.append(torch.cat([(norms - 2 * q @ points.T).topk(k, largest=False).indices for q in slices]))
    return torch.stack(found)


def measured_product_knn(positions, k):
    """The nearest 2k so, and of these the k nearest by differences: right, unless products are far off."""
    among = product_knn(positions, min(2 * k, positions.shape[1])).sort().values
    found = []
    for points, ids in zip(positions, among, strict=True):
        step = max(1, 2**24 // (ids.shape[1] * points.shape[1]))
        for q, of in zip(points.split(step), ids.split(step), strict=True):
            sq_dists = (points[of] - q.unsqueeze(1)).square().sum(-1)
            found.append(of.gather(1, sq_dists.sort(stable=True).indices[:, :k]))
    return torch.cat(found).view(*positions.shape[:2], k)


def scipy_knn(positions, k):
    from scipy.spatial import cKDTree

    found = [cKDTree(p).query(p, k, workers=-1)[1].reshape(len(p), k) for p in positions.cpu().numpy()]
    return torch.stack([torch.from_numpy(x) for x in found]).to(positions.device)


def nanoflann_knn(positions, k):
    from pynanoflann import KDTree

    found = []
    for points in positions.cpu().numpy():
        tree = KDTree(n_neighbors=k, metric="L2", leaf_size=10)
        tree.fit(points)
        found.append(torch.from_numpy(tree.kneighbors(points, n_jobs=torch.get_num_threads())[1].astype("int64")))
    return torch.stack(found)


def faiss_knn(positions, k):
    """Brute force; faiss has no exact tree."""
    import faiss

    found = []
    for points in positions.cpu().numpy():
        index = faiss.IndexFlatL2(points.shape[1])
        index.add(points)
        found.append(torch.from_numpy(index.search(points, k)[1]))
    return torch.stack(found)


def keops_knn(positions, k):
    """Brute force in generated C++ or CUDA."""
    from pykeops.torch import LazyTensor

    queries, points = LazyTensor(positions.unsqueeze(2)), LazyTensor(positions.unsqueeze(1))
    return ((queries - points) ** 2).sum(-1).argKmin(k, dim=2)


def cupy_knn(positions, k):
    import cupy
    from cupyx.scipy.spatial import KDTree

    points = [cupy.from_dlpack(p) for p in positions]
    return torch.stack([torch.from_dlpack(KDTree(p).query(p, k)[1].reshape(len(p), k)).long() for p in points])


# ---- gaussian_gather, flow_attention --------------------------------------------------------------------------------
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


def sparse_gather(positions, values, indices, sigma):
    """The weights as a sparse matrix [N, N], then one product with it."""
    B, H, N, k = indices.shape
    flat, weights = _bag_weights(positions, indices, sigma)
    rows = torch.arange(0, flat.numel() + 1, k, device=flat.device)
    order = flat.sort(dim=1)  # columns of a row must ascend
    weights = weights.to(values.dtype).gather(1, order.indices)
    matrix = torch.sparse_csr_tensor(
        rows, order.values.flatten(), weights.flatten(), (B * H * N, B * H * N), check_invariants=False
    )
    return (matrix @ values.flatten(0, 2)).view(values.shape)


def sdpa(states, values, **unused):
    heads = states.unflatten(-1, (values.shape[1], -1)).transpose(1, 2)
    return F.scaled_dot_product_attention(heads, heads, values, is_causal=True)


# ---- routing, sampling ----------------------------------------------------------------------------------------------
def published_route(x, weights, patterns):
    mixed = torch.einsum("tp,poi->toi", weights, patterns)
    return torch.einsum("toi,ti->to", mixed, x)


def prescaled_route(x, weights, patterns):
    """The best composition: scale x by every weight, then one GEMM; [T, P*I] exists."""
    P, O, I = patterns.shape
    scaled = (weights.unsqueeze(-1) * x.unsqueeze(-2)).flatten(-2)
    return scaled @ patterns.transpose(1, 2).reshape(P * I, O)


def composed_low_rank(x, weights, up, down):
    return torch.einsum("por,tpr->to", up, weights.unsqueeze(-1) * torch.einsum("pri,ti->tpr", down, x))


def multinomial(density, n):
    cell = torch.multinomial(density, n, replacement=True)
    return ((cell + torch.rand(cell.shape, device=cell.device)) / density.shape[1]).unsqueeze(-1)


# ---- layers ---------------------------------------------------------------------------------------------------------
def transformer_layer(d: int, heads: int) -> nn.Module:
    """A pre-norm layer with as many heads and an MLP as wide as DFNBlock's."""
    options = dict(dropout=0.0, activation="gelu", batch_first=True, norm_first=True)
    return nn.TransformerEncoderLayer(d, heads, 2 * d, **options)


def causal_transformer(states, transformer, **unused):
    mask = nn.Transformer.generate_square_subsequent_mask(states.shape[1], device=states.device, dtype=states.dtype)
    return transformer(states, src_mask=mask, is_causal=True)


def prescaled_flow_layer(x, layer):
    """FlowLayer with the same parameters, by the best composition."""
    router = layer.router
    return layer.norm(prescaled_route(x, router.weights(x).to(x.dtype), router.patterns) + layer.bias)
