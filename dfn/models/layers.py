"""Layers of Dynamic Flow Networks: parameters plus op calls.

An entity is a position in R^D, a state in R^d and an influence weight. In a layer it drifts along a flow that its state
prescribes and reads from the nearest neighbours of the place it comes to.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dfn_kernels import Drift, flow_attention, flow_norm
from dfn_kernels._checks import are_sizes
from dfn_kernels.knn import MOST_NEIGHBORS
from dfn_kernels.packed import place_in_set

from .feedforward import GatedMLP, ShortConvolution, make_norm
from .linears import applied, dtype_of, operands
from .memory import MemoryState


def check_shape(owner: str, dim: int, heads: int, pos_dim: int, k: int, name: str = "dim") -> None:
    """The sizes that every block has. Raises ValueError and TypeError, by name."""
    are_sizes(owner, **{name: dim}, heads=heads, pos_dim=pos_dim)
    are_sizes(owner, most=MOST_NEIGHBORS, k=k)
    if dim % heads:
        raise ValueError(f"{owner}: {name} must be a multiple of heads, got {dim} and {heads}")


LOUDEST = 8.0  # the largest logarithm of a learned influence

# Options of the block that was the default of language models until November 2026, and is that of field models.
FIRST_BLOCK = dict(mlp="gelu", norm="layer", bias=True, output_scale=1.0, receiver_flow=False, salience=False,
                   convolution=0)  # fmt: skip


class FlowNorm(nn.Module):
    """``FlowNorm(s_i) = s_i / sqrt(E[|f|^2] + eps)``: states divided by the root of their mean flow energy.

    E is the mean over the entities of a sequence (``mode="mean"``, as published), the running mean over ``j <= i``
    ("causal"), or the entity's own energy ("entity"). ``(states [.., N, d], energy [.., N], lengths=None)`` gives
    ``[.., N, d]``; rows beyond ``lengths`` are left out of the mean and come out as 0. ``ptr``, int64 ``[S + 1]``: the
    offsets of sequences packed along N, each with means of its own. It has no parameters.
    """

    def __init__(self, eps: float = 1e-6, mode: str = "mean"):
        super().__init__()
        self.eps, self.mode = eps, mode

    def forward(
        self, states: Tensor, energy: Tensor, lengths: Tensor | None = None, ptr: Tensor | None = None
    ) -> Tensor:
        return flow_norm(states, energy, self.eps, self.mode, lengths, ptr=ptr)

    def extra_repr(self) -> str:
        return f"eps={self.eps:g}, mode={self.mode!r}"


class DFNLayer(nn.Module):
    """One layer of a Dynamic Flow Network, as published.

    ``f_i = W_f s_i``, ``p_i' = p_i + alpha f_i``, ``y_i = sum_{j in N_k(i)} w_j g(|p_i' - p_j'|) W_v s_j`` with
    ``g(r) = exp(-r^2 / (2 sigma^2))``, then ``s_i' = FlowNorm(MLP([s_i, y_i]))``, where FlowNorm divides by
    ``sqrt(E[|f|^2] + 1e-6)`` and E is the mean over the entities of the sequence. No residual path and no heads: for
    training, `DFNBlock` does far better.

    Args:
        dim: d, the size of a state.
        k: neighbours that an entity reads from; it is one of them itself.
        alpha: step length of the drift.
        pos_dim: D, the dimension of a position; ``dim`` without it, as published.
        sigma: width of the Gaussian.
        causal: an entity reads only from itself and earlier ones, and E is the running mean over them.

    Call: ``(states [B, N, d], positions [B, N, D], influence [B, N] = 1, lengths int64 [B] = N)`` gives
    ``(states [B, N, d], positions [B, N, D])``. Entities beyond ``lengths`` are padding: nobody reads them, and
    their states come out as 0.
    """

    def __init__(self, dim: int, k: int = 16, alpha: float = 0.1, *, pos_dim: int | None = None, sigma: float = 1.0,
                 causal: bool = False):  # fmt: skip
        super().__init__()
        are_sizes("DFNLayer", dim=dim, pos_dim=dim if pos_dim is None else pos_dim)
        are_sizes("DFNLayer", most=MOST_NEIGHBORS, k=k)
        if not 0 < sigma < math.inf:
            raise ValueError(f"DFNLayer: sigma must be positive and finite, got {sigma}")
        self.k, self.alpha, self.sigma, self.causal = k, alpha, sigma, causal
        self.flow = nn.Linear(dim, dim if pos_dim is None else pos_dim, bias=False)
        self.value = nn.Linear(dim, dim, bias=False)
        self.mlp = nn.Sequential(nn.Linear(2 * dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))
        self.norm = FlowNorm(1e-6, "causal" if causal else "mean")

    def forward(
        self, states: Tensor, positions: Tensor, influence: Tensor | None = None, lengths: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        moving, (weight,), (bias,) = operands(states, self.flow)
        context, drift, _ = flow_attention(
            moving, positions, weight, self.value(states), self.sigma, self.k, flow_bias=bias,
            alpha=self.alpha, influence=influence, causal=self.causal, lengths=lengths,
        )  # fmt: skip
        states = self.mlp(torch.cat([states, context.to(states.dtype)], -1))
        return self.norm(states, drift.energy, lengths), drift.positions

    def extra_repr(self) -> str:
        return f"k={self.k}, alpha={self.alpha:g}, sigma={self.sigma:g}, causal={self.causal}"


class Heads(NamedTuple):
    """How the heads of a block start out: one value per head."""

    time_scale: list[float]  # coordinate 0 is the entity's number times this; 0: a semantic head, without time
    alpha: list[float]  # step length of the drift
    sigma: list[float]  # width of the Gaussian
    offset: list[float]  # the receiver's shift along coordinate 0


def recommended_heads(heads: int, semantic: int | None = None) -> Heads:
    """One head in four is semantic, one in four looks at the previous entity, the others see a stretch of time.

    ``semantic``: so many semantic heads instead, taken from or given to those that see a stretch.

    Four heads give time scales (0, 1/8, 1/2, 1), sigmas (1, 2, 2, 0.4), alphas (1, 0.1, 0.1, 0.1) and offsets
    (0, 0, 0, -1), which were measured; other numbers follow the same pattern, and further heads for the previous
    entity start with the one before it, and so on.
    """
    if heads < 1:
        raise ValueError(f"recommended_heads: heads must be at least 1, got {heads}")
    few = max(1, heads // 4) if heads > 1 else 0
    timeless = few if semantic is None else semantic
    if not 0 <= timeless <= heads - few:
        raise ValueError(f"recommended_heads: semantic must be between 0 and {heads - few}, got {timeless}")
    stretches = heads - timeless - few
    scales = [0.125 * 4 ** (i / (stretches - 1)) for i in range(stretches)] if stretches > 1 else [0.5] * stretches
    return Heads(
        time_scale=[0.0] * timeless + scales + [1.0] * few,
        alpha=[1.0] * timeless + [0.1] * (heads - timeless),
        sigma=[1.0] * timeless + [2.0] * stretches + [0.4] * few,
        offset=[0.0] * (timeless + stretches) + [-float(i) for i in range(1, few + 1)],
    )


class EntityPositions(nn.Module):
    """Where the entities of a sequence start: ``[B, N, d] -> [B, H, N, D]``, a position per head.

    Positions are a linear map of the states, small at the start (standard deviation ``std``: large ones would swamp
    the flow). In temporal heads coordinate 0 is the entity's number in the sequence times the head's learned time
    scale instead; semantic heads have no time. With ``grid``, the sizes of a picture's axes, the entities are its cells
    in row-major order: in place of time stands where a cell lies, a coordinate for each axis (``grid=(8, 8)``: row and
    column).
    """

    undecayed, geometry = ("place.weight",), ("log_scale",)  # see `parameter_groups`

    def __init__(self, dim: int, heads: int = 4, pos_dim: int = 3, *, std: float = 0.05, semantic: int | None = None,
                 grid: tuple[int, ...] | None = None):  # fmt: skip
        super().__init__()
        are_sizes("EntityPositions", dim=dim, heads=heads, pos_dim=pos_dim)
        are_sizes("EntityPositions", **{f"grid[{axis}]": size for axis, size in enumerate(grid or ())})
        if grid is not None and not 1 <= len(grid) <= pos_dim:
            raise ValueError(f"EntityPositions: grid must have 1 to pos_dim = {pos_dim} axes, got {len(grid)}")
        self.heads, self.pos_dim, self.grid = heads, pos_dim, None if grid is None else tuple(grid)
        scales = recommended_heads(heads, semantic).time_scale
        self.semantic = scales.count(0.0)  # the semantic heads come first
        self.place = nn.Linear(dim, heads * pos_dim)
        nn.init.normal_(self.place.weight, std=std / dim**0.5)
        nn.init.zeros_(self.place.bias)
        self.log_scale = nn.Parameter(torch.tensor(scales[self.semantic :]).log())  # [temporal heads]

    def forward(
        self, states: Tensor, start: int | Tensor = 0, ptr: Tensor | None = None, number: Tensor | None = None
    ) -> Tensor:
        """``start``, a number or a tensor of one, is the number of the first entity; of each sequence with ``ptr``.

        ``number``, int64 ``[B, N]``: the numbers of the entities instead, in any order.
        """
        B, N, _ = states.shape
        places = applied(self.place, states).view(B, N, self.heads, self.pos_dim).transpose(1, 2)
        if number is None:
            number = start + (torch.arange(N, device=states.device) if ptr is None else place_in_set(ptr, N))
        cells = self._cells(number)
        time = self.log_scale.to(places.dtype).exp()[:, None, None] * cells.unsqueeze(-3)  # [(B,) heads, N, axes]
        axes = cells.shape[-1]
        first = torch.cat([places[:, : self.semantic, :, :axes], time.expand(B, -1, -1, -1)], 1)
        return torch.cat([first, places[..., axes:]], -1)

    def _cells(self, number: Tensor) -> Tensor:
        """``[.., N] -> [.., N, axes]``: where the entities lie; along the first axis they may go on without end."""
        cells = []
        for size in reversed((self.grid or (1,))[1:]):
            cells.append(number % size)
            number = number // size
        return torch.stack([number, *reversed(cells)], -1)


class DynamicFlowAttention(nn.Module):
    """The drift and the reading of a block: ``H`` heads, each with positions, a flow and a width of its own.

    For every head ``f_i = W_f s_i + b_f``, ``p_i' = p_i + alpha f_i``, and entity i looks around
    ``q_i = p_i' + alpha W_r s_i + o``: what a receiver looks for follows from its state, and o is the head's learned
    offset. It reads the mean of the values ``v_j = W_v s_j + b_v`` of its k nearest neighbours, weighted by
    ``w_j exp(-|q_i - p_j'|^2 / (2 sigma^2))``, where an entity's influence ``w_j = exp(u s_j)`` (times the one given)
    is learned, too. The heads' step lengths alpha and widths sigma are learned. W_r and u are small at the start, and 0
    where an older checkpoint does not have them.

    For ablations: without ``flow``, W_f and b_f are 0 and stay so; without ``receiver_drift``, o is 0 and stays so;
    without ``receiver_flow`` there is no W_r, without ``salience`` no u; without ``normalize`` it reads the weighted
    sum instead of the mean. Without ``bias`` there are no b_f and b_v; ``semantic`` as in `recommended_heads`;
    ``sigma`` multiplies the widths at the start. ``dropout``: the share of the entities, others for each head, whose
    influence is e^-8 of what it would be in training, so that a head must read from their neighbours.

    Call: ``(states [B, N, d], positions [B, H, N, D], influence=None, lengths=None, memory=None, ptr=None)`` gives
    ``(y [B, N, d], Drift)``; ``ptr`` as in `DFNBlock`. The entities of a memory are neighbours like any other, visible
    to everybody; its positions ``[B, M, H * D]`` are those of the heads side by side, its states ``[B, M, d]`` pass
    through W_v and u.
    """

    undecayed, geometry = ("offset",), ("offset", "log_sigma", "alpha")  # see `parameter_groups`

    def __init__(self, dim: int, heads: int = 4, pos_dim: int = 3, k: int = 16, *, causal: bool = False,
                 flow: bool = True, receiver_drift: bool = True, receiver_flow: bool = True, salience: bool = True,
                 normalize: bool = True, bias: bool = True, semantic: int | None = None, sigma: float = 1.0,
                 dropout: float = 0.0):  # fmt: skip
        super().__init__()
        check_shape("DynamicFlowAttention", dim, heads, pos_dim, k)
        self.dim, self.heads, self.pos_dim, self.k, self.causal = dim, heads, pos_dim, k, causal
        if not 0 <= dropout < 1:
            raise ValueError(f"DynamicFlowAttention: dropout must be at least 0 and below 1, got {dropout}")
        self.dropout = dropout
        if not 0 < sigma < math.inf:
            raise ValueError(f"DynamicFlowAttention: sigma must be positive and finite, got {sigma}")
        self.normalize, start = normalize, recommended_heads(heads, semantic)
        self.flow = nn.Linear(dim, heads * pos_dim, bias=bias)
        self.value = nn.Linear(dim, dim, bias=bias)
        self.receiver = nn.Linear(dim, heads * pos_dim, bias=False) if receiver_flow else None
        self.salience = nn.Linear(dim, heads, bias=False) if salience else None
        self.alpha = nn.Parameter(torch.tensor(start.alpha))
        self.log_sigma = nn.Parameter((sigma * torch.tensor(start.sigma)).log())
        self.offset = nn.Parameter(torch.tensor(start.offset)[:, None] * torch.eye(1, pos_dim))  # [H, D]
        with torch.no_grad():  # near 0, not 0: a weight norm divides by their length
            for linear in filter(None, (self.receiver, self.salience)):
                linear.weight *= 0.1
        self.register_load_state_dict_pre_hook(with_what_came_later)
        for p in [*([] if flow else self.flow.parameters()), *([] if receiver_drift else [self.offset])]:
            nn.init.zeros_(p).requires_grad_(False)

    def forward(
        self, states: Tensor, positions: Tensor, influence: Tensor | None = None, lengths: Tensor | None = None,
        memory: MemoryState | None = None, ptr: Tensor | None = None,
    ) -> tuple[Tensor, Drift]:  # fmt: skip
        H, D = self.heads, self.pos_dim
        extra = {} if memory is None else self.entities(memory)
        moving, weights, (bias, *_) = operands(states, *filter(None, (self.flow, self.receiver)))
        weight, *receiver = (w.view(H, D, -1) for w in weights)
        context, drift, _ = flow_attention(
            moving, positions, weight, self.split(self.value(states)), self.log_sigma.exp(), self.k,
            flow_bias=None if bias is None else bias.view(H, D), alpha=self.alpha,
            query_weight=receiver[0] if receiver else None, query_bias=self.offset,
            influence=self.influence(states, influence), causal=self.causal, lengths=lengths,
            normalize=self.normalize, ptr=ptr, **extra,
        )  # fmt: skip
        return context.transpose(1, 2).flatten(2), drift

    def influence(self, states: Tensor, given: Tensor | None = None) -> Tensor | None:
        """What entities weigh, ``given [B, N]`` times ``exp(u s)``: ``[B, H, N]``; without u the given influence."""
        dropped = self.training and self.dropout > 0
        if self.salience is None and not dropped:
            return given
        if self.salience is None:
            weight = states.new_ones(states.shape[0], self.heads, states.shape[1])
        else:
            weight = self.log_influence(states).exp().transpose(1, 2)
        if dropped:  # not to 0: where none of the k is left, all count as much as they would
            weight = torch.where(torch.rand_like(weight) < self.dropout, weight * math.exp(-LOUDEST), weight)
        return weight if given is None else weight * given.to(weight.dtype)[:, None]

    def log_influence(self, states: Tensor) -> Tensor:
        """``u s``, held between -8 and 8: ``[.., d] -> [.., H]``."""
        return applied(self.salience, states).clamp(-LOUDEST, LOUDEST)

    def split(self, values: Tensor) -> Tensor:
        """``[B, N, d] -> [B, H, N, d / H]``, a view."""
        return values.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def entities(self, memory: MemoryState) -> dict[str, Tensor]:
        """A memory as the extra entities of `flow_attention`."""
        states = memory.states.to(dtype_of(self.value))
        influence = self.influence(states, memory.influence)
        return dict(
            extra_positions=memory.positions.unflatten(-1, (self.heads, self.pos_dim)).transpose(1, 2),
            extra_values=self.split(self.value(states)),
            extra_influence=influence if influence.ndim == 3 else influence[:, None].expand(-1, self.heads, -1),
        )

    def extra_repr(self) -> str:
        return f"heads={self.heads}, pos_dim={self.pos_dim}, k={self.k}, causal={self.causal}"


def with_what_came_later(attention: DynamicFlowAttention, state: dict, prefix: str, *_) -> None:
    """A checkpoint from before there were W_r and u: it is the same model with zeros there."""
    if prefix + "offset" not in state:
        return
    for name in ("receiver", "salience"):
        linear = getattr(attention, name)
        if isinstance(linear, nn.Linear) and not any(key.startswith(f"{prefix}{name}.") for key in state):
            state[f"{prefix}{name}.weight"] = torch.zeros_like(linear.weight)


class DFNBlock(nn.Module):
    """The recommended block: ``x + W_o y + FlowNorm(MLP([s, y]))`` with ``s = Conv(RMSNorm(x))``.

    y is what `DynamicFlowAttention` reads for s. Two paths lead from y to the output: a linear one, without which
    associative recall fails, and the MLP, which FlowNorm scales by the energy of the flow, summed over the heads
    (running mean if causal). FlowNorm's eps of 1 keeps a layer without flow from blowing up.

    Args:
        dim: d, the size of a state. heads: H. pos_dim: D, the dimension of a head's positions.
        k: neighbours that a head reads from.
        causal: an entity reads only from itself and earlier ones; no later entity changes a bit of an earlier output.
        norm_eps: eps of FlowNorm.
        flow, receiver_drift, receiver_flow, salience, flow_norm: False switches off the drift of the entities, the
            receiver's offset or its flow, the learned influence (see `DynamicFlowAttention`), or FlowNorm, to see what
            they are worth.
        mlp: "swiglu", or "gelu", 2 d wide and of as many weights. norm: "rms" or "layer". bias: of all linear maps and
            the LayerNorm. output_scale: what the weights of the two maps that are added to the states are multiplied by
            at the start. dropout: the share of what is added that is left out in training. attention_dropout: the
            share of the entities that a head hardly hears in training.
        normalize, semantic, sigma: as in `DynamicFlowAttention`.
        convolution: W entities, the one itself and those before it, that a `ShortConvolution` brings together in s; 0
            is none. It needs ``causal``.

    Call: ``(states [B, N, d], positions [B, H, N, D], influence [B, N] = 1, lengths int64 [B] = N, memory=None,
    ptr=None)`` gives ``(states [B, N, d], positions [B, H, N, D])``. Padding, beyond ``lengths``, is read by nobody;
    its states pass through unchanged. The entities of a `MemoryState`, with positions ``[B, M, H * D]``, are read like
    those of the sequence. ``ptr``, int64 ``[S + 1]``, instead of lengths: the offsets of S sequences packed along N,
    ascending from 0 to N. Each comes out as it would alone.
    """

    def __init__(self, dim: int, heads: int = 4, pos_dim: int = 3, k: int = 16, *, causal: bool = False,
                 norm_eps: float = 1.0, flow: bool = True, receiver_drift: bool = True, receiver_flow: bool = True,
                 salience: bool = True, flow_norm: bool = True, normalize: bool = True, mlp: str = "swiglu",
                 norm: str = "rms", bias: bool = False, output_scale: float = 1.0, dropout: float = 0.0,
                 attention_dropout: float = 0.0, semantic: int | None = None, sigma: float = 1.0,
                 convolution: int = 0):  # fmt: skip
        super().__init__()
        check_shape("DFNBlock", dim, heads, pos_dim, k)
        are_sizes("DFNBlock", least=0, convolution=convolution)
        if convolution and not causal:
            raise ValueError(f"DFNBlock: convolution must be 0 with causal=False, got {convolution}")
        for name, value, known in (("mlp", mlp, ("gelu", "swiglu")), ("norm", norm, ("layer", "rms"))):
            if value not in known:
                raise ValueError(f"DFNBlock: {name} must be one of {', '.join(known)}, got {value!r}")
        self.norm = make_norm(norm, dim, bias)
        self.convolution = ShortConvolution(dim, convolution) if convolution else None
        self.attention = DynamicFlowAttention(
            dim, heads, pos_dim, k, causal=causal, flow=flow, receiver_drift=receiver_drift,
            receiver_flow=receiver_flow, salience=salience, normalize=normalize, bias=bias, semantic=semantic,
            sigma=sigma, dropout=attention_dropout,
        )  # fmt: skip
        self.out = nn.Linear(dim, dim, bias=False)
        if mlp == "gelu":
            wide, narrow = nn.Linear(2 * dim, 2 * dim, bias=bias), nn.Linear(2 * dim, dim, bias=bias)
            self.mlp, last = nn.Sequential(wide, nn.GELU(), narrow), narrow
        else:
            self.mlp = GatedMLP(2 * dim, round(6 * dim / 5), dim, bias)
            last = self.mlp.out
        self.dropout = nn.Dropout(dropout)
        with torch.no_grad():
            self.out.weight *= output_scale
            last.weight *= output_scale
        self.flow_norm = FlowNorm(norm_eps, "causal" if causal else "mean") if flow_norm else None

    def forward(
        self, states: Tensor, positions: Tensor, influence: Tensor | None = None, lengths: Tensor | None = None,
        memory: MemoryState | None = None, ptr: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        s = self.said(states, ptr)
        y, drift = self.attention(s, positions, influence, lengths, memory, ptr)
        update = self.mlp(torch.cat([s, y.to(s.dtype)], -1))
        if self.flow_norm is not None:
            update = self.flow_norm(update, drift.energy.sum(-2), lengths, ptr)
        elif lengths is not None:
            padding = torch.arange(states.shape[1], device=states.device) >= lengths[:, None]
            update = update.masked_fill(padding[..., None], 0)
        return states + self.dropout(self.out(y) + update), drift.positions

    def said(self, states: Tensor, ptr: Tensor | None = None) -> Tensor:
        """s: what an entity shows of itself to those who read it, and to its own MLP, ``[B, N, d] -> [B, N, d]``."""
        s = self.norm(states)
        return s if self.convolution is None else self.convolution(s, ptr)


class FlowMixer(nn.Module):
    """Takes the place of self-attention in a block of your own: ``[B, N, d] -> [B, N, d]``.

    The entities are the rows of x: their starting positions come from x and from their number in the sequence
    (`EntityPositions`); they drift and read once (`DynamicFlowAttention`), and ``W_o`` maps what they read. Norm,
    residual and MLP are yours, as with self-attention.

    ``key_padding_mask``: bool ``[B, N]``, True = padding, anywhere in the sequence; it is read by nobody, does not
    count as time, and its outputs are 0. ``ptr``, int64 ``[S + 1]``, instead of it: the offsets of S sequences packed
    along N, ascending from 0 to N. Each comes out as it would alone; time begins again with each.

    ``grid``, for pictures: the sizes of the axes whose cells, row-major, are the N rows of x: neighbours are then those
    in the picture, a padded cell leaves the others where they are, and with ``ptr`` a grid begins with each sequence.
    Where something lies in the picture the mixer does not say: a classifier wants position embeddings added to x, as
    with self-attention. ``dropout``: as in `DynamicFlowAttention`.

    It has the attributes and the call of `nn.MultiheadAttention` with ``batch_first=True``, so that it can be the
    ``self_attn`` of an `nn.TransformerEncoderLayer`, ::

        layer = nn.TransformerEncoderLayer(64, 4, batch_first=True)
        layer.self_attn = FlowMixer(64, 4, causal=False)
        encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)

    and then, called with key and value, which must be the query, returns ``(y, None)``. Whether it is causal is said
    when it is made; ``attn_mask`` may say the same, and nothing else.
    """

    batch_first, in_proj_bias, _qkv_same_embed_dim = True, None, True  # asked for by those modules

    def __init__(self, d_model: int, heads: int = 4, k: int = 16, causal: bool = True, *, pos_dim: int = 3,
                 grid: tuple[int, ...] | None = None, dropout: float = 0.0):  # fmt: skip
        super().__init__()
        check_shape("FlowMixer", d_model, heads, pos_dim, k, "d_model")
        self.embed_dim, self.num_heads, self.dropout = d_model, heads, dropout
        self.positions = EntityPositions(d_model, heads, pos_dim, grid=grid)
        self.attention = DynamicFlowAttention(d_model, heads, pos_dim, k, causal=causal, dropout=dropout)
        self.out = nn.Linear(d_model, d_model, bias=False)

    def forward(
        self, query: Tensor, key: Tensor | None = None, value: Tensor | None = None,
        key_padding_mask: Tensor | None = None, need_weights: bool = False, attn_mask: Tensor | None = None,
        average_attn_weights: bool = True, is_causal: bool = False, *, ptr: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, None]:  # fmt: skip
        """``(x, key_padding_mask=None, ptr=None)``, or the arguments of `nn.MultiheadAttention`."""
        self._check_mask(attn_mask, is_causal, query.shape[1])
        if value is None:
            return self._mix(query, key_padding_mask if key is None else key, ptr)
        if key is not query or value is not query:
            raise ValueError("FlowMixer: key and value must be the query, as in self-attention, got other tensors")
        if need_weights:
            raise ValueError("FlowMixer: need_weights must be False: there is no matrix of weights, got True")
        # nn.TransformerEncoder makes a float mask of a bool one
        if key_padding_mask is not None and key_padding_mask.is_floating_point():
            key_padding_mask = key_padding_mask == -torch.inf
        return self._mix(query, key_padding_mask, ptr), None

    def _check_mask(self, attn_mask: Tensor | None, is_causal: bool, N: int) -> None:
        if attn_mask is None and not is_causal:
            return
        if not self.attention.causal:
            raise ValueError(
                "FlowMixer: attn_mask must be None with causal=False; for a causal mask, make it with causal=True"
            )
        if attn_mask is None or is_causal or torch.compiler.is_compiling():
            return
        later = torch.ones(N, N, dtype=torch.bool, device=attn_mask.device).triu(1)
        barred = attn_mask if attn_mask.dtype == torch.bool else attn_mask == -torch.inf
        plain = barred if attn_mask.dtype == torch.bool else attn_mask != 0
        if not (barred.shape == later.shape and barred.equal(later) and plain.equal(later)):
            raise ValueError(f"FlowMixer: attn_mask must be causal, [N, N] with N = {N}, got {list(attn_mask.shape)}")

    def _mix(self, x: Tensor, key_padding_mask: Tensor | None, ptr: Tensor | None) -> Tensor:
        grid = self.positions.grid
        if grid is not None and ptr is None and x.shape[1] != math.prod(grid):
            raise ValueError(f"FlowMixer: x must have the {math.prod(grid)} cells of grid {grid}, got {x.shape[1]}")
        if key_padding_mask is None:
            return self.out(self.attention(x, self.positions(x, ptr=ptr), ptr=ptr)[0])
        if ptr is not None:
            raise ValueError("FlowMixer: key_padding_mask must be None with ptr: every row belongs to a sequence")
        if key_padding_mask.dtype != torch.bool:
            raise TypeError(f"FlowMixer: key_padding_mask must be bool, got {key_padding_mask.dtype}")
        if key_padding_mask.shape != x.shape[:2]:
            want, got = list(x.shape[:2]), list(key_padding_mask.shape)
            raise ValueError(f"FlowMixer: key_padding_mask must have shape {want}, got {got}")
        # Entities first, padding last, each in its order: the ops know padding as a length.
        first = key_padding_mask.to(torch.uint8).argsort(dim=1, stable=True)
        order, lengths = first[..., None].expand_as(x), (~key_padding_mask).sum(1)
        x = x.masked_fill(key_padding_mask[..., None], 0.0).gather(1, order)
        places = self.positions(x, number=None if grid is None else first)
        y = self.out(self.attention(x, places, None, lengths)[0])
        return torch.zeros_like(y).scatter(1, order, y)


def count_parameters(module: nn.Module) -> int:
    return sum(math.prod(p.shape) for p in module.parameters())
