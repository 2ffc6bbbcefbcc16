"""The layout for the kernel hub: every variant imports under its own name, elsewhere, and is right."""

import json
import subprocess
import sys

import pytest
from helpers import INTERPRETED

import hub  # noqa: E402

pytestmark = pytest.mark.skipif(INTERPRETED, reason="not about Triton kernels")

# As the hub's library imports it: by its path, under the id of its metadata.
LOAD = """
import importlib.util, sys, torch
folder, name = sys.argv[1:]
spec = importlib.util.spec_from_file_location(name, folder + "/__init__.py")
module = sys.modules[name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
assert "dfn_kernels" not in sys.modules
p = torch.rand(50, 3)
found = module.knn(p, 4).indices
assert found.equal((p[:, None] - p).square().sum(-1).topk(4, largest=False, sorted=True).indices)
print(module.backends()["knn"]["cpu"]["native"])
"""


def test_every_variant(tmp_path):
    names = hub.lay_out(tmp_path)
    assert "torch-universal" in names and any(name.startswith("torch-stable-abi210-cpu-") for name in names)
    for name in names:
        folder = tmp_path / "build" / name
        facts = json.loads((folder / "metadata.json").read_text())
        done = subprocess.run(
            [sys.executable, "-c", LOAD, str(folder), facts["id"]], cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("_C_cpu is not built" if name == "torch-universal" else "default"), done.stdout
        assert bool(list(folder.glob("*.so"))) == (name != "torch-universal")
