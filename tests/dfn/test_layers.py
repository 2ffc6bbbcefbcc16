"""The layers against the formulas written out, causality to the bit, padding, gradients, compilation."""

import copy

import pytest
import torch
from helpers import check_compiled_module, same_bits
from torch import nn

from dfn.models.layers import (
    DFNBlock,
    DFNLayer,
    DynamicFlowAttention,
    EntityPositions,
    FlowMixer,
    FlowNorm,
    recommended_heads,
)
from dfn_kernels import flow_drift, gaussian_gather, knn

DIM = 24


def published(layer: DFNLayer, states, positions, influence):
    """f_i = W_f s_i, p_i' = p_i + alpha f_i, y_i = sum_j w_j g(|p_i' - p_j'|) W_v s_j, FlowNorm(MLP([s, y]))."""
    outputs, moved = [], []
    for s, p, w in zip(states, positions, influence, strict=True):
        f = s @ layer.flow.weight.T
        p = p + layer.alpha * f
        v = s @ layer.value.weight.T
        energy, y = f.square().sum(-1), torch.zeros_like(s)
        for i in range(len(s)):
            d = (p[i] - p).square().sum(-1)
            allowed = [j for j in range(len(s)) if j <= i or not layer.causal]
            near = sorted(allowed, key=lambda j: (d[j].item(), j))[: layer.k]
            y[i] = sum(w[j] * torch.exp(-d[j] / (2 * layer.sigma**2)) * v[j] for j in near)
        z = layer.mlp(torch.cat([s, y], -1))
        count = torch.arange(1, len(s) + 1)[:, None]
        mean = energy.cumsum(0)[:, None] / count if layer.causal else energy.mean()
        outputs.append(z / (mean + 1e-6).sqrt())
        moved.append(p)
    return torch.stack(outputs), torch.stack(moved)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("pos_dim", [None, 2])
def test_layer_is_the_published_one(causal, pos_dim):
    layer = DFNLayer(13, k=5, alpha=0.3, pos_dim=pos_dim, sigma=1.7, causal=causal).double()
    states, positions = torch.randn(2, 17, 13).double(), torch.randn(2, 17, pos_dim or 13).double()
    influence = torch.rand(2, 17).double() + 0.1
    with torch.no_grad():
        for got, want in zip(
            layer(states, positions, influence), published(layer, states, positions, influence), strict=True
        ):
            torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
        ones = layer(states, positions)[0]
        torch.testing.assert_close(
            ones, published(layer, states, positions, torch.ones(2, 17).double())[0], rtol=1e-10, atol=1e-10
        )


