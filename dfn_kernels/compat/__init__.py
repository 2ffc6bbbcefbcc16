"""Neighbour searches and samplings under the names and with the layouts that users of other packages know.

From torch_cluster, and PyG on top of it: `knn`, `knn_graph`, `radius`, `radius_graph`, `nearest`, `fps`,
`knn_interpolate`; sets as batch vectors or as offsets ``ptr``. From pytorch3d: `knn_points`, `knn_gather`,
`ball_query`, `sample_farthest_points`, `chamfer_distance`. All search with `dfn_kernels.knn`: exactly, ties by index,
in memory that is linear in the points. What is not offered says so on import, and what to use.

Edge lists have a size that depends on the data, so on a GPU the functions that return them wait for it;
`dfn_kernels.knn` does not.
"""

from .pyg import knn_interpolate
from .pytorch3d import ball_query, chamfer_distance, knn_gather, knn_points, sample_farthest_points
from .torch_cluster import fps, knn, knn_graph, nearest, radius, radius_graph

__all__ = [
    "ball_query", "chamfer_distance", "fps", "knn", "knn_gather", "knn_graph", "knn_interpolate", "knn_points",
    "nearest", "radius", "radius_graph", "sample_farthest_points",
]  # fmt: skip

NOT_OFFERED = {
    "graclus_cluster": "torch_cluster's own, or torch_geometric.nn.graclus",
    "graclus": "torch_geometric.nn.graclus",
    "grid_cluster": "torch.unique(torch.floor((pos - start) / size).long(), dim=0, return_inverse=True)",
    "voxel_grid": "torch.unique(torch.floor((pos - start) / size).long(), dim=0, return_inverse=True)",
    "random_walk": "torch_cluster's own: it walks on a graph and searches nothing",
    "neighbor_sampler": "torch_geometric.loader.NeighborLoader",
    "approx_knn": "knn, which is exact",
    "approx_knn_graph": "knn_graph, which is exact",
    "Pointclouds": "padded tensors with lengths",
    "packed_to_padded": "ptr: dfn_kernels.knn searches packed sets as they are",
    "padded_to_packed": "ptr: dfn_kernels.knn searches packed sets as they are",
    "estimate_pointcloud_normals": "knn_points and torch.linalg.eigh of each neighbourhood's covariance",
    "iterative_closest_point": "knn_points in a loop with torch.linalg.svd",
    "MIPSKNNIndex": "faiss: inner products are no distance",
    "L2KNNIndex": "dfn_kernels.KNNIndex",
}


def __getattr__(name: str):
    if name in NOT_OFFERED:
        raise ImportError(f"dfn_kernels.compat: {name} is not offered; use {NOT_OFFERED[name]}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
