"""Every Triton kernel, in every dtype and configuration that ships, compiled for GPUs that need not be here."""

import importlib
import multiprocessing
import os
import pkgutil
from concurrent.futures import ProcessPoolExecutor

import aot
import pytest
from helpers import INTERPRETED

pytest.importorskip("triton")
if INTERPRETED:
    pytest.skip("the interpreter replaces the compiler", allow_module_level=True)


def load(module: str) -> list[aot.Case]:
    return list(importlib.import_module(f"aot.{module}").cases())


CASES = [(m.name, i, case) for m in pkgutil.iter_modules(aot.__path__) for i, case in enumerate(load(m.name))]


def compile_one(module: str, index: int, target: str) -> aot.Resources:
    """Runs in a worker: a kernel cannot be sent there, its name can."""
    return aot.compile_case(load(module)[index], target)


@pytest.fixture(scope="module")
def compiled(request):
    """What is about to be tested, compiled by all cores at once: {(module, index, target): future}."""
    wanted = [i.callspec.params for i in request.session.items if i.module is request.module and hasattr(i, "callspec")]
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        yield {
            (p["module"], p["index"], p["target"]): pool.submit(compile_one, p["module"], p["index"], p["target"])
            for p in wanted
        }


def test_names_are_unique():
    names = [str(case) for _, _, case in CASES]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("target", aot.TARGETS)
@pytest.mark.parametrize("module, index", [
    pytest.param(module, i, id=str(case), marks=pytest.mark.slow if case.slow else ()) for module, i, case in CASES
])  # fmt: skip
def test_compiles_without_spills(module, index, target, compiled):
    used = compiled[module, index, target].result()
    print(f"{used.registers} registers, {used.spills} spilled, {used.shared} bytes shared")
    assert used.registers > 0
    assert used.spills == 0
    assert used.shared <= aot.SHARED_LIMIT[target]
