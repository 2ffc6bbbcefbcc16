"""y_i = sum_j w_j exp(-|q_i - p_j|^2 / (2 sigma^2)) v_j over the listed neighbours, in plain PyTorch."""

import torch
import torch.nn.functional as F
from torch import Tensor

# Beyond these a width counts as the nearest of them: 1 / sigma^2 times a gradient is finite, and squared distances of
# about sigma^2 are (nearly) 0 or infinite themselves.
WIDTHS = {torch.float32: (2.0**-56, 2.0**63), torch.float64: (2.0**-496, 2.0**511)}


def gaussian_gather(
    positions: Tensor,  # [B, H, N, D]
    queries: Tensor,  # [B, H, M, D]
    values: Tensor,  # [B, H, N, c]
    indices: Tensor,  # [B, H, M, k], -1 is padding; whatever else lies outside [0, N) counts as padding too
    sigma: Tensor,  # [H]
    influence: Tensor | None,  # [B, H, N]
    normalize: bool,
) -> Tensor:  # [B, H, M, c]
    B, H, M, k = indices.shape
    N = values.shape[2]
    present = (indices >= 0) & (indices < N)
    if N == 0:  # one row for gather to read; nobody lists it
        positions, values = F.pad(positions, (0, 0, 0, 1)), F.pad(values, (0, 0, 0, 1))
        influence = None if influence is None else F.pad(influence, (0, 1))
    flat = indices.where(present, 0).reshape(B, H, M * k, 1)

    def rows(x: Tensor) -> Tensor:  # [B, H, N, e] -> [B, H, M, k, e], 0 for padding, whatever row 0 holds
        picked = x.gather(2, flat.expand(-1, -1, -1, x.shape[-1])).view(B, H, M, k, x.shape[-1])
        return picked.where(present.unsqueeze(-1), 0)

    steps = queries.unsqueeze(3) - rows(positions)
    present = present & (steps.square().sum(-1) != torch.inf)  # a distance that overflows is one too far
    sq_dists = steps.where(present.unsqueeze(-1), 0).square().sum(-1)
    if normalize and k:  # relative to the nearest neighbour; the factor cancels
        least = sq_dists.masked_fill(~present, torch.inf).amin(-1, keepdim=True).detach()
        sq_dists = (sq_dists - least).where(present, 0)
    inverse = 1 / sigma.abs().clamp(*WIDTHS[sigma.dtype]).view(1, H, 1, 1)
    # Beyond the limit the weight is 0 anyway; without it 0 * inf would spoil gradients.
    exponent = (sq_dists * (0.5 * inverse.square())).clamp(max=1e4)
    weights = (-exponent).exp().where(present, 0)
    if influence is not None:
        weights = weights * rows(influence.unsqueeze(-1)).squeeze(-1)
    if normalize:
        total = weights.sum(-1, keepdim=True)
        weights = weights / total.where(total != 0, 1)
        weights = weights.where(total != 0, 0)
    return torch.einsum("bhmk,bhmkc->bhmc", weights, rows(values).to(positions.dtype)).to(values.dtype)
