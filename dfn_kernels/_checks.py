"""Checks of arguments that every op needs. An error names the op, the argument, what was expected and what came."""

import numbers

import torch
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _is_dense(op: str, name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        inside = f", whose .{name} is one" if isinstance(getattr(value, name, None), Tensor) else ""
        raise TypeError(f"{op}: {name} must be a tensor, got {type(value).__name__}{inside}")
    if value.layout != torch.strided:
        raise TypeError(f"{op}: {name} must be a dense tensor, got {value.layout}")


def is_float_tensor(op: str, name: str, value: object) -> None:
    _is_dense(op, name, value)
    if value.dtype not in FLOATS:
        raise TypeError(f"{op}: {name} must be float16, bfloat16, float32 or float64, got {value.dtype}")


def is_index_tensor(op: str, name: str, value: object) -> None:
    _is_dense(op, name, value)
    if value.dtype != torch.int64:
        raise TypeError(f"{op}: {name} must be int64, got {value.dtype}")


def has_shape(op: str, name: str, value: Tensor, shape: tuple, letters: str) -> None:
    """`letters` names the sizes for the message, for instance "[B, N, D]"."""
    if tuple(value.shape) != tuple(shape):
        expected = "[" + ", ".join(str(size) for size in shape) + "]"
        said = letters if letters.endswith(expected) else f"{letters} = {expected}"
        raise ValueError(f"{op}: {name} must have shape {said}, got {list(value.shape)}")


def same_device(op: str, first_name: str, first: Tensor, **others: Tensor | None) -> None:
    for name, value in others.items():
        if value is not None and value.device != first.device:
            raise ValueError(f"{op}: {name} must be on {first.device} like {first_name}, got {value.device}")


def is_integer(op: str, name: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, numbers.Integral, torch.SymInt)):
        raise TypeError(f"{op}: {name} must be an integer, got {type(value).__name__}")
    if not low <= value <= high:
        raise ValueError(f"{op}: {name} must be between {low} and {high}, got {value}")


def are_sizes(owner: str, least: int = 1, most: int = 2**31 - 1, **sizes: object) -> None:
    """The sizes of a module: integers within these limits."""
    for name, value in sizes.items():
        if isinstance(value, bool) or not isinstance(value, numbers.Integral):
            raise TypeError(f"{owner}: {name} must be an integer, got {type(value).__name__}")
        if value < least:
            raise ValueError(f"{owner}: {name} must be at least {least}, got {value}")
        if value > most:
            raise ValueError(f"{owner}: {name} must be at most {most}, got {value}")


def is_number(op: str, name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float, numbers.Real, torch.SymFloat, torch.SymInt)):
        raise TypeError(f"{op}: {name} must be a number, got {type(value).__name__}")


def are_flags(op: str, **values: object) -> None:
    for name, value in values.items():
        if not isinstance(value, bool):
            raise TypeError(f"{op}: {name} must be True or False, got {type(value).__name__}")


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """The dtype of positions and sums: float64 if any of these is float64, else float32."""
    wide = any(t is not None and t.dtype == torch.float64 for t in tensors)
    return torch.float64 if wide else torch.float32


def shaped(x: Tensor, *shape: int) -> Tensor:
    """x as `shape`, which only joins or adds dimensions: x itself where it has as many. A view is not free: it takes a
    microsecond, and more when autograd walks back through it.
    """
    return x if x.ndim == len(shape) else x.reshape(shape)


def dense_rows(x: Tensor) -> Tensor:
    """x, or a copy of it, with rows that lie dense in memory, as kernels read them."""
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()
