"""python -m bench.walk_steps: what a warp of the GPU's search does, counted on the CPU in the same order of steps.

Needs a C++ compiler, no GPU. Instructions are those of the kernel that is compiled for sm_90 (k = 16, D = 3), counted
between its branches: a step over 32 boxes, a leaf tested, a point looked at, 16 distances sorted and merged, 8 keys of
a list moved, 8 keys sorted and merged into 8 of the best.
"""

import argparse
import ctypes
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton

from dfn_kernels.triton.knn import tree, walk

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
import point_sets  # noqa: E402  one list of hostile sets for tests and benchmark

STEP, THIN, MOVE, BATCH = 100, 330, 116, 270
SETS = ("uniform", "normal", "clusters", "outliers", "line 0", "line 2", "circle", "diagonal", "lattice",
        "256 positions", "half identical", "two rows", "sorted", "underflowing", "narrow clusters",
        "narrow middle")  # fmt: skip


def points(name: str, n: int, D: int) -> torch.Tensor:
    if name == "narrow clusters":  # a millionth of the spread
        return (torch.rand(100, D).double()[torch.randint(100, (n,))] + 1e-6 * torch.randn(n, D)).float()
    if name == "narrow middle":  # the same for most points, and the others far away
        far = torch.rand(n, 1) < 0.15
        return torch.where(far, torch.rand(n, D), 1e-6 * torch.randn(n, D))
    return point_sets.points(name, n, D)


def build() -> ctypes.CDLL:
    source = Path(__file__).with_suffix(".cpp")
    library = Path(tempfile.mkdtemp()) / "walk_steps.so"
    command = ["g++", "-O3", "-std=c++17", "-shared", "-fPIC", "-ffp-contract=off", source, "-o", library]
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(library))


def count(library: ctypes.CDLL, x: torch.Tensor, k: int, causal: bool, packets: int) -> dict[str, float]:
    """Per packet of 32 queries; at most about so many packets, spread over the curve."""
    N, D = x.shape
    layout = tree.Layout.of(1, N, D, causal)
    bits = 31 if D == 1 else layout.bits + layout.fine
    out = (ctypes.c_double * 9)()
    real = ctypes.c_float
    library.walk_steps(
        ctypes.c_void_p(x.data_ptr()), ctypes.c_int64(N), D, k, int(causal), tree.LEAF, tree.FAN, walk.seeds(k),
        3 * tree.LEAF, bits, real(tree.MIDDLE), real(tree.REACH), tree.FIRST, tree.EARLY,
        max(1, triton.cdiv(N, 32 * packets)), real(walk.JUMP), out,
    )  # fmt: skip
    _, steps, tests, leaves, thinned, moved, batches, zeros, most = out
    point, test = 3 * D + 10, 32 + 8 * D
    work = STEP * steps + test * tests + point * (tree.LEAF * leaves + zeros) + THIN * thinned + MOVE * moved
    return {"steps": steps, "tests": tests, "leaves": leaves, "most": most, "thinned": thinned, "moved": moved,
            "batches": batches, "zeros": zeros, "instructions": work + BATCH * batches}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, nargs="*", default=[1_000_000])
    parser.add_argument("--dims", type=int, nargs="*", default=[2, 3])
    parser.add_argument("--k", type=int, default=16)
    parser.add_argument("--sets", nargs="*", default=SETS)
    parser.add_argument("--packets", type=int, default=2048)
    given = parser.parse_args()
    library = build()
    print("| N | D | set | leaves | most | tests | steps | lists | instructions | to uniform | causal to plain |")
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for n in given.n:
        for D in given.dims:
            uniform = None
            for name in given.sets:
                torch.manual_seed(1)
                x = points(name, n, D)
                found = count(library, x, given.k, False, given.packets)
                causal = count(library, x, given.k, True, given.packets)
                uniform = uniform or found["instructions"]
                lists = THIN * found["thinned"] + MOVE * found["moved"] + BATCH * found["batches"]
                print(
                    f"| {n} | {D} | {name} | {found['leaves']:.1f} | {found['most']:.0f} | {found['tests']:.1f} "
                    f"| {found['steps']:.1f} | {lists:.0f} | {found['instructions']:.0f} "
                    f"| {found['instructions'] / uniform:.2f} "
                    f"| {causal['instructions'] / found['instructions']:.2f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
