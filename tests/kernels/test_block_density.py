import pytest
import torch
from helpers import DEVICE, INTERPRETED, backends, same_bits
from helpers import check_against_reference as check
from test_pattern_route import make

import dfn_kernels
from dfn_kernels import BlockDensity, pattern_route
from dfn_kernels.pattern_route import spread_blocks

BACKENDS = backends("pattern_route")
SIZES = [dict(T=7, P=3, O=131, I=67)]
if not INTERPRETED:
    SIZES += [dict(O=131, I=67), dict(T=31, P=3, O=389, I=331), dict(T=1, O=5)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_matches_reference(backend, sizes):
    for dtype, top_k in ((torch.float32, None), (torch.bfloat16, None), (torch.float64, 2)):
        inputs = make(**sizes, dtype=dtype)
        sparse = BlockDensity(inputs["patterns"], 0.3)
        check(sparse, {**inputs, "top_k": top_k}, backend)


@pytest.mark.parametrize("backend", BACKENDS + ["reference"])
def test_is_the_masked_route(backend):
    inputs = make(T=9, P=2, O=300, I=200)
    inputs["patterns"].requires_grad_()
    sparse = BlockDensity(inputs["patterns"], 0.25)
    mask = spread_blocks(sparse.blocks, inputs["patterns"])
    with dfn_kernels.use_backend(backend):
        y, share = sparse(**inputs, return_share=True)
        want = pattern_route(**{**inputs, "patterns": inputs["patterns"].detach() * mask})
        torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-4)
        y.sum().backward()
    assert share.item() == pytest.approx(mask.double().mean().item()) and sparse.blocks.sum() == 2 * 3
    grad = inputs["patterns"].grad
    assert grad.masked_fill(mask, 0).eq(0).all() and grad[mask].ne(0).all()


def test_keeps_the_largest_and_refreshes():
    patterns = torch.rand(2, 256, 192, device=DEVICE)
    patterns[0, 128:, 64:128] += 9
    patterns[1, :128, 128:] -= 9
    sparse = BlockDensity(patterns, 1e-6)  # at least one block
    assert sparse.blocks.nonzero().tolist() == [[0, 1, 1], [1, 0, 2]]
    sparse.refresh(patterns.flip(1))
    assert sparse.blocks.nonzero().tolist() == [[0, 0, 1], [1, 1, 2]]
    assert BlockDensity(torch.ones(1, 256, 192), 0.5).blocks.flatten().tolist() == [True] * 3 + [False] * 3


def test_full_density_is_dense():
    inputs = make(O=150, I=70, dtype=torch.float64)
    torch.testing.assert_close(BlockDensity(inputs["patterns"], 1.0)(**inputs), pattern_route(**inputs))


def test_opcheck():
    i = make(T=7, O=131, I=67)
    blocks = BlockDensity(i["patterns"], 0.5).blocks
    for backend in BACKENDS:
        floats = [x.detach().requires_grad_() for x in i.values()]
        torch.library.opcheck(torch.ops.dfn.pattern_route, (*floats, None, blocks, False, backend))


def test_compile():
    i = make(T=7, O=131, I=67)
    sparse = BlockDensity(i["patterns"], 0.5)
    compiled = torch.compile(lambda x, w, P: sparse(x, w, P), fullgraph=True, dynamic=True)
    if "native" in BACKENDS:
        assert same_bits(compiled(i["x"], i["weights"], i["patterns"]), sparse(i["x"], i["weights"], i["patterns"]))


def test_bad_input():
    patterns = torch.zeros(2, 5, 7)
    for density in (0, -1.0, 1.1, float("nan")):
        with pytest.raises(ValueError, match="^BlockDensity: density must be above 0"):
            BlockDensity(patterns, density)
    with pytest.raises(TypeError, match="^BlockDensity: density must be a number"):
        BlockDensity(patterns, "0.1")
    with pytest.raises(ValueError, match=r"^BlockDensity: patterns must have shape \[P, O, I\]"):
        BlockDensity(patterns[0], 0.5)
    with pytest.raises(ValueError, match="^BlockDensity: patterns must have the shape"):
        BlockDensity(patterns, 0.5)(torch.zeros(3, 7), torch.zeros(3, 3), torch.zeros(3, 5, 7))
