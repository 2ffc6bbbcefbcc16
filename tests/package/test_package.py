"""The package as a whole: imports with parts missing, the backend switch, docs that run."""

import doctest
import importlib
import pkgutil
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import DEVICE, INTERPRETED, python

import dfn
import dfn_kernels as dk

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(INTERPRETED, reason="not about Triton kernels")


SOME_OPS = """
import torch, dfn_kernels as dk
torch.manual_seed(0)
p, v = torch.rand(2, 40, 3), torch.rand(2, 40, 5, requires_grad=True)
near = dk.knn(p, 4)
y = dk.gaussian_gather(p, v, near.indices, 0.3, normalize=True)
y.square().sum().backward()
print(near.indices.flatten().tolist())
print([f"{x:.4g}" for x in (y.sum().item(), v.grad.sum().item())])
"""


def test_works_without_native_libraries(tmp_path):
    shutil.copytree(ROOT / "dfn_kernels", tmp_path / "dfn_kernels", ignore=shutil.ignore_patterns("*.so"))
    bare = python(SOME_OPS, tmp_path, PYTHONPATH=str(tmp_path))
    assert bare == python(SOME_OPS, ROOT)
    asked = """
import torch, dfn_kernels as dk
assert dk.backends()["knn"]["cpu"]["reference"] == "default"
try:
    with dk.use_backend("native"):
        dk.knn(torch.rand(3, 2), 1)
except RuntimeError as error:
    print(error)
"""
    message = python(asked, tmp_path, PYTHONPATH=str(tmp_path))
    assert (
        "knn: backend 'native' is not available for cpu tensors: _C_cpu is not built: build it with `make env`"
        in message
    )


def test_works_without_triton():
    blocked = "import sys; sys.modules['triton'] = None\n"
    assert python(blocked + SOME_OPS, ROOT) == python(SOME_OPS, ROOT)
    reason = python(blocked + "import dfn_kernels as dk; print(dk.backends()['knn']['cpu']['triton'])", ROOT)
    assert "triton is not installed" in reason


def test_every_instruction_set_agrees():
    """knn to the bit, the others to what is printed; a lesser machine's kernels are in the same library."""
    outputs = {isa: python(SOME_OPS, ROOT, DFN_CPU_ISA=isa) for isa in ("baseline", "avx2", "avx512")}
    assert len(set(outputs.values())) == 1
    asked = "import torch, dfn_kernels; print(torch.ops.dfn_cpu.instruction_set())"
    assert python(asked, ROOT, DFN_CPU_ISA="baseline").strip() == "baseline"


def test_information_page():
    page = subprocess.run(
        [sys.executable, "-m", "dfn_kernels"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert torch.__version__ in page and "_C_cpu       loaded" in page
    for op in dk.backends():
        assert re.search(rf"^{op} +cpu +", page, re.MULTILINE), f"{op} is not on the page"


def test_use_backend_restores():
    with pytest.raises(ValueError, match="name must be one of native, triton, reference, got 'cuda'"):
        with dk.use_backend("cuda"):
            pass
    before = dk.backends()
    with pytest.raises(ZeroDivisionError), dk.use_backend("reference"), dk.use_backend("native"):
        raise ZeroDivisionError
    assert dk.backends() == before


def test_compiled_code_follows_use_backend():
    seen = []

    def count(graph, inputs):
        seen.append([node.target for node in graph.graph.nodes if "dfn" in str(node.target)])
        return graph.forward

    p = torch.rand(20, 2, device=DEVICE)
    v, near = torch.rand(20, 3, device=DEVICE), dk.knn(p, 3).indices
    gather = torch.compile(lambda x: dk.gaussian_gather(x, v, near, 0.5), backend=count, fullgraph=True)
    default = gather(p)
    with dk.use_backend("reference"):
        torch.testing.assert_close(gather(p), default)
    assert len(seen) == 2 and seen[0] and not seen[1], "the reference is plain PyTorch: no op of ours in its graph"


def modules(package):
    yield package.__name__
    for found in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        if not found.name.endswith(("__main__", "._host", "._C_cpu", "._C_cuda")):  # scripts, and what is no Python
            yield found.name


@pytest.mark.parametrize("name", [*modules(dk), *modules(dfn)])
def test_docstrings_run(name):
    result = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert result.failed == 0
