"""Every Triton kernel, in every dtype and configuration that ships, compiled for GPUs that need not be here."""

import importlib
import multiprocessing
import os
import pkgutil
from concurrent.futures import ProcessPoolExecutor

import aot
import pytest
import torch
from helpers import INTERPRETED

import dfn_kernels.triton

JITFunction = pytest.importorskip("triton").JITFunction
if INTERPRETED:
    pytest.skip("the interpreter replaces the compiler", allow_module_level=True)


OPS = [module.name for module in pkgutil.iter_modules(aot.__path__)]
CASES = [
    (op, target, at, case)
    for op in OPS for target in aot.TARGETS for at, case in enumerate(aot.cases(op, target.startswith("gfx")))
]  # fmt: skip


def compile_one(op: str, target: str, at: int) -> aot.Resources:
    """Runs in a worker: a kernel cannot be sent there, its name can."""
    return aot.compile_case(aot.cases(op, target.startswith("gfx"))[at], target)


@pytest.fixture(scope="module")
def compiled(request):
    """What is about to be tested, compiled by all cores at once: {(op, target, number): future}."""
    mine = [i.callspec.params for i in request.session.items if i.module is request.module and hasattr(i, "callspec")]
    wanted = [(p["op"], p["target"], p["at"]) for p in mine if "at" in p]
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        yield {case: pool.submit(compile_one, *case) for case in wanted}


@pytest.mark.parametrize("op, target, at", [
    pytest.param(op, target, at, id=f"{target}-{case}", marks=pytest.mark.slow if case.slow else ())
    for op, target, at, case in CASES
])  # fmt: skip
def test_compiles_without_spills(op, target, at, compiled):
    used = compiled[op, target, at].result()
    print(f"{used.registers} registers, {used.spills} spilled, {used.shared} bytes shared")
    assert used.registers > 0
    assert used.spills == 0
    assert used.shared <= aot.SHARED_LIMIT[target]


# ---- that the list is whole -----------------------------------------------------------------------------------------
def kernels_of_package() -> set[str]:
    modules = pkgutil.walk_packages(dfn_kernels.triton.__path__, "dfn_kernels.triton.")
    found = (value for m in modules for value in vars(importlib.import_module(m.name)).values())
    return {aot.name_of(x) for x in found if isinstance(x, JITFunction) and x.fn.__name__.endswith("_kernel")}


def constants(op: str, kernel: str, *names: str) -> set[tuple]:
    """The values that these constants of a kernel take together."""
    return {tuple(case.constants[n] for n in names) for case in aot.cases(op, False)
            if case.kernel.fn.__name__ == kernel}  # fmt: skip


@pytest.mark.parametrize("target", aot.TARGETS)
def test_each_case_is_compiled_once(target):
    names = [str(case) for _, t, _, case in CASES if t == target]
    assert len(names) == len(set(names))


def test_every_kernel_is_compiled():
    assert {aot.name_of(case.kernel) for _, _, _, case in CASES} == kernels_of_package()


def test_every_tile_of_the_gather_is_compiled():
    from dfn_kernels.triton import gaussian_gather as forward
    from dfn_kernels.triton import gaussian_gather_backward as backward

    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        pointer = {torch.float64: "*fp64", torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
        mine = [case for case in aot.cases("gaussian_gather", False) if case.signature.get("V") == pointer[dtype]]
        read = [torch.empty(1, 1, 16, c, dtype=dtype, device="meta") for c in range(1, 1025)]
        for kernel, want in (
            (forward.gather_kernel, {tuple(forward.gather_tiles(x).values()) for x in read}),
            (backward.dots_kernel, {tuple(backward.dots_tiles(x, x).values())[:2] for x in read}),
        ):
            assert {(c.constants["BM"], c.constants["BC"]) for c in mine if c.kernel is kernel} == want
    for op_kernel in ("weights_kernel", "edges_kernel"):
        want = {tuple(forward.edge_tiles(k).values()) for k in range(1, 1025)}
        assert constants("gaussian_gather", op_kernel, "BM", "K") == want
    assert constants("gaussian_gather", "gather_kernel", "U") == {(2,), (4,), (8,)}


def test_every_list_of_the_search_is_compiled():
    from dfn_kernels.triton.knn import MOST_DIMENSIONS, lists, walk

    def merged_and_thinned(k):
        near, kept = lists.sizes(k)
        return min(near, walk.BATCH), kept == min(near, walk.BATCH), near if near == kept else 0

    want = {(K, kept == K) for K, kept in map(lists.sizes, range(1, 1025))}
    assert constants("knn", "slice_kernel", "K", "ONE") == constants("knn", "merge_kernel", "K", "ONE") == want
    sizes = set(map(merged_and_thinned, range(1, 1025)))
    walked = {(D, *size) for D in range(1, MOST_DIMENSIONS + 1) for size in sizes}
    assert constants("knn", "walk_kernel", "D", "K", "ONE", "NEAR") == walked
    assert constants("knn", "row_kernel", "K") == {(64,), (128,), (256,), (512,), (1024,)}
