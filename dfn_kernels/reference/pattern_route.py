"""y_t = (sum_p w_tp P_p) x_t + bias in plain PyTorch, with and without the threshold on the mixed matrix."""

import torch
from torch import Tensor


def pattern_route(
    x: Tensor,  # [T, I]
    weights: Tensor,  # [T, P], float64 with float64 x, else float32
    patterns: Tensor,  # [P, O, I]
    bias: Tensor | None,  # [O]
) -> Tensor:  # [T, O] in weights' dtype
    x, patterns = x.to(weights.dtype), patterns.to(weights.dtype)
    y = x.new_zeros(x.shape[0], patterns.shape[1])
    for p, pattern in enumerate(patterns.unbind(0)):
        y = y + weights[:, p : p + 1] * (x @ pattern.T)
    return y if bias is None else y + bias


def pattern_route_density(
    x: Tensor,  # [T, I]
    weights: Tensor,  # [T, P]
    patterns: Tensor,  # [P, O, I]
    threshold: Tensor,  # [T]: token t keeps the entries of its mixed matrix with |F_toi| > threshold_t
    bias: Tensor | None,  # [O]
) -> tuple[Tensor, Tensor]:  # [T, O] in weights' dtype; how many entries each token keeps, [T], int64
    x, patterns = x.to(weights.dtype), patterns.to(weights.dtype)
    P, O, I = patterns.shape
    rows = max(1, 2**22 // max(1, O * I))  # tokens whose mixed matrices are in memory together
    ys, kept = [x.new_zeros(0, O)], [torch.zeros(0, dtype=torch.int64, device=x.device)]
    for start in range(0, x.shape[0], rows):
        part = slice(start, start + rows)
        mixed = (weights[part] @ patterns.reshape(P, O * I)).view(weights[part].shape[0], O, I)
        keep = ~(mixed.abs() <= threshold[part, None, None])  # NaN is kept, and seen
        ys.append(torch.einsum("toi,ti->to", mixed.where(keep, 0), x[part]))
        kept.append(keep.sum((1, 2)))
    y = torch.cat(ys)
    return (y if bias is None else y + bias), torch.cat(kept)
