"""Ahead-of-time compilation of Triton kernels, without a GPU: does it compile, does it fit, does it spill?

One file per op lists what the package ships: `cases()` yields a Case for every kernel, dtype and configuration.
tests/kernels/test_aot.py compiles them all.
"""

import itertools
import re
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import torch

from dfn_kernels.triton import NO_SPILLS

# Shared memory that one program may take, in bytes (CUDA C++ programming guide, AMD CDNA3 ISA).
SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}
TARGETS = tuple(SHARED_LIMIT)
POINTER = {torch.float32: "*fp32", torch.float64: "*fp64", torch.bfloat16: "*bf16", torch.float16: "*fp16",
           torch.int64: "*i64", torch.int32: "*i32"}  # fmt: skip


@dataclass(frozen=True)
class Case:
    kernel: object  # a @triton.jit function
    types: dict[str, str]  # argument name -> "*fp32", "i32", ...; whatever is not named here or below is an i32
    constants: dict[str, object]  # tl.constexpr arguments
    num_warps: int = 4
    options: dict = field(default_factory=lambda: dict(NO_SPILLS))  # what else the launcher passes to the compiler
    slow: bool = False  # compiled in `make check` only
    amd: dict[str, object] = field(default_factory=dict)  # constants that are others there
    aligned: tuple[
        str, ...
    ] = ()  # numbers that 16 divides, as those of a row mostly do: the launcher tells the compiler

    def __str__(self):
        used = [self.types[name].strip("*") for name in self.kernel.arg_names if name in self.types]
        kinds = "-".join(kind for kind, _ in itertools.groupby(used))
        values = "-".join(f"{k}{int(v) if isinstance(v, bool) else v}" for k, v in self.constants.items())
        aligned = "-aligned" if self.aligned else ""
        return f"{self.kernel.fn.__module__.split('.')[-1]}.{self.kernel.fn.__name__}-{kinds}-{values}{aligned}"


@dataclass(frozen=True)
class Resources:
    registers: int
    spills: int  # bytes of stack on NVIDIA, registers spilled to memory on AMD
    shared: int  # bytes


def compile_case(case: Case, target: str) -> Resources:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constants = {**case.constants, **(case.amd if target.startswith("gfx") else {})}
    signature = {}
    for name in case.kernel.arg_names:
        signature[name] = "constexpr" if name in constants else case.types.get(name, "i32")
    # What the launcher finds at run time: pointers are aligned to 16 bytes, and the sizes need not be.
    attrs = {(i,): [["tt.divisibility", 16]] for i, (name, kind) in enumerate(signature.items())
             if kind.startswith("*") or name in case.aligned}  # fmt: skip
    source = ASTSource(case.kernel, signature, constexprs=constants, attrs=attrs)
    gpu = GPUTarget("hip", target, 64) if target.startswith("gfx") else GPUTarget("cuda", int(target[3:]), 32)
    options = {"num_warps": case.num_warps, **case.options}
    if target.startswith("gfx"):
        options.pop("maxnreg", None)
    built = triton.compile(source, target=gpu, options=options)
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
