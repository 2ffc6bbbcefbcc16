"""Farthest point sampling, one point after the other, in plain PyTorch."""

import torch
from torch import Tensor


def farthest_points(
    points: Tensor,  # [N, D]
    ptr: Tensor,  # [S + 1] offsets of the sets
    out_ptr: Tensor,  # [S + 1] offsets of what is chosen
    start: Tensor | None,  # [S] the first choice, counted within its set; 0 without it
    total: int,
) -> Tensor:  # int64 [total]
    out = torch.full((total,), -1, dtype=torch.int64, device=points.device)
    offsets, out_offsets = ptr.tolist(), out_ptr.tolist()
    for s in range(len(offsets) - 1):
        x = points[offsets[s] : offsets[s + 1]]
        finite = x.isfinite().all(1)
        dists = torch.where(finite, torch.inf, 0.0).to(x.dtype)
        chosen = 0 if start is None else min(max(int(start[s]), 0), max(0, len(x) - 1))
        for place in range(out_offsets[s], min(out_offsets[s + 1], out_offsets[s] + len(x))):
            out[place] = offsets[s] + chosen
            if finite[chosen]:
                total_square = torch.zeros_like(dists)
                for d in range(x.shape[1]):
                    step = x[:, d] - x[chosen, d]
                    total_square = total_square + step * step
                dists = torch.where(total_square < dists, total_square, dists)
            dists[chosen] = -1
            farthest = (dists == dists.max()).nonzero()[0]
            chosen = int(farthest)
    return out
