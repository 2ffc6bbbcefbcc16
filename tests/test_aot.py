"""Every Triton kernel, in every dtype and configuration that ships, compiled for GPUs that need not be here."""

import importlib
import pkgutil

import aot
import pytest
from helpers import INTERPRETED

pytest.importorskip("triton")
if INTERPRETED:
    pytest.skip("the interpreter replaces the compiler", allow_module_level=True)

CASES = [case for m in pkgutil.iter_modules(aot.__path__) for case in importlib.import_module(f"aot.{m.name}").cases()]


def test_names_are_unique():
    names = [str(case) for case in CASES]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("target", aot.TARGETS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_compiles_without_spills(case, target, record_property):
    used = aot.compile_case(case, target)
    record_property("resources", used)
    print(f"{target} {case}: {used.registers} registers, {used.spills} spilled, {used.shared} bytes shared")
    assert used.registers > 0
    assert used.spills == 0
    assert used.shared <= aot.SHARED_LIMIT[target]
