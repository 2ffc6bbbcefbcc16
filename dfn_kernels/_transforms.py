"""How a public function reaches its launcher, and what torch.func asks of an op beyond torch.library."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

# What a launcher may be given without torch.library between: no subclasses of Tensor, no symbolic numbers.
_PLAIN = frozenset((Tensor, nn.Parameter, type(None), bool, int, float, str))


def _is_plain(args: tuple) -> bool:
    """Whether results alone count: nobody traces, transforms or watches the ops, and tensors hold their values."""
    return not (
        torch.compiler.is_compiling()  # first: a compiler reads no further
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._get_tracing_state() is not None
        or not _PLAIN.issuperset(map(type, args))
    )


_constants: dict[tuple, Tensor] = {}
MOST_CONSTANTS = 256  # of 512 bytes each on a GPU; none is ever dropped, because a CUDA graph may read it


def _is_settled(like: Tensor) -> bool:
    """Whether every stream may read from now on what was just filled on the device of `like`; waits for that."""
    if like.is_cuda and not torch.cuda.is_current_stream_capturing():
        torch.cuda.current_stream(like.device).synchronize()
        return True
    return like.device.type == "cpu"


def per_head(value: float, H: int, like: Tensor, dtype: torch.dtype) -> Tensor:
    """[H], all `value`, on the device of `like`: a step length or a width that is a number, not to be written to.

    Kept for the next call, which saves a launch; one that is made while a CUDA graph is captured belongs to that graph.
    """
    limit = torch.finfo(dtype).max
    if limit < abs(value) < float("inf"):  # a number of Python's can be larger than float32 holds
        value = limit if value > 0 else -limit
    if not _is_plain((like,)):
        return torch.full((H,), value, dtype=dtype, device=like.device)
    key = value, H, dtype, like.device
    known = _constants.get(key)
    if known is None:
        with torch.inference_mode(False):
            known = torch.full((H,), value, dtype=dtype, device=like.device)
        if len(_constants) < MOST_CONSTANTS and _is_settled(like):
            _constants[key] = known
    return known


def on_its_device(kernel: Callable) -> Callable:
    """The kernel, run with the device of its first argument, a tensor, as the current one: Triton launches on that."""

    @functools.wraps(kernel)
    def run(first, *others, **named):
        if first.is_cuda and first.device.index != torch.cuda.current_device():
            with torch.cuda.device(first.device):
                return kernel(first, *others, **named)
        return kernel(first, *others, **named)

    return run


def custom_op(name: str) -> Callable[[Callable], torch.library.CustomOpDef]:
    """`torch.library.custom_op` of a kernel that writes to no argument and runs on the device of the first."""
    return lambda kernel: torch.library.custom_op(name, on_its_device(kernel), mutates_args=())


class OpFunction(torch.autograd.Function):
    """A registered op as a torch.autograd.Function. Subclasses name the `op`, and what has a gradient adds
    `setup_context` and `backward`, the ones that the op registers.

    Where nobody looks on it runs what the op runs, without torch.library's wrapper: that costs 15 us, and as much again
    in the backward pass. It has the rules of torch.func, too: a custom op has none for forward mode, and torch.func
    loses its tangent without a word; its own autograd wrapper does not work inside torch.func.grad.
    """

    op: torch.library.CustomOpDef

    def __init_subclass__(cls):
        op = cls.op
        name = op._qualname
        kernel = op._init_fn  # the function that `op` was made of

        # Where no views are tracked: what comes back is nobody's view, whatever it was cut from, and may be written to.
        def launch(*args):
            with torch._C._AutoDispatchBelowADInplaceOrView():
                return kernel(*args)

        def jvp(ctx, *tangents):
            raise RuntimeError(
                f"{name}: forward-mode derivatives (jvp, jacfwd) are not implemented; take the reverse mode, or "
                "use_backend('reference')"
            )

        def no_derivative(ctx, *grads):
            raise RuntimeError(f"{name}: the second derivative is not implemented; use_backend('reference') has it")

        # Sample by sample, each through the Function: transforms around this one see it.
        def vmap(info, in_dims, *args):
            if info.batch_size == 0:
                raise RuntimeError(f"{name}: torch.vmap over no samples is not implemented")
            samples = [
                cls.apply(*(x if dim is None else x.select(dim, i) for x, dim in zip(args, in_dims, strict=True)))
                for i in range(info.batch_size)
            ]
            if isinstance(samples[0], tuple):
                return tuple(map(torch.stack, zip(*samples, strict=True))), (0,) * len(samples[0])
            return torch.stack(samples), 0

        cls.forward = staticmethod(lambda *args: launch(*args) if _is_plain(args) else op(*args))
        cls.launch = staticmethod(launch)
        cls.jvp = staticmethod(jvp)
        cls.vmap = staticmethod(vmap)
        if "backward" not in cls.__dict__:
            cls.backward = staticmethod(no_derivative)
        # Function.apply without the signature it looks up at every call, which is for defaults, and functorch
        cls.record = super(torch.autograd.Function, cls).apply

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass


def call(op: torch.library.CustomOpDef, function: type[OpFunction], *args):
    """``op(*args)``: by its launcher where results alone count, recorded by its `function` if a gradient may be wanted.

    Compiled code, export, and whoever else looks at ops, see the registered one; a torch.func transform or forward
    mode its `function`.
    """
    if _is_plain(args):
        recorded = torch.is_grad_enabled() and torch._C._any_requires_grad(*args)
        return function.record(*args) if recorded else function.launch(*args)
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return function.apply(*args)
    return op(*args)