def plain_block(block: DFNBlock, x, p):
    """The block in plain PyTorch, all distances at once."""
    a = block.attention
    B, N, d = x.shape
    s = block.said(x)
    f = a.flow(s).view(B, N, a.heads, a.pos_dim).transpose(1, 2)
    p = p + a.alpha.view(1, -1, 1, 1) * f
    r = a.receiver(s).view(B, N, a.heads, a.pos_dim).transpose(1, 2)
    q = p + a.alpha.view(1, -1, 1, 1) * r + a.offset[None, :, None]
    squares = (q[:, :, :, None] - p[:, :, None]).square().sum(-1)
    future = torch.ones(N, N, dtype=torch.bool).triu(1) if a.causal else torch.zeros(N, N, dtype=torch.bool)
    allowed = squares.detach().masked_fill(future, torch.inf)
    keep = (allowed <= allowed.kthvalue(min(a.k, N), -1, keepdim=True).values) & ~future
    logits = -squares / (2 * a.log_sigma.exp().view(1, -1, 1, 1) ** 2)
    logits = logits + a.salience(s).transpose(1, 2)[:, :, None]
    weights = logits.masked_fill(~keep, -torch.inf).softmax(-1)
    v = a.value(s).view(B, N, a.heads, -1).transpose(1, 2)
    y = (weights @ v).transpose(1, 2).reshape(B, N, d)
    energy = f.square().sum((1, 3))
    mean = energy.cumsum(1) / torch.arange(1, N + 1) if a.causal else energy.mean(1, keepdim=True)
    update = block.mlp(torch.cat([s, y], -1)) / (mean[..., None] + block.flow_norm.eps).sqrt()
    return x + block.out(y) + update, p


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("heads", [1, 4])
def test_block_in_plain_pytorch(causal, heads):
    block = DFNBlock(DIM, heads=heads, k=5, causal=causal).double()
    with torch.no_grad():
        for p in block.attention.parameters():
            p += 0.1 * torch.randn_like(p)
    x, positions = torch.randn(2, 19, DIM).double(), torch.randn(2, heads, 19, 3).double()
    got = block(x, positions)
    want = plain_block(block, x, positions)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    grads = [torch.autograd.grad(out[0].square().sum() + out[1].sum(), list(block.parameters())) for out in (got, want)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


def test_attention_of_the_building_blocks():
    """flow_drift, knn and gaussian_gather by hand are flow_attention."""
    a = DynamicFlowAttention(DIM, k=5)
    s, p = torch.randn(2, 19, DIM), torch.randn(2, 4, 19, 3)
    lengths = torch.tensor([19, 8])
    got, drift = a(s, p, None, lengths)
    flow, bias = a.flow.weight.view(4, 3, DIM), a.flow.bias.view(4, 3)
    moved = flow_drift(s, p, flow, bias, a.alpha)
    seeking = flow_drift(s, p, flow + a.receiver.weight.view(4, 3, DIM), bias, a.alpha)
    queries, rows = seeking.positions + a.offset[:, None], lengths[:, None].expand(2, 4).contiguous()
    near = knn(moved.positions, 5, queries=queries, lengths=rows, query_lengths=rows)
    y = gaussian_gather(moved.positions, a.split(a.value(s)), near.indices, a.log_sigma.exp(),
                        query_positions=queries, influence=a.salience(s).exp().transpose(1, 2),
                        normalize=True)  # fmt: skip
    torch.testing.assert_close(got, y.transpose(1, 2).flatten(2))
    assert same_bits(drift.positions, moved.positions) and same_bits(drift.energy, moved.energy)


def causal_modules():
    """name -> a function of x [B, N, DIM] with outputs [B, N, ..]."""
    layer = DFNLayer(DIM, k=4, causal=True, pos_dim=3)
    block, places = DFNBlock(DIM, k=4, causal=True), EntityPositions(DIM)
    mixer = FlowMixer(DIM, k=4)

    def of_block(x):
        states, positions = block(x, places(x))
        return torch.cat([states, positions.transpose(1, 2).flatten(2)], -1)

    return {"layer": lambda x: torch.cat(layer(x, x[..., :3].contiguous()), -1), "block": of_block, "mixer": mixer}


@pytest.mark.parametrize("name", ["layer", "block", "mixer"])
def test_causal_to_the_bit(name):
    module = causal_modules()[name]
    x = torch.randn(2, 41, DIM)
    with torch.no_grad():
        before = module(x)
        for start in (40, 23, 1):
            for scale in (1e-3, 1.0, 1e6):
                other = x.clone()
                other[:, start:] += scale * torch.randn_like(other[:, start:])
                after = module(other)
                assert same_bits(after[:, :start], before[:, :start])
                assert not after[:, start:].equal(before[:, start:])


def test_lengths():
    """Padding is read by nobody: what stands before it is to the bit the same whatever it holds."""
    lengths = torch.tensor([11, 23, 1])
    x, other = torch.randn(3, 23, DIM), torch.randn(3, 23, DIM)
    row = torch.arange(23) < lengths[:, None]
    other = torch.where(row[..., None], x, 50 * other)
    for causal in (False, True):
        layer, block = DFNLayer(DIM, k=4, causal=causal, pos_dim=3), DFNBlock(DIM, k=4, causal=causal)
        places = EntityPositions(DIM)
        for net in (layer, block):

            def module(v, n, net=net, places=places):
                return net(v, v[..., :3].contiguous() if isinstance(net, DFNLayer) else places(v), None, n)[0]

            with torch.no_grad():
                got, same = module(x, lengths), module(other, lengths)
                assert same_bits(got[row], same[row])
                for b, n in enumerate(lengths.tolist()):
                    torch.testing.assert_close(got[b, :n], module(x[b : b + 1, :n], None)[0], rtol=1e-4, atol=1e-5)
        assert layer(x, x[..., :3].contiguous(), None, lengths)[0][~row].eq(0).all()
        assert same_bits(block(x, places(x), None, lengths)[0][~row], x[~row])


@pytest.mark.parametrize("causal", [False, True])
def test_mixer_padding(causal):
    mixer = FlowMixer(DIM, k=4, causal=causal)
    x = torch.randn(4, 19, DIM)
    mask = torch.zeros(4, 19, dtype=torch.bool)
    mask[1, 12:], mask[2, :7], mask[3, [0, 3, 4, 11, 18]] = True, True, True
    noise = torch.where(mask[..., None], torch.full_like(x, float("nan")), x)
    with torch.no_grad():
        y = mixer(x, key_padding_mask=mask)
        assert same_bits(y, mixer(noise, key_padding_mask=mask)) and y[mask].eq(0).all()
        for b in range(4):
            torch.testing.assert_close(y[b, ~mask[b]], mixer(x[b : b + 1, ~mask[b]])[0], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(y[0], mixer(x)[0])
        all_padding = mixer(x, key_padding_mask=torch.ones_like(mask))
        assert all_padding.eq(0).all()
    with pytest.raises(TypeError, match="key_padding_mask must be bool"):
        mixer(x, mask.float())
    with pytest.raises(ValueError, match=r"key_padding_mask must have shape \[4, 19\]"):
        mixer(x, mask[:, 1:])


def test_mixer_in_a_transformer_block():
    """As a user has it: norm, mixer, residual, norm, MLP, residual."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm1, self.norm2, self.mixer = nn.LayerNorm(DIM), nn.LayerNorm(DIM), FlowMixer(DIM, heads=3)
            self.mlp = nn.Sequential(nn.Linear(DIM, 2 * DIM), nn.GELU(), nn.Linear(2 * DIM, DIM))

        def forward(self, x, mask):
            x = x + self.mixer(self.norm1(x), key_padding_mask=mask)
            return x + self.mlp(self.norm2(x))

    block = Block()
    x, mask = torch.randn(2, 11, DIM), torch.arange(11).expand(2, -1) >= torch.tensor([[11], [5]])
    block(x, mask).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in block.parameters())


def test_gradients_reach_every_parameter():
    for module in (
        DFNLayer(DIM, k=4, pos_dim=3),
        DFNBlock(DIM, k=4),
        DFNBlock(DIM, k=4, causal=True),
        FlowMixer(DIM, k=4),
    ):
        x = torch.randn(2, 17, DIM, requires_grad=True)
        if isinstance(module, FlowMixer):
            loss = module(x).square().sum()
        else:
            heads = () if isinstance(module, DFNLayer) else (4,)
            states, positions = module(x, torch.randn(2, *heads, 17, 3))
            loss = states.square().sum() + positions.square().sum()
        loss.backward()
        for name, p in [*module.named_parameters(), ("x", x)]:
            assert p.grad is not None and p.grad.isfinite().all() and p.grad.any(), f"{type(module).__name__}.{name}"


def test_influence():
    """An entity without influence says nothing: its values do not matter; an influence of 2 counts double."""
    layer = DFNLayer(DIM, k=17, pos_dim=3)
    layer.mlp, layer.norm = nn.Identity(), FlowNorm(1.0, "entity")
    x, p = torch.randn(1, 17, DIM), torch.randn(1, 17, 3)
    w = torch.ones(1, 17)
    y = layer(x, p, w)[0][..., DIM:]
    torch.testing.assert_close(layer(x, p, 2 * w)[0][..., DIM:], 2 * y)
    w[0, 5] = 0
    block = DFNBlock(DIM, heads=1, k=17)
    places = p[:, None]
    with torch.no_grad():
        loud = block.attention(x, places, w)[0]
        keep = [i for i in range(17) if i != 5]
        torch.testing.assert_close(
            loud[:, keep], block.attention(x[:, keep], places[:, :, keep])[0], rtol=1e-4, atol=1e-5
        )


def test_state_dict_and_deepcopy():
    for make in (lambda: DFNLayer(DIM, pos_dim=3), lambda: DFNBlock(DIM, causal=True), lambda: FlowMixer(DIM)):
        module, other = make(), make()
        x, p = torch.randn(2, 9, DIM), torch.randn(2, 9, 3)

        def call(m, x=x, p=p):
            if isinstance(m, FlowMixer):
                return m(x)
            return m(x, p if isinstance(m, DFNLayer) else p[:, None].expand(-1, 4, -1, -1))[0]

        other.load_state_dict(module.state_dict())
        assert same_bits(call(module), call(other)) and same_bits(call(module), call(copy.deepcopy(module)))


@pytest.mark.parametrize("kind", [DFNLayer, DFNBlock, FlowMixer])
def test_compiles_without_graph_breaks(kind):
    module = kind(DIM, k=4, causal=True)
    x = torch.randn(2, 13, DIM)
    inputs = {DFNLayer: (x, torch.randn(2, 13, DIM)), DFNBlock: (x, torch.randn(2, 4, 13, 3)), FlowMixer: (x,)}[kind]
    check_compiled_module(module, lambda y: y if torch.is_tensor(y) else y[0], *inputs)


def test_autocast_keeps_positions_exact():
    block, places = DFNBlock(DIM, k=4, causal=True), EntityPositions(DIM)
    x = torch.randn(2, 300, DIM)
    with torch.no_grad(), torch.autocast(x.device.type, torch.bfloat16):
        start = places(x)
        states, positions = block(x, start)
    assert start.dtype == positions.dtype == states.dtype == torch.float32
    assert same_bits(start[:, -1, :, 0], places.log_scale[-1].exp() * torch.arange(300.0).expand(2, -1))
    with torch.no_grad():
        exact = block(x, places(x))[0]  # a few entities get another neighbour through rounding
        assert (states - exact).norm() < 0.03 * exact.norm()


def test_recommended_heads():
    assert recommended_heads(4) == ([0, 0.125, 0.5, 1], [1, 0.1, 0.1, 0.1], [1, 2, 2, 0.4], [0, 0, 0, -1])
    for heads in range(1, 13):
        for values in recommended_heads(heads):
            assert len(values) == heads
        places = EntityPositions(12, heads, pos_dim=1)
        assert places(torch.randn(1, 5, 12)).shape == (1, heads, 5, 1)
    with pytest.raises(ValueError, match="heads must be at least 1, got 0"):
        recommended_heads(0)
    with pytest.raises(ValueError, match="dim must be a multiple of heads, got 10 and 4"):
        DynamicFlowAttention(10)
