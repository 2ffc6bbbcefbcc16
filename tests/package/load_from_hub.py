"""python load_from_hub.py FOLDER: loads the package from a hub folder by the `kernels` library, and uses it."""

import sys
from pathlib import Path

import torch
from kernels import get_local_kernel

dk = get_local_kernel(Path(sys.argv[1]))
points = torch.rand(500, 3, requires_grad=True)
near = dk.knn(points, 7)
with dk.use_backend("reference"):
    assert near.indices.equal(dk.knn(points, 7).indices)
dk.gaussian_gather(points, torch.randn(500, 5), near.indices, 0.1).square().sum().backward()
assert points.grad.isfinite().all() and points.grad.any()
print(f"{Path(dk.__file__).parent.name}: right, knn by {dk.backends()['knn']['cpu']}")
