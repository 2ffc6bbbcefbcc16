"""Projection to a vocabulary: the logits, and their cross-entropy without ever holding the logits of all tokens."""

import torch
from torch import Tensor

from dfn_kernels import _native

ENTRIES = 2**24  # logits that exist at a time: 64 MB in float32


def vocabulary_logits(states: Tensor, table: Tensor) -> Tensor:
    """``states [.., d] @ table [V, d] .T -> [.., V]``, in the dtype of states.

    The first touch of so large an output, page by page, costs up to a tenth of the product. Where no gradient is wanted
    it is allocated here, with a hint for huge pages.
    """
    columns = table.T.to(states.dtype)
    eager = not torch.compiler.is_compiling() and type(states) is Tensor
    if torch.is_grad_enabled() or states.device.type != "cpu" or _native.CPU_MISSING is not None or not eager:
        return states @ columns
    rows = states.reshape(-1, states.shape[-1])
    out = rows.new_empty(rows.shape[0], table.shape[0])
    torch.ops.dfn_cpu.prefer_huge_pages(out)
    return torch.mm(rows, columns, out=out).view(*states.shape[:-1], table.shape[0])


def vocabulary_loss(states: Tensor, table: Tensor, targets: Tensor) -> Tensor:
    """Mean over tokens of ``-log softmax(table @ states[t])[targets[t]]``, in nats, 0-d float32 (float64 for float64).

    What ``cross_entropy(states @ table.T, targets)`` gives, with logits and their gradients made and used up a few
    hundred tokens at a time: the gradients come from the same pass as the loss, and nothing of size [T, V] exists.
    Under autocast the products run in its dtype, the softmax always in float32.

    Args:
        states: ``[.., d]``, floating.
        table: ``[V, d]``, one row a word.
        targets: int64 ``[..]``.

    Gradients: states and table. A second derivative raises RuntimeError.
    """
    if table.ndim != 2 or states.shape[-1:] != table.shape[1:]:
        raise ValueError(f"vocabulary_loss: states [.., d] and table [V, d] must have the same d, got "
                         f"{list(states.shape)} and {list(table.shape)}")  # fmt: skip
    if targets.shape != states.shape[:-1]:
        raise ValueError(f"vocabulary_loss: targets must have shape {list(states.shape[:-1])}, that of states without "
                         f"its last dimension, got {list(targets.shape)}")  # fmt: skip
    if targets.numel() == 0:
        raise ValueError("vocabulary_loss: targets must not be empty")
    device = states.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else states.dtype
    return _VocabularyLoss.apply(states.reshape(-1, states.shape[-1]), table, targets.reshape(-1), dtype)


class _VocabularyLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, states: Tensor, table: Tensor, targets: Tensor, dtype: torch.dtype) -> Tensor:
        need_states, need_table = ctx.needs_input_grad[:2]
        real = torch.float64 if dtype == torch.float64 else torch.float32
        h, rows = states.to(dtype), table.to(dtype)
        T, V = h.shape[0], table.shape[0]
        parts = -(-T * V // ENTRIES)
        losses, grads = [], []
        total = None
        with torch.autocast(states.device.type, enabled=False):
            for part, target in zip(h.chunk(parts), targets.chunk(parts), strict=True):
                target = target.unsqueeze(1)
                logits = (part @ rows.T).to(real)
                # log sum exp = largest logit - log of its probability, which is at least 1 / V
                aim, largest = logits.gather(1, target), logits.amax(1, keepdim=True)
                p = torch.softmax(logits, 1, out=logits)
                losses.append((largest - p.amax(1, keepdim=True).log() - aim).sum())
                if need_states or need_table:
                    p.scatter_add_(1, target, p.new_full(target.shape, -1.0))
                    p = p.to(dtype)
                if need_states:
                    grads.append(p @ rows)
                if need_table:
                    product = p.T @ part
                    total = product.to(real) if total is None else total.add_(product)
        ctx.save_for_backward(torch.cat(grads) if need_states else None, total)
        ctx.like = states.dtype, table.dtype, T
        return torch.stack(losses).sum() / T

    @staticmethod
    def backward(ctx, grad: Tensor):
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError("vocabulary_loss: there is no second derivative, got create_graph=True")
        of_states, of_table = ctx.saved_tensors
        states_dtype, table_dtype, T = ctx.like
        scale = grad / T
        return (
            None if of_states is None else (of_states * scale).to(states_dtype),
            None if of_table is None else (of_table * scale).to(table_dtype),
            None, None,
        )  # fmt: skip
