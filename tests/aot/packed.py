import torch

from dfn_kernels.triton import farthest_points, set_means

from . import POINTER, Case

LONG = POINTER[torch.int64]


def cases():
    for dtype in (torch.float32, torch.float64):
        real, slow = POINTER[dtype], dtype == torch.float64
        for causal in (False, True):
            for backward in (False, True):
                constants = {"CAUSAL": causal, "BACKWARD": backward, "BN": 1024}
                yield Case(
                    set_means.means_kernel, {"X": real, "Y": real, "PTR": LONG}, constants, options={}, slow=slow
                )
        types = {"P": real, "DISTS": real, **dict.fromkeys(("PTR", "OUT_PTR", "START", "OUT"), LONG)}
        for start in (False, True):
            constants = {"HAS_START": start, "BN": 1024}
            yield Case(farthest_points.farthest_kernel, types, constants, options=farthest_points.EXACT, slow=slow)
