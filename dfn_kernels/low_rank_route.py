"""Pattern routing with patterns of low rank: two matrix products of PyTorch, no kernel of ours."""

import torch
from torch import Tensor

from . import _backends
from ._checks import is_float_tensor, same_device
from .pattern_route import check_tokens, per_token

OP = "low_rank_route"
_backends.register(OP, cpu=False, triton=False)


def low_rank_route(x: Tensor, weights: Tensor, up: Tensor, down: Tensor, bias: Tensor | None = None) -> Tensor:
    """`pattern_route` with the patterns ``P[p] = up[p] @ down[p]``, which are never multiplied out.

    ``y[t] = sum(w[t, p] * up[p] @ (down[p] @ x[t]) for p in range(P)) + bias``: a product with all the down matrices,
    a scaling, and a product with all the up matrices. Also a mixture of P LoRA adapters.

    Args:
        x: ``[..., I]``, float16, bfloat16, float32 or float64.
        weights: w, ``[..., P]``, any float dtype; leading dimensions broadcast to those of x.
        up: ``[P, O, r]``, in the dtype of x.
        down: ``[P, r, I]``, in the dtype of x.
        bias: ``[O]``, any float dtype.

    Returns:
        ``[..., O]`` in the dtype of x, or that of autocast. The scaling happens in float32 (float64 for float64).

    Gradients: all arguments, of any order. Memory: ``[T, P * r]`` twice.

    Raises: ValueError (shapes, devices), TypeError (dtypes).

    >>> import torch
    >>> up, down = torch.tensor([[[1.0], [2.0]]]), torch.tensor([[[3.0, 4.0]]])
    >>> low_rank_route(torch.tensor([[1.0, 1.0]]), torch.tensor([[0.5]]), up, down)
    tensor([[3.5000, 7.0000]])
    """
    for name, value in (("up", up), ("down", down)):
        is_float_tensor(OP, name, value)
        if value.ndim != 3:
            letters = "[P, O, r]" if name == "up" else "[P, r, I]"
            raise ValueError(f"{OP}: {name} must have shape {letters}, got {list(value.shape)}")
    P, O, r = up.shape
    I = down.shape[2]
    if tuple(down.shape[:2]) != (P, r):
        raise ValueError(f"{OP}: down must have shape [P, r, I] with [P, r] = {[P, r]} like up, got {list(down.shape)}")
    check_tokens(OP, x, weights, bias, P, O, I)
    same_device(OP, "x", x, up=up, down=down)
    if not torch.is_autocast_enabled(x.device.type):
        for name, value in (("up", up), ("down", down)):
            if value.dtype != x.dtype:
                raise TypeError(f"{OP}: {name} must have the dtype of x, {x.dtype}, got {value.dtype}")
    lead = x.shape[:-1]
    x, weights = per_token(x, weights, torch.float64 if x.dtype == torch.float64 else torch.float32)
    T = x.shape[0]
    inner = x @ down.reshape(P * r, I).T  # [T, P * r]
    scaled = (inner.view(T, P, r) * weights.unsqueeze(2)).to(inner.dtype).view(T, P * r)
    columns = up.transpose(1, 2).reshape(P * r, O)
    y = scaled @ columns if bias is None else torch.addmm(bias.to(inner.dtype), scaled, columns)
    return y.reshape(*lead, O)
