"""What torch.func asks of an op beyond torch.library: rules as a torch.autograd.Function has them."""

import torch
from torch.autograd import forward_ad


class OpFunction(torch.autograd.Function):
    """A registered op as a torch.autograd.Function. Subclasses name the `op`, and what has a gradient adds
    `setup_context` and `backward`, the ones that the op registers.

    A custom op has no forward-mode rule, and torch.func loses its tangent without a word; its own autograd wrapper does
    not work inside torch.func.grad. A Function can say no to the first and do the second.
    """

    op: torch.library.CustomOpDef

    def __init_subclass__(cls):
        op = cls.op
        name = op._qualname

        def jvp(ctx, *tangents):
            raise RuntimeError(
                f"{name}: forward-mode derivatives (jvp, jacfwd) are not implemented; take the reverse mode, or "
                "use_backend('reference')"
            )

        # Sample by sample, each through the Function: transforms around this one see it.
        def vmap(info, in_dims, *args):
            samples = [
                cls.apply(*(x if dim is None else x.select(dim, i) for x, dim in zip(args, in_dims, strict=True)))
                for i in range(info.batch_size)
            ]
            if isinstance(samples[0], tuple):
                return tuple(map(torch.stack, zip(*samples, strict=True))), (0,) * len(samples[0])
            return torch.stack(samples), 0

        cls.forward = staticmethod(lambda *args: op(*args))
        cls.jvp = staticmethod(jvp)
        cls.vmap = staticmethod(vmap)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *grads):
        raise RuntimeError("the second derivative is not implemented; use_backend('reference') has it")


def call(op: torch.library.CustomOpDef, function: type[OpFunction], *args):
    """``op(*args)``, through its `function` where a torch.func transform or forward mode is active."""
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return function.apply(*args)
    return op(*args)
