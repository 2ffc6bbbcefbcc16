"""`python -m dfn_kernels`: what a maintainer asks first: versions, devices, what is built, which backend each op takes
here and why not another, and a second of checking that the default answers are right. Exit status 1 if one is not.
"""

import os
import platform
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

from . import (
    __version__,
    _native,
    backends,
    compat,  # noqa: F401  for what it registers
    field_sample,
    flow_attention,
    flow_drift,
    flow_norm,
    gaussian_gather,
    knn,
    low_rank_route,
    pattern_route,
    short_convolution,
    use_backend,
)
from ._backends import INTERPRETED, NAMES, TRITON_MISSING
from ._native import cpu_name


def _versions() -> list[tuple[str, str]]:
    rows = [
        ("dfn_kernels", f"{__version__}, {os.path.dirname(__file__)}"),
        ("python", f"{platform.python_version()}, {platform.platform()}"),
        ("torch", f"{torch.__version__}, CUDA {torch.version.cuda}, HIP {torch.version.hip}"),
    ]
    if TRITON_MISSING is None:
        import triton

        rows.append(("triton", triton.__version__ + (", interpreted" if INTERPRETED else "")))
    else:
        rows.append(("triton", TRITON_MISSING))
    cpu = _native.CPU_MISSING or f"loaded, {torch.ops.dfn_cpu.instruction_set()}"
    cuda = _native.CUDA_MISSING or f"loaded, {torch.ops.dfn_cuda.built_for()}"
    rows += [("_C_cpu", cpu), ("_C_cuda", cuda)]
    try:
        from . import _host  # noqa: F401

        rows.append(("_host", "loaded"))
    except ImportError as error:
        rows.append(("_host", f"{error}: build it with `make env`"))
    return rows


def _devices() -> list[tuple[str, str]]:
    rows = [("cpu", f"{cpu_name()}, {torch.get_num_threads()} threads of {os.cpu_count()}")]
    for i in range(torch.cuda.device_count()):
        shape = torch.cuda.get_device_properties(i)
        memory = f"{shape.total_memory / 2**30:.0f} GiB"
        rows.append((f"cuda:{i}", f"{shape.name}, sm_{shape.major}{shape.minor}, {memory}"))
    if torch.xpu.is_available():
        rows += [(f"xpu:{i}", torch.xpu.get_device_name(i)) for i in range(torch.xpu.device_count())]
    settings = [name for name in sorted(os.environ) if name.startswith(("DFN_", "TRITON_", "OMP_"))]
    return rows + [("environment", " ".join(f"{name}={os.environ[name]}" for name in settings) or "nothing set")]


# ---- the check ------------------------------------------------------------------------------------------------------
def _samples(device: str) -> dict[str, Callable[[], tuple[Tensor, ...]]]:
    """For each op what it gives for small inputs: sizes all different, primes among them."""
    draw = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw).to(device)

    p, s, v, W = random(2, 61, 3), random(2, 61, 17), random(2, 61, 13), random(3, 17)
    x, w, P, up, down = random(29, 17), random(29, 5), random(5, 11, 17), random(5, 11, 2), random(5, 2, 17)
    indices = torch.randint(61, (2, 61, 7), generator=draw).to(device)
    return {
        "knn": lambda: knn(p, 7),
        "gaussian_gather": lambda: (gaussian_gather(p, v, indices, 0.7, normalize=True),),
        "flow_drift": lambda: flow_drift(s, p, W),
        "flow_norm": lambda: (flow_norm(s, v[..., 0].square()),),
        "short_convolution": lambda: (short_convolution(s, x[:3]),),
        "flow_attention": lambda: flow_attention(s, p, W, v, 0.7, 5, causal=True)[:1],
        "pattern_route": lambda: (pattern_route(x, w, P),),
        "low_rank_route": lambda: (low_rank_route(x, w, up, down),),
        "field_sample": lambda: (field_sample(random(1, 9, 7).square(), 31)[0],),
    }


def _check(device: str) -> list[str]:
    """A line for each op whose default answer is not the reference's: of a search to the bit, of others closely."""
    wrong = []
    for op, run in _samples(device).items():
        if op == "field_sample":  # draws anew: in range is all there is to say
            if not all(bool(((0 <= y) & (y < 1)).all()) for y in run()):
                wrong.append(f"{op} on {device}: positions outside [0, 1)")
            continue
        ours = run()
        with use_backend("reference"):
            wanted = run()
        bound = 0.0 if op == "knn" else 1e-4
        worst = max(
            float((a.double() - b.double()).norm() / (b.double().norm() + 1e-30))
            for a, b in zip(ours, wanted, strict=True)
        )
        if not worst <= bound:
            wrong.append(f"{op} on {device}: off by {worst:.1e} of the reference, allowed {bound:.0e}")
    return wrong


def main() -> int:
    for title, rows in (("versions", _versions()), ("devices", _devices())):
        print(title)
        for name, text in rows:
            print(f"  {name:12} {text}")
    table = backends()
    reasons: dict[str, str] = {}
    width = max(map(len, table))
    print(f"\n{'op':{width}} {'device':7}" + "".join(f" {name:10}" for name in NAMES))
    for op, devices in table.items():
        for device, states in devices.items():
            cells = []
            for name in NAMES:
                state = states[name]
                if state not in ("default", "available"):
                    state = reasons.setdefault(state, f"no ({len(reasons) + 1})")
                cells.append(f" {state:10}")
            print(f"{op:{width}} {device:7}" + "".join(cells))
    for reason, mark in reasons.items():
        print(f"{mark[3:]} {reason}")

    start = time.perf_counter()
    tried = sorted({device for devices in table.values() for device in devices})
    wrong = [line for device in tried for line in _check(device)]
    seconds = f"{time.perf_counter() - start:.1f} s"
    print(f"\nself-check ({seconds}): " + ("; ".join(wrong) if wrong else f"every op is right on {', '.join(tried)}"))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
