import torch

from dfn_kernels.triton import farthest_points, packed_knn, set_means
from dfn_kernels.triton.knn import brute

from . import POINTER, Case

LONG = POINTER[torch.int64]


def cases():
    for dtype in (torch.float32, torch.float64):
        real, slow = POINTER[dtype], dtype == torch.float64
        types = {"P": real, "Q": real, "OUT_D": real, **dict.fromkeys(("FIRST", "END", "KEYS", "OUT_I"), LONG)}
        for causal, include_self in ((False, True), (False, False), (True, True)):
            flags = {"CAUSAL": causal, "INCLUDE_SELF": include_self}
            for K in (4, 8, 16, 32, 64) if dtype == torch.float32 else ():
                skip = not (K == 16 and causal)
                yield Case(packed_knn.lane_kernel, types, {**flags, "K": K, "BM": 128}, options=brute.EXACT, slow=skip)
            for K in (64, 128, 1024) if not causal or dtype == torch.float32 else ():
                skip = slow or K != 128 or not causal
                yield Case(packed_knn.row_kernel, types, {**flags, "K": K}, options=brute.EXACT, slow=skip)
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
