import functools
import itertools

import torch

from dfn_kernels.triton import farthest_points, set_means


def run(dtype, n, causal, D, start) -> None:
    def empty(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    set_means.set_means_backward(set_means.set_means(empty(2, n, dtype=dtype), empty(4), causal), empty(4), causal)
    points, starts = empty(n, D, dtype=dtype), empty(3) if start else None
    farthest_points.farthest_points(points, empty(4), empty(4), starts, n)


def calls():
    for dtype, n, causal in itertools.product((torch.float32, torch.float64), (61, 4096), (True, False)):
        for D in (3, 1, 16):
            yield functools.partial(run, dtype, n, causal, D, start=causal), (dtype, n, D) != (torch.float32, 61, 3)
