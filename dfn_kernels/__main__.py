"""`python -m dfn_kernels`: what is built, which backends each op has here, and why others are missing."""

import platform

import torch

from . import __version__, _native, backends
from ._backends import NAMES, TRITON_MISSING


def _versions() -> list[tuple[str, str]]:
    rows = [
        ("dfn_kernels", __version__),
        ("python", platform.python_version()),
        ("torch", torch.__version__),
    ]
    if TRITON_MISSING is None:
        import triton

        rows.append(("triton", triton.__version__))
    cpu = _native.CPU_MISSING or f"loaded, {torch.ops.dfn_cpu.instruction_set()}, {torch.get_num_threads()} threads"
    cuda = _native.CUDA_MISSING or f"loaded, {torch.ops.dfn_cuda.built_for()}"
    rows += [("_C_cpu", cpu), ("_C_cuda", cuda)]
    try:
        from . import _host  # noqa: F401

        rows.append(("_host", "loaded"))
    except ImportError as error:
        rows.append(("_host", str(error)))
    if torch.cuda.is_available():
        rows.append(("gpu", torch.cuda.get_device_name()))
    return rows


def main() -> None:
    for name, text in _versions():
        print(f"{name:12} {text}")
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


if __name__ == "__main__":
    main()
