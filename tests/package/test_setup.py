"""How the package is built: with the environment's own tools, and without CUDA where that cannot be."""

import importlib
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import setuptools

ROOT = Path(__file__).parents[2]


@pytest.fixture
def built(monkeypatch):
    """setup.py as a module, and what it calls; `built.fails(command)` decides what ends badly."""
    found = types.SimpleNamespace(calls=[], fails=lambda command: False)

    def run(command, **options):
        found.calls.append(command)
        bad = found.fails(command)
        log = '-- looking\nCMake Error in CMakeLists.txt:\n  Target requires the language dialect "CUDA20"\nmore\n'
        return types.SimpleNamespace(returncode=int(bad), stdout=log if bad else "fine\n")

    monkeypatch.setattr(setuptools, "setup", lambda **options: vars(found).update(options))
    spec = importlib.util.spec_from_file_location("the_setup", ROOT / "setup.py")
    found.module = importlib.util.module_from_spec(spec)
    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    spec.loader.exec_module(found.module)
    builder = found.module.CMakeBuild(setuptools.Distribution({"name": "x", "ext_modules": found.ext_modules}))
    builder.ensure_finalized()
    builder.extensions = found.ext_modules
    found.builder = builder
    return found


def names(built):
    return [e.name for e in built.builder.extensions]


def test_the_tools_of_the_environment_come_first(built, monkeypatch, tmp_path):
    for name, attribute in (("cmake", "CMAKE_BIN_DIR"), ("ninja", "BIN_DIR")):
        (tmp_path / name).write_text("")
        monkeypatch.setitem(sys.modules, name, types.SimpleNamespace(**{attribute: str(tmp_path)}))
        assert built.module.tool(name, attribute) == str(tmp_path / name)
        monkeypatch.setitem(sys.modules, name, None)  # not installed
        assert built.module.tool(name, attribute) == f"/usr/bin/{name}"
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(SystemExit, match="cmake is needed to build dfn-kernels: pip install cmake"):
        built.module.tool("cmake", "CMAKE_BIN_DIR")


def test_cuda_that_cannot_be_built_is_left_out_with_a_line(built, capsys, monkeypatch):
    monkeypatch.delenv("DFN_CUDA", raising=False)
    assert names(built)[-1] == "dfn_kernels._C_cuda"
    built.fails = lambda command: "-DDFN_CUDA=ON" in command
    built.builder.build_extensions()
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and said[0].startswith(
        "dfn-kernels: built without dfn_kernels._C_cuda (DFN_CUDA=1 insists on it): "
    )
    assert said[0].endswith('CMake Error in CMakeLists.txt: Target requires the language dialect "CUDA20"')
    assert names(built) == ["dfn_kernels._C_cpu", "dfn_kernels._host"]
    assert [next(x for x in c if "DFN_CUDA" in x or x == "--build") for c in built.calls] == [
        "-DDFN_CUDA=ON", "-DDFN_CUDA=OFF", "--build",
    ]  # fmt: skip


def test_cuda_that_is_insisted_on_is_an_error(built, monkeypatch):
    monkeypatch.setenv("DFN_CUDA", "1")
    built.fails = lambda command: "-DDFN_CUDA=ON" in command
    with pytest.raises(SystemExit, match="failed: CMake Error in CMakeLists.txt: Target requires"):
        built.builder.build_extensions()
    built.fails = lambda command: False
    built.builder.build_extensions()
    assert names(built)[-1] == "dfn_kernels._C_cuda"


PLAIN = """
import sys
from importlib.machinery import PathFinder

ABSENT = {"tqdm", "matplotlib", "safetensors", "sklearn", "scipy", "tomli", "PIL", "triton"}

class Plain:
    def find_spec(name, path=None, target=None):
        return None if name.split(".")[0] in ABSENT else PathFinder.find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Plain
import torch
from flownetwork import FlowNetwork, benchmark_flow_network, create_dummy_data, train_flow_network
from dfn import DFNLanguageModel
import dfn.training, dfn.fields, dfn.runs
assert DFNLanguageModel(31, 12, 1, 2, k=4).generate(torch.randint(31, (1, 5)), 3, progress=True).shape == (1, 8)
model = FlowNetwork(31, 12, 1, 2)
print(model(torch.randint(31, (1, 5)))[0].shape[-1])
from dfn.cli import main
print(main(["plot", "nowhere"]))
"""


def test_a_plain_install_has_all_that_the_published_line_needs():
    """With nothing but what the package depends on; the command says what else it wants."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", PLAIN], capture_output=True, text=True, env=env, timeout=240)
    assert done.stdout.split() == ["31", "1"], done.stderr
    assert done.stderr.strip().splitlines()[-1] == (
        "dfn: needs safetensors and tqdm and matplotlib: pip install 'dfn-kernels[models]'"
    )
