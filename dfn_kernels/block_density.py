"""Sparse patterns, block by block: the fast way to a small share of connections."""

import torch
from torch import Tensor

from ._checks import is_float_tensor, is_number
from .pattern_route import BLOCK, route, spread_blocks

OP = "BlockDensity"


class BlockDensity:
    """Keeps, of each pattern, the share of its 128 x 64 blocks with the largest norm; the rest counts as 0.

    On the CPU the native kernels skip what is left out, forward and backward. Blocks that are left out get no
    gradient; to let them come back, move them by other means (weight decay, noise) and call `refresh`.

    Args:
        patterns: ``[P, O, I]``, as for `pattern_route`. Kept only as the mask ``blocks``,
            ``[P, ceil(O / 128), ceil(I / 64)]`` bool.
        density: share of the blocks to keep, in (0, 1]; at least one block of each pattern.

    >>> import torch
    >>> patterns = torch.cat([torch.zeros(1, 128, 64), torch.ones(1, 128, 64)], dim=2)  # two blocks
    >>> sparse = BlockDensity(patterns, density=0.5)
    >>> sparse.blocks.tolist(), sparse.share
    ([[[False, True]]], 0.5)
    >>> sparse(torch.ones(1, 128), torch.ones(1, 1), patterns)[0, 0]
    tensor(64.)
    """

    def __init__(self, patterns: Tensor, density: float):
        is_number(OP, "density", density)
        if not 0 < density <= 1:
            raise ValueError(f"{OP}: density must be above 0 and at most 1, got {density}")
        self.density = density
        self.refresh(patterns)

    @torch.no_grad()
    def refresh(self, patterns: Tensor) -> None:
        """Chooses the blocks anew, for instance every hundred steps of training. Ties go to the earlier block."""
        is_float_tensor(OP, "patterns", patterns)
        if patterns.ndim != 3:
            raise ValueError(f"{OP}: patterns must have shape [P, O, I], got {list(patterns.shape)}")
        P, O, I = patterns.shape
        rows, columns = -(-O // BLOCK[0]), -(-I // BLOCK[1])
        real = torch.float64 if patterns.dtype == torch.float64 else torch.float32
        padded = torch.zeros(P, rows * BLOCK[0], columns * BLOCK[1], dtype=real, device=patterns.device)
        padded[:, :O, :I] = patterns.square()
        norms = padded.view(P, rows, BLOCK[0], columns, BLOCK[1]).sum((2, 4)).view(P, rows * columns)
        keep = max(1, round(self.density * rows * columns))
        order = torch.sort(norms, dim=1, descending=True, stable=True).indices[:, :keep]
        self.blocks = torch.zeros_like(norms, dtype=torch.bool).scatter(1, order, True).view(P, rows, columns)
        entries = spread_blocks(self.blocks, patterns)
        self.share = entries.double().mean().item() if entries.numel() else 0.0

    def __call__(
        self,
        x: Tensor,
        weights: Tensor,
        patterns: Tensor,
        bias: Tensor | None = None,
        *,
        top_k: int | None = None,
        out_dtype: torch.dtype | None = None,
        return_share: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """`pattern_route` with the kept blocks of the patterns; arguments, result and gradients as there."""
        P, O, I = patterns.shape
        want = (P, -(-O // BLOCK[0]), -(-I // BLOCK[1]))
        if tuple(self.blocks.shape) != want or self.blocks.device != patterns.device:
            raise ValueError(f"{OP}: patterns must have the shape and device they had at the last refresh, got "
                             f"{list(patterns.shape)} on {patterns.device}")  # fmt: skip
        return route(x, weights, patterns, bias, top_k, None, out_dtype, return_share, self.blocks, self.share)
