"""What the op tests share: where they run, and what counts as close enough (docs/numerics.md)."""

import itertools
import os
import subprocess
import sys
import wave
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pytest
import torch
from torch import Tensor

import dfn_kernels
from dfn_kernels._backends import INTERPRETED, missing

T = TypeVar("T")
DEVICE = os.environ.get("DFN_TEST_DEVICE", "cuda" if torch.cuda.is_available() else "cpu")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
MASKS = [dict(causal=c, include_self=s) for c in (False, True) for s in (True, False)]  # of a search


def backends(op: str) -> list[str]:
    """The backends to test here. Interpreter runs are for Triton alone: the others have a run of their own."""
    names = ["triton"] if INTERPRETED else ["native", "triton"]
    return [name for name in names if missing(op, name, DEVICE) is None]


def truncated_to_bfloat16(x: Tensor) -> Tensor:
    return (x.float().view(torch.int32) & -65536).view(torch.float32).bfloat16()


def assert_accurate(ours: Tensor, exact: Tensor, error_of_plain: float, what: str = "result") -> None:
    """`ours` may be at most twice as far from the float64 result as plain PyTorch in the same dtype is."""
    assert ours.shape == exact.shape, f"{what}: {list(ours.shape)} instead of {list(exact.shape)}"
    norm = exact.double().norm()
    if INTERPRETED and ours.dtype == torch.bfloat16:  # Triton's interpreter truncates where the hardware rounds
        error_of_plain = distance(truncated_to_bfloat16(exact), exact)
    error, allowed = distance(ours, exact), 2 * error_of_plain
    assert error <= allowed, f"{what}: error {error / norm:.2e}, allowed {allowed / norm:.2e} (relative)"


def distance(x: Tensor, exact: Tensor) -> float:
    return (x.double() - exact.double()).norm().item()


def leaves(inputs: dict) -> dict:
    """Copies whose gradients can be asked for. What is not a float tensor stays."""
    return {
        name: x.detach().clone().requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x
        for name, x in inputs.items()
    }


def value_and_grads(op, inputs: dict, grad: Tensor, backend: str) -> dict[str, Tensor]:
    """Runs op(**inputs) on a backend and returns its output and the gradient to each float tensor in `inputs`."""
    inputs = leaves(inputs)
    with dfn_kernels.use_backend(backend):
        out = op(**inputs)
    out.backward(grad.to(out.dtype))
    grads = {f"gradient of {name}": x.grad for name, x in inputs.items() if isinstance(x, Tensor) and x.requires_grad}
    return {"output": out.detach(), **grads}


def nudged(inputs: dict, unit: float) -> dict:
    """Every float tensor multiplied by 1 +- unit at random: inputs that rounding cannot tell from the given ones."""
    return {
        name: x * (1 + unit * (torch.randint(0, 2, x.shape, device=x.device) * 2 - 1).to(x.dtype))
        if isinstance(x, Tensor) and x.is_floating_point() else x
        for name, x in inputs.items()
    }  # fmt: skip


def check_against_reference(op, inputs: dict, backend: str) -> None:
    """Output and all gradients of `backend`, held against the reference in float64.

    The yardstick is the error of plain PyTorch in the same dtype. In float32 and float64 that can happen to be nearly
    zero, so what the exact result moves by when every input moves by two units in the last place counts as well, if
    it is larger: an algorithm that is stable in the usual sense stays within that.
    """
    with dfn_kernels.use_backend("reference"):
        shape = op(**inputs)
    grad = torch.randn(shape.shape, device=shape.device).to(shape.dtype)  # representable in the dtype under test
    real = torch.float64 if shape.dtype == torch.float64 else torch.float32
    doubles = {n: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for n, x in inputs.items()}
    unit = 2 * torch.finfo(real).eps
    exact = value_and_grads(op, doubles, grad, "reference")
    plain = value_and_grads(op, inputs, grad, "reference")
    others = [value_and_grads(op, nudged(doubles, unit), grad.double() * (1 + unit), "reference") for _ in range(6)]
    ours = value_and_grads(op, inputs, grad, backend)
    for what in ours:
        assert ours[what] is not None, f"{what} is missing"
        assert ours[what].dtype == plain[what].dtype, f"{what}: {ours[what].dtype} instead of {plain[what].dtype}"
        yardstick = max(distance(x[what], exact[what]) for x in (plain, *others))
        assert_accurate(ours[what], exact[what], yardstick, what)
    assert any(x.abs().sum() > 0 for name, x in exact.items() if name != "output"), "the test's gradients are all zero"


