"""The cases, named once: inputs, our op, the best that one can compose or install instead, what counts as right.

Tests take their inputs from here too (tests/package/test_bench.py runs every case at its small size).
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

import dfn_kernels as dk
from dfn.flownetwork import FlowLayer
from dfn.models.layers import DFNBlock
from dfn_kernels._backends import NAMES, choose, missing

from . import peers
from .names import readable


@dataclass(frozen=True)
class Case:
    op: str
    sizes: dict[str, int]
    make: Callable[..., dict]  # (device=, dtype=, **sizes) -> inputs, tensors or modules
    ours: Callable[..., Tensor]  # (**inputs) -> one tensor; run under use_backend for each backend
    peers: dict[str, Callable[..., Tensor]] = field(default_factory=dict)  # the same, by other means
    gpu_peers: dict[str, Callable[..., Tensor]] = field(default_factory=dict)  # those that take CUDA tensors only
    grads: tuple[str, ...] = ()  # inputs whose gradients the training step needs, beside all parameters of modules
    small: dict[str, int] = field(default_factory=dict)  # sizes for tests and for a quick look
    other_work: tuple[str, ...] = ()  # peers that do a comparable job, not the same one: their result is not compared
    work: Callable[..., tuple[float, float]] | None = None  # (**sizes, itemsize=) -> bytes moved, operations
    exact: bool = False  # the result must be equal, not just close
    compiled: tuple[str, ...] = ()  # peers that take part a second time, through torch.compile
    forward_only: tuple[str, ...] = ()  # peers whose backward pass is no alternative
    layer: str = ""  # the module, where the case is a whole layer around the op
    variant: str = ""  # what sets it apart from a case of the same op and sizes
    gpu_only: bool = False  # a CPU would take minutes
    goals: dict[str, float] = field(default_factory=dict)  # milliseconds on an H200, by "mode dtype"

    @property
    def name(self) -> str:
        return (
            (self.layer or self.op) + self.variant + "".join(f"-{letter}{size}" for letter, size in self.sizes.items())
        )

    @property
    def words(self) -> str:
        return readable(self.name)


# ---- flow_drift -----------------------------------------------------------------------------------------------------
def make_drift(B, N, d, D, *, device, dtype):
    return {
        "states": torch.randn(B, N, d, device=device, dtype=dtype),
        "positions": torch.rand(B, N, D, device=device),
        "weight": torch.randn(D, d, device=device) / d**0.5,
        "bias": torch.randn(D, device=device),
    }


def our_drift(**inputs):
    return torch.cat([x if x.ndim == 3 else x.unsqueeze(-1) for x in dk.flow_drift(**inputs)], -1)


# ---- flow_norm ------------------------------------------------------------------------------------------------------
def make_norm(B, N, d, *, device, dtype):
    return {
        "states": torch.randn(B, N, d, device=device, dtype=dtype),
        "energy": torch.rand(B, N, device=device) + 0.1,
    }


def our_norm(states, energy):
    return dk.flow_norm(states, energy, mode="causal")


# ---- short_convolution ----------------------------------------------------------------------------------------------
def make_convolution(B, N, d, W, *, device, dtype):
    return {
        "x": torch.randn(B, N, d, device=device, dtype=dtype),
        "weight": torch.randn(W, d, device=device) / W**0.5,
    }


# ---- knn ------------------------------------------------------------------------------------------------------------
def make_points(B, N, D, k, *, device, dtype):
    return {"positions": torch.rand(B, N, D, device=device), "k": k}


def our_knn(positions, k):
    return dk.knn(positions, k).indices


def causal_knn(positions, k):
    return dk.knn(positions, k, causal=True).indices


# ---- gaussian_gather ------------------------------------------------------------------------------------------------
def make_gather(B, H, N, D, c, k, *, device, dtype):
    positions = torch.rand(B, H, N, D, device=device)
    return {
        "positions": positions,
        "values": torch.randn(B, H, N, c, device=device, dtype=dtype),
        "indices": dk.knn(positions, k).indices,
        "sigma": torch.full((H,), (k / N) ** (1 / D), device=device),
    }


def our_gather(**inputs):
    return dk.gaussian_gather(**inputs)


def make_planned_gather(B, H, N, D, c, k, *, device, dtype):
    """With what a plan holds, for every backend that runs here."""
    inputs = make_gather(B, H, N, D, c, k, device=device, dtype=dtype)
    plans = {}
    for backend in NAMES:
        if missing("gaussian_gather", backend, device) is None:
            with dk.use_backend(backend):
                plans[backend] = dk.gather_plan(inputs["indices"], inputs["positions"])
    return {**inputs, "indices": plans}


def our_planned_gather(indices, positions, **inputs):
    plan = indices[choose("gaussian_gather", positions.device.type)]
    return dk.gaussian_gather(positions, indices=plan, **inputs)


# ---- flow_attention -------------------------------------------------------------------------------------------------
def make_attention(B, H, N, D, d, k, *, device, dtype):
    return {
        "states": torch.randn(B, N, d, device=device, dtype=dtype),
        "positions": torch.rand(B, H, N, D, device=device),
        "flow_weight": torch.randn(H, D, d, device=device) * 0.1 / (d**0.5 * N ** (1 / D)),
        "values": torch.randn(B, H, N, d // H, device=device, dtype=dtype),
        "sigma": torch.full((H,), (k / N) ** (1 / D), device=device),
        "k": k,
    }


def our_attention(k, **inputs):
    return dk.flow_attention(**inputs, k=k, causal=True)[0]


# ---- routing --------------------------------------------------------------------------------------------------------
def make_route(T, P, I, O, *, device, dtype):
    return {
        "x": torch.randn(T, I, device=device, dtype=dtype),
        "weights": torch.randn(T, P, device=device).softmax(-1).to(dtype),
        "patterns": torch.randn(P, O, I, device=device, dtype=dtype) / I**0.5,
    }


def our_route(**inputs):
    return dk.pattern_route(**inputs)


def make_low_rank(T, P, I, O, r, *, device, dtype):
    inputs = make_route(T, P, I, O, device=device, dtype=dtype)
    del inputs["patterns"]
    inputs["up"] = torch.randn(P, O, r, device=device, dtype=dtype) / r**0.5
    inputs["down"] = torch.randn(P, r, I, device=device, dtype=dtype) / I**0.5
    return inputs


def our_low_rank(**inputs):
    return dk.low_rank_route(**inputs)


# ---- field_sample ---------------------------------------------------------------------------------------------------
def make_density(B, G, n, *, device, dtype):
    return {"density": torch.rand(B, G, device=device).square(), "n": n}


def our_sample(density, n):
    return dk.field_sample(density, n)[0]


# ---- layers: modules around the ops, whose parameters get gradients, too --------------------------------------------
def make_block(B, N, d, H, *, device, dtype):
    return {
        "states": torch.randn(B, N, d, device=device, dtype=dtype),
        "positions": torch.rand(B, H, N, 3, device=device),
        "block": DFNBlock(d, H, causal=True).to(device, dtype),
        "transformer": peers.transformer_layer(d, H).to(device, dtype),
    }


def our_block(states, positions, block, transformer):
    return block(states, positions)[0]


def make_flow_layer(T, P, I, O, *, device, dtype):
    return {"x": torch.randn(T, I, device=device, dtype=dtype), "layer": FlowLayer(I, O, P).to(device, dtype)}


def our_flow_layer(x, layer):
    return layer(x)[0]


def _gather_work(B, H, N, D, c, k, itemsize):
    return B * H * N * (2 * c * itemsize + k * 8 + D * 4), 2 * B * H * N * k * (c + D)


def _route_work(T, P, I, O, itemsize):
    return (T * (I + P + O) + P * O * I) * itemsize, 2 * T * P * O * I


def _drift_case(N, **options):
    return Case("flow_drift", dict(B=4, N=N, d=256, D=3), make_drift, our_drift, {"F.linear": peers.composed_drift},
                grads=("states", "positions", "weight", "bias"), small=dict(B=2, N=67, d=37, D=3),
                work=lambda B, N, d, D, itemsize: (B * N * (d * itemsize + 3 * D * 4 + 4), 2 * B * N * d * D),
                compiled=("F.linear",), **options)  # fmt: skip


def _norm_case(N, **options):
    return Case("flow_norm", dict(B=4, N=N, d=256), make_norm, our_norm, {"cumsum, rsqrt": peers.composed_norm},
                grads=("states", "energy"), small=dict(B=2, N=67, d=37),
                work=lambda B, N, d, itemsize: (B * N * (2 * d * itemsize + 4), B * N * d), compiled=("cumsum, rsqrt",),
                **options)  # fmt: skip


def _convolution_case(N, **options):
    return Case("short_convolution", dict(B=4, N=N, d=256, W=4), make_convolution, dk.short_convolution,
                {"F.conv1d": peers.depthwise_convolution, "shifted sums": peers.shifted_sums}, grads=("x", "weight"),
                small=dict(B=2, N=67, d=37, W=3), compiled=("shifted sums",),
                work=lambda B, N, d, W, itemsize: (B * N * 2 * d * itemsize, 2 * B * N * d * W), **options)  # fmt: skip


def _gather_case(B, H, N, D, c, k, **options):
    return Case(
        "gaussian_gather",
        dict(B=B, H=H, N=N, D=D, c=c, k=k),
        make_gather,
        our_gather,
        {
            "index + einsum": peers.indexed_gather,
            "embedding_bag, compiled weights": peers.bagged_gather,
            "sparse CSR": peers.sparse_gather,
        },
        grads=("positions", "values", "sigma"),
        small=dict(B=2, H=2, N=257, D=3, c=37, k=5),
        work=_gather_work,
        compiled=("index + einsum",),
        forward_only=("sparse CSR",),  # its gradient by the weights is a dense [N, N]
        **options,
    )


def _planned_gather_case(N, c, goals):
    return Case("gaussian_gather", dict(B=1, H=1, N=N, D=3, c=c, k=16), make_planned_gather, our_planned_gather,
                grads=("positions", "values", "sigma"), small=dict(B=2, H=2, N=257, D=3, c=37, k=5), work=_gather_work,
                variant="-plan", gpu_only=True, goals=goals)  # fmt: skip


def _attention_case(N, goals, **options):
    return Case("flow_attention", dict(B=1, H=4, N=N, D=3, d=256, k=16), make_attention, our_attention,
                {"causal SDPA, same d": peers.sdpa}, grads=("states", "positions", "flow_weight", "values", "sigma"),
                small=dict(B=2, H=2, N=131, D=3, d=26, k=5), other_work=("causal SDPA, same d",), goals=goals,
                **options)  # fmt: skip


def _knn_case(N, D, k, causal=False, **options):
    trees = {"scipy cKDTree": peers.scipy_knn, "pynanoflann": peers.nanoflann_knn}
    brute_force = {"cdist + topk": peers.composed_knn, "faiss, flat": peers.faiss_knn, "KeOps": peers.keops_knn}
    return Case(
        "knn",
        dict(B=1, N=N, D=D, k=k),
        make_points,
        causal_knn if causal else our_knn,
        {} if causal else {**trees, **(brute_force if N <= 2**15 else {})},
        gpu_peers={} if causal else {"CuPy KDTree": peers.cupy_knn},
        small=dict(B=2, N=301, D=D, k=min(k, 7)),
        exact=True,
        **options,
    )


def _embeddings_case(N, D, k):
    return Case(
        "knn",
        dict(B=1, N=N, D=D, k=k),
        make_points,
        our_knn,
        {
            "matmul + topk": peers.product_knn,
            "matmul + topk, measured": peers.measured_product_knn,
            "cdist + topk": peers.composed_knn,
            "faiss, flat": peers.faiss_knn,
        },
        small=dict(B=2, N=301, D=D, k=min(k, 7)),
        exact=True,
        other_work=("matmul + topk",),  # not exact
    )


def _route_case(T, P, I, O, **options):
    published = {"published einsums": peers.published_route} if T <= 1024 else {}  # gigabytes beyond
    return Case(
        "pattern_route",
        dict(T=T, P=P, I=I, O=O),
        make_route,
        our_route,
        {"prescaled GEMM": peers.prescaled_route, **published},
        grads=("x", "weights", "patterns"),
        small=dict(T=67, P=5, I=23, O=31),
        work=_route_work,
        compiled=("prescaled GEMM",),
        **options,
    )


CASES = [
    _drift_case(8192),
    _drift_case(65_536, gpu_only=True, goals={"forward float32": 0.075, "forward bfloat16": 0.055}),
    _norm_case(8192),
    _norm_case(65_536, gpu_only=True,  # forward: a copy of the states
               goals={"forward float32": 0.13, "forward bfloat16": 0.068, "training float32": 0.4}),
    _convolution_case(8192),
    _convolution_case(65_536, gpu_only=True),
    _knn_case(32_768, 3, 16, goals={"forward float32": 0.4}),
    _knn_case(32_768, 2, 16),
    _knn_case(1_000_000, 2, 16, goals={"forward float32": 0.8}),
    _knn_case(1_000_000, 3, 16, goals={"forward float32": 1.5}),
    _embeddings_case(5000, 768, 16),
    _gather_case(1, 1, 32_768, 3, 64, 16),
    _gather_case(1, 1, 32_768, 3, 256, 16),
    _gather_case(1, 1, 262_144, 3, 64, 16),
    _gather_case(1, 1, 262_144, 3, 256, 16),
    _gather_case(1, 1, 1_000_000, 3, 64, 16, gpu_only=True),
    _gather_case(1, 1, 1_000_000, 3, 256, 16, gpu_only=True),
    _planned_gather_case(1_000_000, 64, {"forward bfloat16": 0.2, "forward float32": 0.35}),
    _planned_gather_case(1_000_000, 256, {"forward bfloat16": 0.5, "forward float32": 1.2, "training bfloat16": 1.6}),
    _attention_case(8192, {}, gpu_only=True),
    _attention_case(32_768, {"forward bfloat16": 0.6, "training bfloat16": 1.5}),
    _attention_case(131_072, {"forward bfloat16": 2.0, "training bfloat16": 4.5}, gpu_only=True),
    _route_case(1024, 8, 512, 512),
    _route_case(8192, 8, 512, 512, goals={"forward bfloat16": 0.05, "training bfloat16": 0.25}),  # 95 % of cuBLAS
    _route_case(65_536, 16, 768, 768, gpu_only=True, goals={"forward bfloat16": 1.73, "training bfloat16": 5.6}),
    _route_case(1024, 8, 512, 10_000, gpu_only=True, goals={"training bfloat16": 0.5}),  # a vocabulary
    Case("low_rank_route", dict(T=8192, P=8, I=512, O=512, r=32), make_low_rank, our_low_rank,
         {"two einsums": peers.composed_low_rank}, grads=("x", "weights", "up", "down"),
         small=dict(T=67, P=5, I=23, O=31, r=3), compiled=("two einsums",)),
    Case("field_sample", dict(B=4, G=65_536, n=16_384), make_density, our_sample, {"multinomial": peers.multinomial},
         small=dict(B=2, G=301, n=67), other_work=("multinomial", "reference")),
    Case("flow_attention", dict(B=1, N=8192, d=256, H=4), make_block, our_block,
         {"causal Transformer layer": peers.causal_transformer}, grads=("states",), small=dict(B=2, N=131, d=24, H=2),
         other_work=("causal Transformer layer", "reference"), layer="DFNBlock"),
    Case("pattern_route", dict(T=8192, P=8, I=512, O=512), make_flow_layer, our_flow_layer,
         {"prescaled GEMM": peers.prescaled_flow_layer}, grads=("x",), small=dict(T=67, P=5, I=23, O=31),
         compiled=("prescaled GEMM",), layer="FlowLayer"),
]  # fmt: skip


def cases_for(device: str) -> list[Case]:
    return [case for case in CASES if device != "cpu" or not case.gpu_only]


def chosen(cases: list[Case], only: str) -> list[Case]:
    """Those with ``only`` in their key or in their words. Raises ValueError, which lists them, where there is none."""
    found = [case for case in cases if only in case.name or only in case.words]
    if not found:
        listed = "".join(f"\n  {case.name}  ({case.words})" for case in cases)
        raise ValueError(f"no case has {only!r} in its name; there are:{listed}")
    return found


# One case an op, for the demo's table: small enough that the reference, too, answers at once.
QUICK = {
    "flow_drift": dict(B=1), "flow_norm": dict(B=1), "short_convolution": dict(B=1), "knn": dict(N=8192),
    "gaussian_gather": dict(N=16_384), "flow_attention": dict(N=2048), "pattern_route": {},
    "low_rank_route": dict(T=1024), "field_sample": {},
}  # fmt: skip


def quick_cases() -> list[Case]:
    first = {op: next(case for case in CASES if case.op == op and not case.layer) for op in QUICK}
    return [replace(first[op], sizes={**first[op].sizes, **sizes}) for op, sizes in QUICK.items()]
