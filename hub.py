"""Lays out the package for the Hugging Face kernel hub: python hub.py OUT, or `make hub`, which then loads it, too.

OUT/build/<variant>/ holds the package `dfn_kernels` and its metadata, under the names that the `kernels` library knows:

    torch-universal                            Python, Triton and the reference: any device, any torch
    torch-stable-abi210-cpu-x86_64-linux       with the C++ operators; one build for every torch from 2.10 on
    torch-stable-abi210-cu130-x86_64-linux     with the CUDA operators as well, where they are built

The host module of `StreamingKNN` stays out: it belongs to one CPython. The operators register under fixed names, so a
process can hold one copy of the package, from the hub or installed.
"""

import json
import platform
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.resolve()
PACKAGE = ROOT / "dfn_kernels"


def variants() -> dict[str, tuple[str, list[str]]]:
    """By name: the backend in the metadata, and the libraries that go in."""
    found = {"torch-universal": ("cpu", [])}
    system = f"{platform.machine()}-{platform.system().lower()}"
    libraries = [name for name in ("_C_cpu.so", "_C_cuda.so") if (PACKAGE / name).exists()]
    if libraries:
        found[f"torch-stable-abi210-cpu-{system}"] = ("cpu", libraries[:1])
    if len(libraries) == 2:
        found[f"torch-stable-abi210-{cuda_version()}-{system}"] = ("cuda", libraries)
    return found


def cuda_version() -> str:
    """ "cu130" for the nvcc that builds here."""
    said = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    return "cu" + said.split("release ")[1].split(",")[0].replace(".", "")


def version() -> str:
    text = (PACKAGE / "__init__.py").read_text()
    return text.split('__version__ = "')[1].split('"')[0]


def lay_out(out: Path) -> list[str]:
    shutil.rmtree(out / "build", ignore_errors=True)
    for name, (backend, libraries) in variants().items():
        folder = out / "build" / name
        shutil.copytree(PACKAGE, folder, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
        for library in libraries:
            shutil.copy2(PACKAGE / library, folder / library)
        metadata = {
            "name": "dfn-kernels",
            "id": f"dfn_kernels_{name.replace('-', '_')}_{version().replace('.', '_')}",
            "version": int(version().split(".")[0]),
            "license": "MIT",
            "python-depends": [],
            "backend": {"type": backend},
        }
        (folder / "metadata.json").write_text(json.dumps(metadata, indent=1) + "\n")
    shutil.copy2(ROOT / "LICENSE", out / "LICENSE")
    (out / "README.md").write_text("---\nlicense: mit\ntags:\n- kernels\n---\n\n" + (ROOT / "README.md").read_text())
    return list(variants())


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python hub.py OUT")
    for name in lay_out(Path(sys.argv[1])):
        print(name)