def check_compiled(layer, compiled, arguments: list, backend: str = "native") -> None:
    """``compiled(*arguments)`` and its gradients, held against ``layer(*arguments)`` as `check_against_reference` does.

    A compiler fuses and reorders: the two differ by rounding, by how much depends on the processor. The yardstick is
    how far the eager float32 result is from the reference in float64, or what the exact one moves by when every input
    moves by two units in the last place, if that is more.
    """

    def run(function, arguments: list, grad: Tensor, backend: str) -> list[Tensor]:
        named = leaves(dict(enumerate(arguments)))
        with dfn_kernels.use_backend(backend):
            out = function(*named.values())
            wanted = [x for x in named.values() if isinstance(x, Tensor) and x.requires_grad]
            grads = torch.autograd.grad(out, wanted, grad.to(out.dtype), allow_unused=True)
        return [out.detach(), *(torch.zeros_like(x) if g is None else g for x, g in zip(wanted, grads, strict=True))]

    with dfn_kernels.use_backend("reference"):
        grad = torch.randn_like(layer(*arguments))
    unit = 2 * torch.finfo(torch.float32).eps
    doubles = {i: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for i, x in enumerate(arguments)}
    exact = run(layer, list(doubles.values()), grad, "reference")
    close = [nudged({**doubles, "grad": grad.double()}, unit) for _ in range(6)]
    others = [run(layer, list(x.values())[:-1], x["grad"], "reference") for x in close]
    eager = run(layer, arguments, grad, backend)
    largest = max(x.norm().item() for x in exact)
    for i, ours in enumerate(run(compiled, arguments, grad, backend)):
        yardstick = max(distance(x[i], exact[i]) for x in (eager, *others))
        if exact[i].norm() < 1e-12 * largest:  # 0 by a symmetry: there is rounding alone, and how much of it is chance
            yardstick = 32 * unit * largest
        assert_accurate(ours, exact[i], yardstick, f"gradient {i}" if i else "output")


def check_compiled_module(module: torch.nn.Module, chosen, *inputs: Tensor) -> None:
    """`check_compiled` of ``chosen(module(*inputs))`` with the gradients of its parameters.

    aot_eager traces forward and backward as every backend does, without waiting for a C++ compiler.
    """
    names = list(dict(module.named_parameters()))

    def layer(*arguments):
        given = dict(zip(names, arguments[: len(names)], strict=True))
        return chosen(torch.func.functional_call(module, given, arguments[len(names) :]))

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    check_compiled(layer, compiled, [*(p.detach() for p in module.parameters()), *inputs])


def bits(x: Tensor) -> Tensor:
    kind = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    return x.contiguous().view(kind)


def same_bits(left: Tensor, right: Tensor) -> bool:
    return left.dtype == right.dtype and left.shape == right.shape and torch.equal(bits(left), bits(right))


def on_threads(run: Callable[[], T], counts: tuple[int, ...] = (2, 1, 2, 3)) -> list[T]:
    """What ``run()`` gives with so many threads, one count after another."""
    before, found = torch.get_num_threads(), []
    try:
        for count in counts:
            torch.set_num_threads(count)
            found.append(run())
    finally:
        torch.set_num_threads(before)
    return found


