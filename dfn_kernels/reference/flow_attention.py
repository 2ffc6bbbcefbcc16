"""Drift, search and gather in one formula over all pairs, in plain PyTorch."""

import torch
from torch import Tensor

WIDTHS = {torch.float32: (2.0**-56, 2.0**63), torch.float64: (2.0**-496, 2.0**511)}  # as in gaussian_gather


def flow_attention(
    states: Tensor,  # [B, N, d]
    positions: Tensor,  # [B, H, N, D]
    flow_weight: Tensor,  # [H, D, d]
    values: Tensor,  # [B, H, N, c]
    sigma: Tensor,  # [H]
    k: int,
    flow_bias: Tensor | None,  # [H, D]
    alpha: Tensor,  # [H]
    query_weight: Tensor | None,  # [H, D, d]
    query_bias: Tensor | None,  # [H, D]
    influence: Tensor | None,  # [B, H, N]
    causal: bool,
    include_self: bool,
    lengths: Tensor | None,  # [B]
    normalize: bool,
    extra_positions: Tensor | None,  # [B, H, E, D]
    extra_values: Tensor | None,  # [B, H, E, c]
    extra_influence: Tensor | None,  # [B, H, E]
    ptr: Tensor | None = None,  # [S + 1] offsets of the sets; without it lengths count
) -> tuple[Tensor, ...]:  # context [B, H, N, c]; positions, flow [B, H, N, D], energy; indices, sq_dists [B, H, N, k]
    real = positions.dtype
    B, H, N, D = positions.shape
    step = alpha.view(1, H, 1, 1)

    def project(weight: Tensor, bias: Tensor | None) -> Tensor:
        moved = torch.einsum("bnd,hed->bhne", states.to(real), weight)
        return moved if bias is None else moved + bias.view(1, H, 1, D)

    flow = project(flow_weight, flow_bias)
    moved = positions + step * flow
    queries = moved
    if query_weight is not None:
        queries = queries + step * project(query_weight, None)
    if query_bias is not None:
        queries = queries + query_bias.view(1, H, 1, D)

    place = torch.arange(N, device=states.device)
    visible = torch.ones(B, 1, N, N, dtype=torch.bool, device=states.device)
    if causal:
        visible = visible & (place <= place.view(N, 1))
    if not include_self:
        visible = visible & (place != place.view(N, 1))
    if ptr is not None:
        own = torch.searchsorted(ptr, place, right=True)
        visible = visible & (own == own.view(N, 1))
    asking = torch.ones(B, 1, N, 1, dtype=torch.bool, device=states.device)
    if lengths is not None:
        asking = (place < lengths.view(B, 1)).view(B, 1, N, 1)
        visible = visible & asking.transpose(2, 3)
    points = moved
    weights = positions.new_ones(B, H, N) if influence is None else influence
    if extra_positions is not None:
        E = extra_positions.shape[2]
        points = torch.cat([moved, extra_positions], 2)
        values = torch.cat([values, extra_values], 2)
        more = positions.new_ones(B, H, E) if extra_influence is None else extra_influence
        weights = torch.cat([weights, more], 2)
        visible = torch.cat([visible, visible.new_ones(B, 1, N, E)], 3)
    visible = visible & asking

    sq_dists = positions.new_zeros(B, H, N, points.shape[2])
    for a in range(D):  # in this order, each operation rounded by itself
        sq_dists = sq_dists + (queries[..., a].unsqueeze(-1) - points[..., a].unsqueeze(-2)).square()
    width = min(k, points.shape[2])
    found, indices = sq_dists.masked_fill(~visible, torch.inf).sort(dim=-1, stable=True)
    found = torch.nn.functional.pad(found[..., :width], (0, k - width), value=torch.inf)
    indices = torch.nn.functional.pad(indices[..., :width], (0, k - width), value=-1).masked_fill(found.isinf(), -1)

    near = found.isfinite()
    squares = found.where(near, 0)
    if normalize and k:
        squares = (squares - squares[..., :1].detach()).where(near, 0)  # the nearest comes first
    inverse = 1 / sigma.abs().clamp(*WIDTHS[sigma.dtype]).view(1, H, 1, 1)
    exponent = (squares * (0.5 * inverse.square())).clamp(max=1e4)
    weight = (-exponent).exp() * weights.unsqueeze(2).expand(B, H, N, -1).gather(3, indices.clamp(min=0))
    weight = weight.where(near, 0)
    if normalize:
        total = weight.sum(-1, keepdim=True)
        weight = (weight / total.where(total != 0, 1)).where(total != 0, 0)
    dense = torch.zeros_like(sq_dists).scatter_add(3, indices.clamp(min=0), weight)
    context = (dense @ values.to(real)).to(values.dtype)
    return context, moved, flow, flow.square().sum(-1), indices, found
