"""Ahead-of-time compilation of Triton kernels, without a GPU: does it compile, does it fit, does it spill?

One file per op calls its launchers on meta tensors, with every option that decides what is compiled. `calls()` yields
pairs: a call, and whether what it starts is compiled in `make check` only. What the launchers start is what
tests/kernels/test_aot.py compiles, specialised by Triton's own rules; so the list has nothing that no launcher chooses.
"""

import functools
import importlib
import itertools
import re
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

# Shared memory that one program may take, in bytes (CUDA C++ programming guide, AMD CDNA3 ISA).
SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}
TARGETS = tuple(SHARED_LIMIT)


@dataclass(frozen=True)
class Case:
    kernel: object  # a @triton.jit function
    signature: dict[str, str]  # argument: "*fp32", "i32", "constexpr", ...
    constants: dict[str, object]  # the last of these; None and 1 are among them
    attributes: dict[str, list]  # what else Triton found: what 16 divides, and on AMD what lies within 2 GiB
    options: dict[str, object]  # for the compiler
    slow: bool

    def __str__(self):
        pointers = [name for name, kind in self.signature.items() if kind.startswith("*")]
        kinds = itertools.groupby(self.signature[name].strip("*") for name in pointers)
        kinds = (f"{kind}x{len(list(same))}" for kind, same in kinds)
        constants = (f"{name}{int(x) if isinstance(x, bool) else x}" for name, x in self.constants.items())
        wide = (f"{name}64" for name, kind in self.signature.items() if kind == "i64")
        divisible = "+".join(name for name in self.attributes if name not in pointers)
        near = [name for name in pointers if "pointer_range" in str(self.attributes.get(name))]
        near = "near" if near == pointers else "near:" * bool(near) + "+".join(near)
        return "-".join(filter(None, [name_of(self.kernel), *kinds, *constants, *wide, divisible, near]))

    def key(self) -> str:
        return repr((name_of(self.kernel), self.signature, self.constants, self.attributes, self.options))


def name_of(kernel: object) -> str:
    return f"{kernel.fn.__module__.split('.')[-1]}.{kernel.fn.__name__}"


# ---- what is launched -----------------------------------------------------------------------------------------------
def launched(call: Callable) -> list[tuple[object, tuple, dict]]:
    """The kernels that a call starts, and their arguments. None of them runs."""
    from triton.runtime.jit import JITFunction

    found = []

    def run(kernel, *args, grid, warmup, **given):
        found.append((kernel, args, given))

    with mock.patch.object(JITFunction, "run", run):
        call()
    return found


def gpu_of(target: str) -> object:
    from triton.backends.compiler import GPUTarget

    return GPUTarget("hip", target, 64) if target.startswith("gfx") else GPUTarget("cuda", int(target[3:]), 32)


def specialized(kernel: object, args: tuple, given: dict, target: str, slow: bool) -> Case:
    """What Triton compiles for these arguments."""
    from triton.compiler.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    backend = make_backend(gpu_of(target))
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, found, options = bind(*args, **given)
    _, signature, constants, attributes = kernel._pack_args(backend, given, bound, found, options)
    constants, attributes = (
        {kernel.arg_names[at]: x for (at,), x in sorted(d.items()) if d is constants or x}
        for d in (constants, attributes)
    )
    return Case(kernel, signature, constants, attributes, options, slow)


@functools.cache
def cases(op: str, amd: bool) -> list[Case]:
    """What the calls of tests/aot/<op>.py start, each only once."""
    module = importlib.import_module(f"aot.{op}")
    found = {}
    for call, slow in module.calls():
        for kernel, args, given in launched(call):
            if amd:  # as if torch had been built for it when the launchers were imported
                others = getattr(module, "AMD", {})
                given = {name: others.get(name, x) for name, x in given.items() if name != "maxnreg"}
                args = [others.get(name, x) for name, x in zip(kernel.arg_names, args, strict=False)]
            case = specialized(kernel, args, given, "gfx942" if amd else "sm_80", slow)
            found.setdefault(case.key(), case)
    return list(found.values())


# ---- what it compiles to --------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Resources:
    registers: int
    spills: int  # bytes of stack on NVIDIA, registers spilled to memory on AMD
    shared: int  # bytes


def compile_case(case: Case, target: str) -> Resources:
    import triton
    from triton.compiler import ASTSource

    places = {name: (at,) for at, name in enumerate(case.kernel.arg_names)}
    constants, attributes = ({places[name]: x for name, x in d.items()} for d in (case.constants, case.attributes))
    source = ASTSource(case.kernel, case.signature, constexprs=constants, attrs=attributes)
    built = triton.compile(source, target=gpu_of(target), options=dict(case.options))
    return (_amd if target.startswith("gfx") else _nvidia)(built)


def _nvidia(built) -> Resources:
    from triton.backends import nvidia

    tool = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        usage = subprocess.run([tool, "-res-usage", file.name], check=True, capture_output=True, text=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    assert found, f"cuobjdump printed no resource usage:\n{usage}"
    return Resources(int(found[1]), int(found[2]) + int(found[3]), built.metadata.shared)


def _amd(built) -> Resources:
    def field(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", built.asm["amdgcn"])
        assert found, f"the assembly does not say {name}"
        return int(found[1])

    # Scalar registers spill into lanes of vector registers, which costs no memory unless scratch memory is reserved.
    scalars = field("sgpr_spill_count") if field("private_segment_fixed_size") else 0
    return Resources(field("vgpr_count"), field("vgpr_spill_count") + scalars, built.metadata.shared)
