import pytest
import torch
import torch.nn.functional as F
from helpers import DEVICE, INTERPRETED, check_compiled

from dfn.flownetwork import vocabulary_loss as module
from dfn.flownetwork.vocabulary_loss import vocabulary_loss

pytestmark = pytest.mark.skipif(INTERPRETED, reason="not about kernels")


def make(lead=(3, 7), d=13, V=31, dtype=torch.float32):
    targets = torch.randint(V, lead, device=DEVICE)
    states, table = (torch.randn(*shape, d, device=DEVICE).to(dtype) for shape in (lead, (V,)))
    return {"states": states, "table": table, "targets": targets}


def plain(states, table, targets):
    return F.cross_entropy((states @ table.T).flatten(0, -2), targets.flatten())


@pytest.mark.parametrize("entries", [1, 100, 2**24])
def test_is_cross_entropy(entries, monkeypatch):
    monkeypatch.setattr(module, "ENTRIES", entries)  # one token, three tokens, all at a time
    inputs = make(dtype=torch.float64)
    ours, theirs = ({n: x.clone().requires_grad_(x.is_floating_point()) for n, x in inputs.items()} for _ in range(2))
    loss, want = vocabulary_loss(**ours), plain(**theirs)
    torch.testing.assert_close(loss, want)
    (3 * loss).backward()
    (3 * want).backward()
    for name in ("states", "table"):
        torch.testing.assert_close(ours[name].grad, theirs[name].grad)
    with torch.no_grad():
        torch.testing.assert_close(vocabulary_loss(**inputs), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_as_accurate_as_logits_in_float32(dtype):
    """The yardstick of the other ops: twice the error of the same computation in plain PyTorch."""
    inputs = make(lead=(64,), d=64, V=300, dtype=dtype)
    exact = {n: x.double() if x.is_floating_point() else x for n, x in inputs.items()}

    def run(op, inputs):
        leaves = {n: x.clone().requires_grad_(x.is_floating_point()) for n, x in inputs.items()}
        loss = op(**leaves)
        loss.backward()
        return loss.detach().double(), leaves["states"].grad.double(), leaves["table"].grad.double()

    def usual(states, table, targets):
        return F.cross_entropy((states @ table.T).float(), targets)

    for ours, theirs, want in zip(run(vocabulary_loss, inputs), run(usual, inputs), run(plain, exact), strict=True):
        unit = torch.finfo(dtype if want.ndim else torch.float32).eps
        assert (ours - want).norm() <= 2 * (theirs - want).norm() + unit * want.norm()


def test_far_logits_and_autocast():
    inputs = make()
    inputs["states"] *= 1e4  # probabilities of exactly 0 and 1 in float32
    want = plain(inputs["states"].double(), inputs["table"].double(), inputs["targets"])
    torch.testing.assert_close(vocabulary_loss(**inputs).double(), want, rtol=1e-5, atol=0)
    inputs = make()
    table = inputs["table"].requires_grad_()
    with torch.autocast(DEVICE, torch.bfloat16):
        loss = vocabulary_loss(**inputs)
    loss.backward()
    assert loss.dtype == torch.float32 and table.grad.dtype == torch.float32
    torch.testing.assert_close(loss, plain(**inputs), rtol=2e-2, atol=0)


def test_compile():
    compiled = torch.compile(vocabulary_loss, fullgraph=True, backend="aot_eager")
    check_compiled(vocabulary_loss, compiled, list(make().values()))


def test_second_derivative_and_bad_input():
    inputs = make()
    table = inputs["table"].requires_grad_()
    with pytest.raises(RuntimeError, match="^vocabulary_loss: there is no second derivative"):
        torch.autograd.grad(vocabulary_loss(**inputs), table, create_graph=True)
    with pytest.raises(ValueError, match=r"^vocabulary_loss: states .* same d, got \[3, 7, 13\] and \[31, 12\]"):
        vocabulary_loss(inputs["states"], torch.zeros(31, 12), inputs["targets"])
    with pytest.raises(ValueError, match=r"^vocabulary_loss: targets must have shape \[3, 7\], .* got \[21\]"):
        vocabulary_loss(inputs["states"], table, inputs["targets"].flatten())
    with pytest.raises(ValueError, match="^vocabulary_loss: targets must not be empty"):
        vocabulary_loss(torch.zeros(0, 13), table, torch.zeros(0, dtype=torch.int64))
