import torch

from dfn_kernels.triton import knn as op

from . import POINTER, Case


def cases():
    index = POINTER[torch.int64]
    for dtype in (torch.float32, torch.float64):
        types = {**dict.fromkeys(("P", "Q", "OUT_D"), POINTER[dtype]), **dict.fromkeys(("LP", "LQ", "OUT_I"), index)}
        for causal, include_self, ragged in ((False, True, True), (False, False, False), (True, True, False),
                                             (True, False, True)):  # fmt: skip
            flags = {"HAS_LP": ragged, "HAS_LQ": ragged, "CAUSAL": causal, "INCLUDE_SELF": include_self}
            if dtype == torch.float32:
                for K in (4, 8, 16, 32, 64):
                    yield Case(op.lane_kernel, types, {**flags, "K": K, "BM": 128}, options=op.EXACT)
            lists = (64, 128) if dtype == torch.float64 else (128,)
            for K in (*lists, 1024) if ragged and not causal else lists:  # the longest takes half a minute to compile
                yield Case(op.row_kernel, types, {**flags, "K": K}, options=op.EXACT)