def check_same_bits(op, inputs: dict, backend: str) -> None:
    """Output and gradients are the same in every run, whatever the number of threads, and what came in is as it was."""
    tensors = {n: x for n, x in inputs.items() if isinstance(x, Tensor)}
    before = {n: x.clone() for n, x in tensors.items()}
    with dfn_kernels.use_backend("reference"):
        grad = torch.randn_like(op(**inputs))
    counts = (1, 1) if INTERPRETED else (2, 1, 2, 3)  # the interpreter is slow, and has one
    first, *others = on_threads(lambda: value_and_grads(op, inputs, grad, backend), counts)
    for again, (what, x) in itertools.product(others, first.items()):
        assert same_bits(x, again[what]), what
    for name, x in tensors.items():
        assert same_bits(x, before[name]), f"{name} was changed"


def check_second_derivative_raises(op, inputs: dict, of: str, through: str, backend: str) -> None:
    """On the backend that of ``of`` says what to do instead; on the reference it is there and reaches ``through``."""
    mine = leaves(inputs)

    def derive() -> None:
        (grad,) = torch.autograd.grad(op(**mine).square().sum(), mine[of], create_graph=True)
        grad.sum().backward()

    with dfn_kernels.use_backend(backend), pytest.raises(RuntimeError, match="use_backend"):
        derive()
    with dfn_kernels.use_backend("reference"):
        derive()
    assert mine[through].grad.abs().sum() > 0


def pairs(options: dict[str, tuple]) -> list[dict]:
    """Settings in which every two choices of two options meet at least once, greedily few."""
    names = list(options)
    open_pairs = {((a, x), (b, y)) for a, b in itertools.combinations(names, 2) for x in options[a] for y in options[b]}
    rows = []
    while open_pairs:
        (a, x), (b, y) = min(open_pairs, key=str)
        row = {a: x, b: y}
        for name in names:
            if name not in row:
                row[name] = max(options[name], key=lambda choice, name=name, row=row: sum(
                    tuple(sorted([(name, choice), other], key=lambda p: names.index(p[0]))) in open_pairs
                    for other in row.items()))  # fmt: skip
        open_pairs -= set(itertools.combinations([(n, row[n]) for n in names], 2))
        rows.append(row)
    return rows


def check_same(backend: str, positions: Tensor, k: int, **options) -> dfn_kernels.Neighbors:
    """A search: indices and distances are those of the reference, to the bit."""
    with dfn_kernels.use_backend("reference"):
        want = dfn_kernels.knn(positions, k, **options)
    with dfn_kernels.use_backend(backend):
        got = dfn_kernels.knn(positions, k, **options)
    assert same_bits(got.indices, want.indices)
    assert same_bits(got.sq_dists, want.sq_dists)
    return got


def python(code: str, cwd: Path, **environment: str) -> str:
    """What a process of its own prints that runs ``code``, and ends with status 0."""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, env={**os.environ, **environment}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def check_on_instruction_set(isa: str, code: str) -> None:
    """Runs checks of the op tests, imported by name, on these kernels; a set that is missing here falls back."""
    tests = Path(__file__).parent
    path = os.pathsep.join(map(str, (tests / "kernels", tests, tests.parent)))
    asked = "import torch, dfn_kernels; print(torch.ops.dfn_cpu.instruction_set())"
    said = python(code + asked, tests.parent, DFN_CPU_ISA=isa, PYTHONPATH=path)
    assert isa != "baseline" or said.strip() == "baseline"


def ended_well(workers: list[subprocess.Popen]) -> list[str]:
    """What processes that work together said, after all of them ended with status 0; none is left behind."""
    try:
        said = [worker.communicate(timeout=120)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    assert [worker.returncode for worker in workers] == [0] * len(workers), "\n".join(said)
    return said


def sound(path, samples: int = 4000) -> None:
    """Writes a WAV file of noise."""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(8000)
        file.writeframes((3000 * torch.randn(samples)).short().numpy().tobytes())


def unlike_at_the_start(model: torch.nn.Module) -> torch.nn.Module:
    """A convolution lets everything through at first: here it does not, so that what it does shows."""
    from dfn.models import ShortConvolution

    for module in model.modules():
        if isinstance(module, ShortConvolution):
            torch.nn.init.normal_(module.weight)
    return model
