"""What a DFN is held against: sizes, causality to the bit, RoPE and windows against naive formulas; the split."""

import math

import pytest
import torch
from torch import nn

from dfn.models.layers import count_parameters
from dfn.studies.language import SIZES
from dfn.studies.rivals import (
    KINDS,
    RIVALS,
    RotaryAttention,
    TransformerPlus,
    contender,
    fitted,
    rival,
    rotated,
    windowed_attention,
)
from dfn.studies.sources import bits_at_temperatures, bits_by_place, calibrated, split_by_content, windows

pytestmark = pytest.mark.usefixtures("one_thread")
DFN = dict(vocab_size=37, dim=64, layers=2, k=5)


@pytest.mark.parametrize("kind", KINDS)
def test_no_later_id_changes_a_bit(kind):
    N, cut = 45, 29  # windows of 11, which do not divide N
    model = contender(kind, DFN, N).eval()
    ids = torch.randint(37, (3, N))
    other = torch.cat([ids[:, :cut], (ids[:, cut:] + 1) % 37], 1)
    with torch.no_grad():
        a, b = model(ids)[0], model(other)[0]
    assert a.shape == (3, N, 37) and a.isfinite().all()
    assert torch.equal(a[:, :cut], b[:, :cut])
    assert not torch.allclose(a[:, cut:], b[:, cut:])


@pytest.mark.parametrize("size", ["0.1M", "0.3M", "1M"])
@pytest.mark.parametrize("kind", RIVALS)
def test_equal_parameters(kind, size):
    config = dict(vocab_size=256, **SIZES[size])
    state = torch.get_rng_state()
    wanted = count_parameters(contender("dfn", config, 256))
    torch.set_rng_state(state)
    model = contender(kind, config, 256)
    assert abs(count_parameters(model) / wanted - 1) <= 0.02
    torch.set_rng_state(state)
    again = contender(kind, config, 256)  # sizing draws no random numbers
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize("kind", ["dfn", "transformer++", "window", "convolved", "transformer"])
def test_dropout(kind):
    """In training it changes what comes out; trained or not, it costs no parameter and leaves judging as it is."""
    build = lambda **share: contender(kind, DFN, 16, **share)  # noqa: E731
    plain, ids = build(), torch.randint(37, (2, 16))
    for name in ("dropout", "attention_dropout"):
        model = build(**{name: 0.5})
        model.load_state_dict(plain.state_dict())
        with torch.no_grad():
            assert not torch.allclose(model(ids)[0], model(ids)[0]) and torch.equal(plain(ids)[0], plain(ids)[0])
            torch.testing.assert_close(model.eval()(ids)[0], plain.eval()(ids)[0])
            plain.train()
        added = [m.p for m in model.modules() if isinstance(m, nn.Dropout)].count(0.5)
        assert added >= 1 + (2 if kind == "transformer" else 0) if name == "dropout" else added == 0


def test_same_shape():
    model = contender("transformer++", DFN, 30, same_shape=True)
    assert model.embed.embedding_dim == 64 and len(model.blocks) == 2


def test_what_cannot_be_fitted():
    with pytest.raises(ValueError, match="no size comes within 2 % of 1,000 parameters; 1 has 9,999"):
        fitted(lambda size: nn.Linear(9999, size, bias=False), 1000)
    with pytest.raises(ValueError, match="kind must be one of transformer.*, got 'rnn'"):
        rival("rnn", 1000, 8)
    with pytest.raises(ValueError, match="dim must be a multiple of 2 heads, got 12 and 4"):
        RotaryAttention(12, 4)
    for name in ("dropout", "attention_dropout"):
        with pytest.raises(ValueError, match="dropout must be 0 for flownetwork, which has none, got 0.1"):
            contender("flownetwork", DFN, 16, **{name: 0.1})


