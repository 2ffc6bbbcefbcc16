import torch

from dfn_kernels.flow_drift import WIDE
from dfn_kernels.triton import flow_drift as op

from . import POINTER, Case

WIDTHS = (64, 128, 256, 512, 1024)  # every padded width that goes by rows
AMD = {"PRECISION": "ieee"}


def different(tiles):
    return {tuple(tile.items()): tile for tile in tiles}.values()


def cases():
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        value = POINTER[dtype]
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        types = dict.fromkeys(("P", "W", "B", "A", "PN", "F", "E", "GP", "GF", "GE", "PART", "GW", "GB", "GA"),
                              POINTER[wide])  # fmt: skip
        types |= {"S": value, "GS": value}
        outputs = range(1, WIDE[wide] + 1)
        for tile in different(op.forward_tile(n, dtype, wide) for n in outputs):
            for has in (True, False):
                yield Case(op.forward_kernel, types, {"HAS_BIAS": has, **tile}, options={}, amd=AMD)
        for tile in different(op.backward_tile(n, d, dtype, wide) for n in outputs for d in WIDTHS):
            yield Case(op.backward_kernel, types, tile, op.backward_warps(tile), {}, amd=AMD)
        if dtype in (torch.float32, torch.float64):
            yield Case(op.sum_kernel, types, op.SUM, options={})
        for D in (1, 2, 3):
            for d in WIDTHS[1:]:
                if not op.by_rows(1, D, d, wide):
                    continue
                rare = (D, d) not in ((3, 256), (2, 1024))
                if dtype != wide:
                    for has in (True, False):
                        tile = {"HAS_BIAS": has, **op.forward_rows_tile(D, d)}
                        yield Case(op.forward_rows_kernel, types, tile, options=dict(op.ROWS), slow=rare)
                tile = op.backward_rows_tile(D, d)
                yield Case(op.backward_rows_kernel, types, tile, op.backward_warps(tile), {}, rare, {"STAGES": 1})
