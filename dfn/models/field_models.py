"""Models of fields: one trunk of blocks for entities of any kind, with heads for classes, values and contrast."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from dfn_kernels._checks import are_sizes

from ..fields.field import Field, TextField
from ..fields.sampler import Entities, UniformSampler
from ..training.losses import MeanStateHead, contrastive, field_reconstruction, mean_state
from .layers import FIRST_BLOCK, DFNBlock, check_shape, recommended_heads
from .linears import dtype_of


class FieldPositions(nn.Module):
    """Where sampled entities start in each head: ``(states [B, N, d], positions [B, N, D_field]) -> [B, H, N, D]``.

    Spatial heads start from where the entity is in its field, at a learned scale; semantic heads, one in four, from a
    small linear map of its state. Coordinates that the field does not have are such a map in every head.
    """

    geometry = ("log_scale",)  # see `parameter_groups`

    def __init__(self, dim: int, heads: int = 4, pos_dim: int = 3, *, scale: float = 4.0, std: float = 0.05):
        super().__init__()
        self.heads, self.pos_dim = heads, pos_dim
        self.semantic = sum(t == 0 for t in recommended_heads(heads).time_scale)
        self.place = nn.Linear(dim, heads * pos_dim)
        nn.init.normal_(self.place.weight, std=std / dim**0.5)
        nn.init.zeros_(self.place.bias)
        spatial = heads - self.semantic
        self.log_scale = nn.Parameter((scale * 2.0 ** torch.arange(spatial)).log())

    def forward(self, states: Tensor, positions: Tensor) -> Tensor:
        B, N, D = positions.shape
        if D > self.pos_dim:
            raise ValueError(f"FieldPositions: positions must have at most {self.pos_dim} coordinates, got {D}")
        places = self.place(states.to(dtype_of(self.place))).view(B, N, self.heads, self.pos_dim).transpose(1, 2)
        space = nn.functional.pad(positions.to(places.dtype), (0, self.pos_dim - D))
        space = self.log_scale.exp().view(-1, 1, 1) * space[:, None]
        moved = places[:, self.semantic :] + space
        return torch.cat([places[:, : self.semantic], moved], 1)


class DFNFieldModel(nn.Module):
    """Reads entities of one or several kinds of field in one common space: ``Entities -> states [B, N, dim]``.

    ``x_i = E_kind s_i + P_kind p_i + e_kind`` puts entities of every kind into R^dim; blocks of `DFNBlock` follow.
    Heads on top: `reconstruct` says what values lie at hidden entities, `represent` what a whole field is.

    Args:
        channels: the size d of the sampled states of each kind, such as ``{"image": 9, "text": 256}``.
        dim, layers, heads, pos_dim, k: as in `DFNBlock`. pos_dim must be at least the D of every field.

    Call: ``(entities: dict of kind -> Entities)`` or ``(Entities, kind=...)``; the entities of several kinds share
    the neighbourhoods: each reads from all. States come in the order of the dict.
    """

    def __init__(self, channels: dict[str, int], dim: int = 64, layers: int = 2, heads: int = 4, pos_dim: int = 3,
                 k: int = 16):  # fmt: skip
        super().__init__()
        if not channels:
            raise ValueError("DFNFieldModel: channels must name at least one kind of field, got {}")
        are_sizes("DFNFieldModel", **{f"channels of {kind!r}": c for kind, c in channels.items()}, layers=layers)
        check_shape("DFNFieldModel", dim, heads, pos_dim, k)
        self.dim, self.pos_dim, self.channels = dim, pos_dim, dict(channels)
        self.embed = nn.ModuleDict({kind: nn.Linear(c, dim) for kind, c in channels.items()})
        self.where = nn.ModuleDict({kind: nn.Linear(2 * pos_dim, dim, bias=False) for kind in channels})
        self.masked = nn.ParameterDict({kind: nn.Parameter(0.02 * torch.randn(dim)) for kind in channels})
        self.positions = FieldPositions(dim, heads, pos_dim)
        # What won on text has not been tried on fields.
        self.blocks = nn.ModuleList(DFNBlock(dim, heads, pos_dim, k, **FIRST_BLOCK) for _ in range(layers))
        self.norm = nn.LayerNorm(dim)
        self.values = nn.ModuleDict({kind: nn.Linear(dim, c) for kind, c in channels.items()})
        self.project = nn.Sequential(nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, dim))

    def forward(
        self, entities: dict[str, Entities] | Entities, hidden: dict[str, Tensor] | Tensor | None = None,
        *, kind: str | None = None,
    ) -> Tensor:  # fmt: skip
        """``hidden``, bool ``[B, n]`` (of each kind), replaces the states of entities by a learned vector."""
        if isinstance(entities, Entities):
            kind = self._only(kind)
            entities, hidden = {kind: entities}, {kind: hidden}
        states, positions, influence = [], [], []
        for name, (p, s, w) in entities.items():
            if name not in self.channels:
                raise ValueError(f"DFNFieldModel: kind must be one of {sorted(self.channels)}, got {name!r}")
            if s.shape[-1] != self.channels[name]:
                want, got = f"[B, n, {self.channels[name]}]", list(s.shape)
                raise ValueError(f"DFNFieldModel: states of {name!r} must have shape {want}, got {got}")
            p = nn.functional.pad(p, (0, self.pos_dim - p.shape[-1]))
            x = self.embed[name](s)
            covered = (hidden or {}).get(name)
            if covered is not None:
                x = torch.where(covered[..., None], self.masked[name].to(x.dtype), x)
            waves = torch.cat([(torch.pi * p).sin(), (torch.pi * p).cos()], -1)
            states.append(x + self.where[name](waves.to(x.dtype)))
            positions.append(p)
            influence.append(w)
        x, w = torch.cat(states, 1), torch.cat(influence, 1)
        p = self.positions(x, torch.cat(positions, 1))
        for block in self.blocks:
            x, p = block(x, p, w)
        return self.norm(x)

    def reconstruct(self, entities: Entities, hidden: Tensor, *, kind: str | None = None) -> Tensor:
        """The values at all entities, told from those that are not hidden: ``[B, n, channels]``."""
        kind = self._only(kind)
        return self.values[kind](self(entities, hidden, kind=kind))

    def represent(self, entities: Entities, *, kind: str | None = None) -> Tensor:
        """A vector for each field, for `contrastive`: ``[B, dim]``."""
        return self.project(mean_state(self(entities, kind=kind), entities.influence))

    def _only(self, kind: str | None) -> str:
        if kind is None and len(self.channels) == 1:
            return next(iter(self.channels))
        if kind not in self.channels:
            raise ValueError(f"DFNFieldModel: kind must be one of {sorted(self.channels)}, got {kind!r}")
        return kind


class DFNClassifier(nn.Module):
    """Says what a field shows: entities, blocks, and ``softmax(W_o mean(s))``: ``Entities -> logits [B, classes]``.

    Args:
        channels: the size d of the sampled states. classes: V. The others as in `DFNFieldModel`.
    """

    def __init__(self, channels: int, classes: int, dim: int = 64, layers: int = 2, heads: int = 4, pos_dim: int = 3,
                 k: int = 16):  # fmt: skip
        super().__init__()
        self.trunk = DFNFieldModel({"field": channels}, dim, layers, heads, pos_dim, k)
        self.head = MeanStateHead(dim, classes)

    def forward(self, entities: Entities) -> Tensor:
        return self.head(self.trunk(entities), entities.influence)


def some_of(like: Tensor, share: float, generator: torch.Generator | None = None) -> Tensor:
    """True with a chance of ``share``, and at least once: bool, shaped as ``like``, which must not be empty."""
    drawn = torch.rand(like.shape, generator=generator, device=like.device)
    return (drawn < share) | (drawn == drawn.min())


def masked_reconstruction_loss(
    model: DFNFieldModel, entities: Entities, *, kind: str | None = None, share: float = 0.4,
    generator: torch.Generator | None = None,
) -> Tensor:  # fmt: skip
    """Self-supervision: a ``share`` of the entities is hidden, and their values are to be told from the others.

    The difference between the values and what the model says, by `field_reconstruction`; of one-hot states (text) too.
    """
    if not 0 < share <= 1:
        raise ValueError(f"masked_reconstruction_loss: share must be above 0 and at most 1, got {share}")
    hidden = some_of(entities.influence, share, generator)
    return field_reconstruction(model.reconstruct(entities, hidden, kind=kind), entities.states.detach(), hidden)


def two_samplings_loss(
    model: DFNFieldModel, field: Field, n: int, sampler: Callable[..., Entities] | None = None,
    *, kind: str | None = None, generator: torch.Generator | None = None,
) -> Tensor:  # fmt: skip
    """Contrast: two samplings of every field of a batch are told apart from those of the others (`contrastive`)."""
    sampler = UniformSampler(distinct=isinstance(field, TextField)) if sampler is None else sampler
    views = [model.represent(sampler(field, n, generator), kind=kind) for _ in range(2)]
    return contrastive(*views)