def naive(module, x, window):
    """Row by row, head by head, with complex numbers for the rotation."""
    N, d = x.shape
    c = d // module.heads
    q, k, v = (x @ w.T for w in module.qkv.weight.double().chunk(3))
    out = torch.zeros(N, d, dtype=torch.float64)
    for h in range(module.heads):
        part = slice(h * c, (h + 1) * c)

        def turned(z, i, part=part):
            z = z[i, part]
            angle = i * 10000.0 ** (-torch.arange(c // 2, dtype=torch.float64) * 2 / c)
            w = torch.complex(z[: c // 2], z[c // 2 :]) * torch.exp(1j * angle)
            return torch.cat([w.real, w.imag])

        for i in range(N):
            seen = range(max(0, i - window + 1), i + 1)
            scores = torch.stack([turned(q, i) @ turned(k, j) for j in seen]) / math.sqrt(c)
            out[i, part] = scores.softmax(0) @ v[list(seen), part]
    return out @ module.out.weight.double().T


@pytest.mark.parametrize("window", [1, 3, 7, 11, 40])
def test_rope_and_window(window):
    module = RotaryAttention(24, 3, window).double()
    module.rates = module.rates.double()
    x = torch.randn(2, 11, 24, dtype=torch.float64)
    with torch.no_grad():
        got = module(x)
        for row in range(2):  # the rotation itself is in float32
            torch.testing.assert_close(got[row], naive(module, x[row], window), rtol=2e-5, atol=2e-6)


def test_rope_knows_distances_only():
    q, k = torch.randn(2, 8)
    rates = 10000.0 ** (-torch.arange(0, 8, 2) / 8)
    turn = lambda z, place: rotated(z, (place * rates).cos(), (place * rates).sin())  # noqa: E731
    for distance in (0, 5):
        scores = torch.stack([turn(q, at + distance) @ turn(k, at) for at in (0, 3, 17)])
        torch.testing.assert_close(scores, scores[:1].expand(3), rtol=1e-4, atol=1e-4)


def test_window_has_gradients():
    q, k, v = (torch.randn(1, 2, 13, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    torch.autograd.gradcheck(lambda *x: windowed_attention(*x, 5), (q, k, v))


def test_output_maps_start_smaller():
    torch.manual_seed(0)
    model = TransformerPlus(50, 64, layers=8)
    ratio = model.blocks[0][1].out.weight.std() / model.blocks[0][1].qkv.weight.std()
    assert abs(ratio.item() * 4 - 1) < 0.05


# ---- the text -------------------------------------------------------------------------------------------------------
def write(folder, names):
    folder.mkdir()
    for name, n in names.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"file %d says " % n + bytes([65 + n % 26]) * (100 + n))


def test_split_is_by_content(tmp_path):
    """Renamed, moved, doubled and in another order, every file stays on its side."""
    write(tmp_path / "a", {f"{n}.txt": n for n in range(200)})
    write(tmp_path / "b", {**{f"x/{7 * n % 200:03}.py": n for n in range(200)}, "twice.txt": 5, "again/5": 5})
    (tmp_path / "b" / "binary").write_bytes(b"\0" * 500)
    (tmp_path / "b" / ".hidden").write_bytes(b"hidden" * 50)
    write(tmp_path / "b" / ".git", {"objects/ab": 777})
    one, two = (split_by_content(tmp_path / name) for name in "ab")
    assert torch.equal(one.train, two.train) and torch.equal(one.held_out, two.held_out)
    assert one.files + one.held_out_files == 200 and 2 <= one.held_out_files <= 20
    held = bytes(one.held_out.tolist())
    assert not any(
        b"file %d says " % n in held and b"file %d says " % n in bytes(one.train.tolist()) for n in range(200)
    )
    (tmp_path / "a" / "more.txt").write_bytes(b"another one " * 30)  # moves no other
    three = split_by_content(tmp_path / "a")
    assert len(three.train) + len(three.held_out) == len(one.train) + len(one.held_out) + 360
    assert three.held_out_files - one.held_out_files in (0, 1)


def test_split_of_one_file_and_of_too_little(tmp_path):
    (tmp_path / "one.txt").write_bytes(b"0123456789" * 200)
    split = split_by_content(tmp_path / "one.txt")
    assert len(split.train) == 1800 and len(split.held_out) == 200
    (tmp_path / "one.txt").write_bytes(b"short")
    with pytest.raises(ValueError, match="too little text in one.txt"):
        split_by_content(tmp_path / "one.txt")
    with pytest.raises(ValueError, match="no such file or folder"):
        split_by_content(tmp_path / "none")


def test_windows():
    """All that there are, or evenly many of them from the first to the last, each with the byte behind it."""
    data = torch.arange(103, dtype=torch.uint8)
    assert torch.equal(windows(data, 20), torch.stack([data[i : i + 21] for i in range(0, 100, 20)]))
    assert windows(data, 20, 3)[:, 0].tolist() == [0, 40, 80] and len(windows(data, 20, 9)) == 5
    assert torch.equal(windows(data, 102, 1), data[None])
    with pytest.raises(ValueError, match="more than length = 103 bytes, got 103"):
        windows(data, 103)


def test_bits_by_place():
    """Against a loop over windows and places."""
    data = torch.randint(37, (103,), dtype=torch.uint8)
    model = contender("dfn", DFN, 20).eval()
    got, want = bits_by_place(model, windows(data, 20), rows=2), torch.zeros(20, dtype=torch.float64)
    with torch.no_grad():
        for start in range(0, 100, 20):
            logits = model(data[start : start + 20][None].long())[0][0].double()
            for place in range(20):
                want[place] -= logits[place].log_softmax(0)[int(data[start + place + 1])] / math.log(2) / 5
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    for T, at in zip((0.5, 3.0), bits_at_temperatures(model, windows(data, 20), (0.5, 3.0), rows=3), strict=True):
        model.head.register_forward_hook(lambda _, __, logits, T=T: logits / T)
        torch.testing.assert_close(at, bits_by_place(model, windows(data, 20)), rtol=1e-5, atol=1e-5)
        model.head._forward_hooks.clear()


def test_calibrated():
    """A model that is sure by a factor gets it back; each half is judged at what suits the other one."""
    truth = 2 * torch.randn(11, 11)
    data, right = [torch.zeros(400, 1, dtype=torch.long)], truth.log_softmax(1)
    for _ in range(20):
        data.append(right[data[-1][:, 0]].exp().multinomial(1))
    data = torch.cat(data, 1).to(torch.uint8)

    class Bigram(torch.nn.Module):
        def __init__(self, factors):
            super().__init__()
            self.table, self.factors, self.seen = torch.nn.Parameter(right), factors, 0

        def forward(self, ids):
            self.seen += len(ids)
            return self.table[ids] * self.factors[self.seen > 200], None

    want = float(bits_by_place(Bigram((1, 1)), data).mean())
    value, temperature = calibrated(Bigram((1.5, 1.5)), data)
    assert abs(temperature - 1.5) <= 0.1 and want - 1e-3 <= value < want + 0.01
    value, temperature = calibrated(Bigram((1.8, 1.0)), data)  # each half takes the other one's
    assert abs(temperature - 1.4) <= 0.1 and value > want + 0.05
