"""csrc/cuda, compiled by nvcc for each shipped architecture: no spills. Needs nvcc, but no GPU and no CUDA torch."""

import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from helpers import INTERPRETED

SOURCES = sorted((Path(__file__).parents[2] / "csrc" / "cuda").glob("*.cu"))
ARCHITECTURES = ("80", "90a")
pytestmark = pytest.mark.skipif(INTERPRETED or shutil.which("nvcc") is None, reason="nvcc is not installed")


def compile_to_cubin(source: Path, architecture: str, folder: Path) -> str:
    """ptxas's report."""
    torch_include = Path(torch.__file__).parent / "include"
    command = [
        "nvcc", "-cubin", f"-arch=sm_{architecture}", "-std=c++20", "-O3", "-DUSE_CUDA",
        "-DTORCH_TARGET_VERSION=0x020a000000000000", f"-I{torch_include}", f"-I{source.parents[1]}",
        "-Xptxas=-v", "-o", str(folder / f"{source.stem}_{architecture}.cubin"), str(source),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cubin")
    with ThreadPoolExecutor(2) as pool:
        jobs = {(s, a): pool.submit(compile_to_cubin, s, a, folder) for s in SOURCES for a in ARCHITECTURES}
        yield {key: job.result() for key, job in jobs.items()}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_compiles_without_spills(source, architecture, reports):
    report = reports[source, architecture]
    own = source.with_name(source.stem + "_kernel.h")  # kernels in a header of their own
    kernels = sum(path.read_text().count("__global__") for path in (source, own) if path.exists())
    used = re.findall(r"Used (\d+) registers", report)
    spilled = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report)
    assert len(spilled) >= kernels, "ptxas reported on fewer kernels than the source has"
    for registers, (stores, loads) in zip(used, spilled, strict=True):
        print(f"sm_{architecture} {source.stem}: {registers} registers, {stores} + {loads} bytes spilled")
        assert (stores, loads) == ("0", "0")
    # What ptxas says when it gives up asynchronous wgmma, or a change of the number of registers
    assert "serialized" not in report and "setmaxnreg" not in report
