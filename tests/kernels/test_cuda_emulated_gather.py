"""The CUDA kernels of the gather without a GPU: the whole op over them, run in tests/cuda_emulator (see its emulator.h).

It shows that every lane loads, adds and stores what it should, within its memory, in any order of the warps. It does not
show that a GPU does the same, nor how fast.
"""

import shutil
import subprocess

import cuda_emulated_gather
import pytest
import test_gaussian_gather as plain
import test_gaussian_gather_inputs as plain_inputs
import torch
from cuda_emulated import CSRC, Emulator, compile_library, run_alone
from cuda_emulated_gather import SOURCES, compare, compare_lists, emulated, gather, make
from helpers import DEVICE, INTERPRETED, backends, check_against_reference, leaves, pairs, same_bits

import dfn_kernels

HEADERS = [CSRC / "cuda" / f"gaussian_gather_{name}.h" for name in ("rows", "weights")]
pytestmark = [
    pytest.mark.skipif(
        INTERPRETED or DEVICE != "cpu" or shutil.which("g++") is None, reason="wants g++ and tensors on the CPU"
    ),
    pytest.mark.skipif(torch.version.cuda is not None, reason="torch.ops.dfn_cuda is the real one"),
    pytest.mark.skipif("native" not in backends("gaussian_gather"), reason="goes through the native backend's ops"),
]


@pytest.fixture(scope="module")
def emulator(tmp_path_factory):
    library = compile_library(tmp_path_factory.mktemp("emulated"), "gaussian_gather", SOURCES, operators=True)
    torch.ops.load_library(str(library))
    emulator = Emulator(library)
    emulator.folder = library.parent
    return emulator


# ---- outputs and all gradients against float64 ----------------------------------------------------------------------
OPTIONS = {
    "dtype": (torch.float64, torch.float32, torch.bfloat16, torch.float16),
    "c": (40, 37, 1, 8, 300, 17, 128),  # with units of 16 bytes and without; fewer and more than a warp takes at once
    "k": (5, 1, 2, 16, 35, 71),  # fewer and more than are served at a time
    "D": (3, 1, 2, 4, 13),
    "influence": (True, False),
    "queries": (True, False),
    "normalize": (False, True),
    "shared": (False, True),
    "missing": (True, False),
    "plan": (False, True),
    "crowd": (0, 1),
    "hub": (1024, 8, 3),
    "layout": ((0, 16), (4, 16), (8, 2), (0, 2), (3, 4)),  # elements between rows, alignment in bytes
    "order": (0, 1, 5),
}
PAIRS = pairs(OPTIONS)


@pytest.mark.parametrize("row", PAIRS, ids=str)
def test_every_pair_of_options(emulator, row):
    options = dict(row)
    options["gap"], options["align"] = options.pop("layout")
    compare(emulator, B=2, H=3 if row["shared"] else 2, N=13, M=19, **options)


def test_many_queries(emulator):
    """More than a block takes."""
    compare(emulator, B=1, H=1, N=301, M=277, c=32, k=3, dtype=torch.bfloat16, order=1)
    compare(emulator, B=1, H=1, N=301, M=277, c=8, k=2, D=1)
    compare(emulator, B=2, H=1, N=61, M=533, c=128, k=17, plan=True, multiprocessors=1)  # a warp has several turns


@pytest.mark.parametrize("crowd", [1, 3])
def test_hubs(emulator, crowd):
    """Lists that begin and end within pieces, and others that are as long as one, between short ones."""
    for hub, M, dtype in (
        (8, 53, torch.float64),
        (53, 53, torch.float64),
        (52, 53, torch.float32),
        (20, 61, torch.bfloat16),
    ):
        compare(emulator, B=2, H=2, N=11, M=M, c=24, k=crowd + 1, crowd=crowd, hub=hub, dtype=dtype, plan=hub == 8)
    compare(emulator, B=1, H=1, N=11, M=53, c=5, k=4, D=5, crowd=crowd, hub=16)


def test_all_in_one_place(emulator):
    inputs = make(B=1, H=1, N=50, c=9, k=4, queries=False)
    inputs["positions"].zero_()
    inputs["indices"] = torch.arange(4).expand(1, 1, 50, 4)
    with emulated(emulator, hub=16):
        check_against_reference(gather, inputs, "native")


def test_extremes(emulator):
    """What the op's own tests ask of every backend."""
    with emulated(emulator):
        for normalize in (False, True):
            plain_inputs.test_padding_is_nobody("native", normalize)
            plain.test_gradcheck("native", normalize)
        plain_inputs.test_extreme_weights("native")
        plain_inputs.test_half_precision_overflow_is_infinite("native")
        plain.test_only_the_gradients_asked_for("native")
        plain_inputs.test_leading_dims("native")
        plain_inputs.test_non_contiguous("native")
        for empty in (dict(B=0), dict(M=0), dict(k=0), dict(c=0), dict(N=0), dict(N=0, M=0)):
            plain_inputs.test_empty("native", empty)


def test_known_distances(emulator):
    """A search's distances are those that the kernels would find, to the bit; positions move all the same."""
    points = torch.randn(2, 1, 61, 3)
    near = dfn_kernels.knn(points, 5)
    results = []
    for known in (None, near.sq_dists):
        inputs = leaves(
            dict(points=points, values=torch.linspace(-3, 3, 2 * 61 * 24).view(2, 1, 61, 24), sigma=torch.ones(1))
        )
        with emulated(emulator):
            out = torch.ops.dfn.gaussian_gather(inputs["points"], inputs["points"], inputs["values"], near.indices,
                                                inputs["sigma"], None, True, "native", known)  # fmt: skip
            out.square().sum().backward()
        results.append([out.detach(), *(x.grad for x in inputs.values())])
    assert all(same_bits(a, b) for a, b in zip(*results, strict=True))


def test_wild_indices_are_padding(emulator):
    inputs = make()
    wild = torch.tensor([2**40, -(2**62), 17, 2**31, -2])
    inputs["indices"][1, 2, 3] = wild
    inputs["indices"][0, 1, 4, :2] = wild[:2]
    tame = {**inputs, "indices": inputs["indices"].where(inputs["indices"] < 17, -1)}
    results = []
    for given in (inputs, tame):
        mine = leaves(given)
        with emulated(emulator):
            out = gather(**mine)
            out.square().sum().backward()
        results.append(
            [out.detach(), *(x.grad for x in mine.values() if isinstance(x, torch.Tensor) and x.requires_grad)]
        )
    assert all(same_bits(a, b) for a, b in zip(*results, strict=True))


def test_same_bits_in_any_order(emulator):
    for sizes in (dict(c=40, k=5, crowd=2), dict(c=7, k=37, shared=True), dict(c=72, k=3, D=5)):
        inputs, results = make(N=31, M=67, normalize=True, **sizes), []
        for order in (0, 1, 5):
            mine = leaves(inputs)
            with emulated(emulator, order=order, hub=16):
                out = gather(**mine)
                out.square().sum().backward()
            results.append(
                [out.detach(), *(x.grad for x in mine.values() if isinstance(x, torch.Tensor) and x.requires_grad)]
            )
        for other in results[1:]:
            assert all(same_bits(a, b) for a, b in zip(results[0], other, strict=True))


# ---- lists and orders -----------------------------------------------------------------------------------------------
LISTS = [
    dict(), dict(B=1, H=1, N=1, M=1, k=1), dict(N=5003, M=300), dict(B=1, N=4096, M=11), dict(H=1, N=2, M=1100, k=1),
    dict(M=1201, crowd=1, order=1), dict(M=1201, k=2, crowd=2, order=5), dict(B=1, H=1, N=3, M=9000, k=1, crowd=1),
]  # fmt: skip


@pytest.mark.parametrize("sizes", LISTS, ids=str)
def test_lists(emulator, sizes):
    """From lists of nobody to those that a block sorts by digits, of one tile and of several."""
    compare_lists(emulator, **sizes)


@pytest.mark.parametrize("D", [1, 2, 3, 5])
def test_spatial_order(emulator, D):
    import test_gather_plan

    with emulated(emulator):
        test_gather_plan.test_spatial_order("native", D)
        one_place = torch.full((1, 2, 1500, D), 0.3)  # one cell would be one long list
        assert torch.equal(torch.ops.dfn.spatial_order(one_place, "native")[0, 1], torch.arange(1500).int())
        some = torch.randn(3, 2, 71, D, dtype=torch.float64)
        orders = torch.ops.dfn.spatial_order(some, "native")
        alone = torch.ops.dfn.spatial_order(some[1:2, 1:].contiguous(), "native")
        assert torch.equal(orders[1, 1], alone[0, 0]) and not torch.equal(orders[0, 0], orders[0, 1])


def test_plan_is_used(emulator, monkeypatch):
    """Large rows: an order for the forward pass, the same for the backward pass; a plan leaves nothing to be found."""
    monkeypatch.setitem(dfn_kernels.gather_plan.__globals__["CACHE"], "cpu", 0)
    inputs = make(N=61, queries=False, c=40)
    with emulated(emulator):
        check_against_reference(gather, inputs, "native")


def started(emulator: Emulator, run) -> tuple[int, list[str]]:
    """Kernels, and what PyTorch does on tensors beside them: allocations and views are no work."""
    before = emulator.lib.emulator_launches()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run()
    events = [e for e in profile.events() if e.name.startswith("aten::")]
    inner = ("aten::sum", "aten::full", "aten::zero_", "aten::copy_", "aten::new_zeros")  # one thing by several names
    outer = [e.name.removeprefix("aten::") for e in events if not (e.cpu_parent and e.cpu_parent.name in inner)]
    allocations = {"empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided"}
    views = {"as_strided", "transpose", "view", "expand", "unsqueeze", "select", "slice", "detach", "alias", "t"}
    maybe = {"to", "contiguous", "reshape"}  # what they copy, they copy by other names
    return emulator.lib.emulator_launches() - before, [x for x in outer if x not in allocations | views | maybe]


@pytest.mark.parametrize(
    "N, sigma, influence", [(61, 0.7, False), (61, torch.tensor([0.7, 0.8, 0.9]), True), (311, 0.7, False)]
)
def test_launches(emulator, N, sigma, influence):
    """The budget of test_launches.py: 2 forward, 5 backward, with a plan's lists. A plan: 16."""
    inputs = {**make(N=N, queries=False, c=40, influence=influence), "sigma": sigma}
    torch.utils.deterministic.fill_uninitialized_memory = False  # else memory is filled
    emulator.reset()
    with emulated(emulator, guard=False):
        plan = dfn_kernels.gather_plan(inputs["indices"], inputs["positions"])
        mine = leaves({**inputs, "indices": plan})
        wanted = [x for x in mine.values() if isinstance(x, torch.Tensor) and x.requires_grad]
        made = []
        kernels, calls = started(emulator, lambda: made.append(dfn_kernels.gaussian_gather(**mine)))
        assert kernels == 1 and kernels + len(calls) <= 2, calls
        grad = torch.randn_like(made[0])
        kernels, calls = started(emulator, lambda: torch.autograd.grad(made, wanted, grad))
        hubs = N * 5 > 1024  # where there may be some
        assert kernels == 2 + hubs and kernels + len(calls) <= 5, calls
        assert ("sum" in calls) == isinstance(sigma, torch.Tensor)
        kernels, calls = started(emulator, lambda: dfn_kernels.gather_plan(inputs["indices"], inputs["positions"]))
        assert kernels + len(calls) <= 16, calls
    emulator.check()


def test_operators_check_what_they_are_given(emulator):
    inputs = make()
    p, q, v, i, s = (inputs[n] for n in ("positions", "query_positions", "values", "indices", "sigma"))
    run = torch.ops.dfn_cuda.gaussian_gather
    for args in (
        (p.double(), q, v, i, s, None, None, None), (p, q[:, :, :5], v, i, s, None, None, None),
        (p, q, v.transpose(2, 3), i, s, None, None, None), (p, q, v, i.int(), s, None, None, None),
        (p, q, v, i, s[:2], None, None, None), (p, q, v, i, s, p[..., 0], None, None),
        (p, q, v, i, s, None, i.double(), None), (p, q, v, i, s, None, None, i[..., 0]),
        (p, q, v, i[:, :2].contiguous(), s, None, None, None), (p, q, v.transpose(0, 3), i, s, None, None, None),
    ):  # fmt: skip
        with pytest.raises(RuntimeError):
            run(*args, False)
    backward = torch.ops.dfn_cuda.gaussian_gather_backward
    grad, nothing = torch.randn(2, 3, 11, 37), (None,) * 5
    starts, edges = torch.ops.dfn_cuda.gather_lists(i, 17, None)
    for lists in ((None, None, None), (None, starts, None), (None, starts[:-1], edges), (i[..., 0], starts, edges),
                  (None, starts.long(), edges)):  # fmt: skip
        with pytest.raises(RuntimeError):
            backward(grad, p, q, v, i, s, *nothing[:3], *lists, False, 31, 8)
    with pytest.raises(RuntimeError):
        backward(grad.double(), p, q, v, i, s, *nothing[:3], None, starts, edges, False, 31, 8)


# ruff: noqa: E501
# ---- deliberate errors ----------------------------------------------------------------------------------------------
SWAPS = {
    "a lane's neighbours": ("mine[i * width] : -1", "mine[i / 2 * width] : -1"),
    "padding counts": ("static_cast<uint64_t>(index) < static_cast<uint64_t>(g.N)", "index < g.N"),
    "one index too far": ("static_cast<uint64_t>(index) < static_cast<uint64_t>(g.N)", "static_cast<uint64_t>(index) <= static_cast<uint64_t>(g.N)"),
    "least of half the lanes": ("nearest = least_of(nearest, width);", "nearest = least_of(nearest, width / 2);"),
    "total of half the lanes": ("if (alone) total = sum_over(sum, width);", "if (alone) total = sum_over(sum, width / 2);"),
    "sums of other queries": ("if (step < width) x += other;", "x += other;"),
    "total of one chunk": ("      sum += weigh(sq_dists);\n    }", "      sum = weigh(sq_dists);\n    }"),
    "no influence": ("with_influence ? weight[i] * influence[i] : weight[i]", "weight[i]"),
    "an axis of distances": ("sum = plus_square(sum, away[i][a]);", "sum = plus_square(sum, away[i][0]);"),
    "further axes of distances": ("sum = plus_square(sum, coordinates()[a] - position(i)[a]);", "sum = plus_square(sum, coordinates()[a] - position(i)[0]);"),
    "next turn's queries": ("next = number_of(number + kWarps);", "next = number_of(number + 1);"),
    "a turn left out": ("(block * t.turns + turn) * kWarps + warp)) return;\n    bool all", "(block * t.turns + turn + 1) * kWarps + warp)) return;\n    bool all"),
    "rows of missing neighbours": ("if (!Checked || (pair.of[i].row >= 0 && live))", "if (true)"),
    "weights of the next": ("acc[i] += batch.weights[u] * f[i];", "acc[i] += batch.weights[(u + 1) % kBatch] * f[i];"),
    "a batch left out": ("there -= kBatch, count -= kBatch, edges", "there -= kBatch, edges"),
    "the rest left out": ("for (; count > 0; count -= kBatch, edges += kBatch) add_rows", "for (; count >= kBatch; count -= kBatch, edges += kBatch) add_rows"),
    "no barrier": ("const bool complete = __ballot_sync(kAll, all) == kAll;\n    __syncwarp();", "const bool complete = all;"),
    "a chunk twice": ("all = query.stage(chunk, true);", "all = query.stage(0, true);"),
    "factor of another query": ("const A scale = __shfl_sync(kAll, factor, served << t.width_bits);", "const A scale = factor;"),
    "channels not live": ("c0 + own * E < c ? c0 + own * E : c - E; };", "c0 + own * E; };"),
    "later channels": ("rows = ptx::as_one(values + channel_of(c0) * int{sizeof(V)});", "rows = first_rows;"),
    "sums halved wrongly": ("const A low = (upper ? sums[2] : sums[0]) +", "const A low = sums[0] +"),
    "parts of sums": ("for (int p = 1; p < parts; ++p) sum", "for (int p = 1; p + 1 < parts; ++p) sum"),
    "dots at another place": ("dot_all_rows<V, E>(along + served * along_stride + l,", "dot_all_rows<V, E>(along + served * along_stride,"),
    "dots of one channel chunk": ("along_stride + l, c0 > 0, grad", "along_stride + l, false, grad"),
    "no mean": ("mean = g.normalize ? sum_over(mean, t.width) * factor : A(0);", "mean = 0;"),
    "mean without factor": ("sum_over(mean, t.width) * factor", "sum_over(mean, t.width)"),
    "slopes with influence": ("slope_of(n) = {weight, slope};", "slope_of(n) = {weight, slope * query.influence[i]};"),
    "many dimensions, one chunk": ("out[a] = chunk > 0 ? out[a] + sum : sum;", "out[a] = sum;"),
    "sigma's sign": ("sum * by_sigma", "-sum * by_sigma"),
    "an axis of another quarter": ("const int which = query.lane >> (t.width_bits - 2);", "const int which = query.lane >> t.width_bits;"),
    "query of an edge": ("t.by_k.of(static_cast<uint32_t>(numbers[i]))", "t.by_k.of(static_cast<uint32_t>(numbers[i] + 1))"),
    "the divisor's rounding": ("/ k + 1);", "/ k);"),
    "edges of the next share": ("const int s = start + i * t.lanes + l;", "const int s = start + l;"),
    "most of one group": ("if (step >= lanes && other > x) x = other;", ""),
    "end of a piece": ("base + (end < to ? end : to)", "base + to"),
    "head of a hub": ("base + (end < to ? end : to), begin >= from}", "base + (end < to ? end : to), begin > from}"),
    "a piece left out": ("for (int64_t next = first / 2 + 1; next * g.hub < end; ++next)", "for (int64_t next = first / 2 + 1; (next + 1) * g.hub < end; ++next)"),
    "hubs without influence": ("narrow(sum * influence, ", "narrow(sum, "),
    "moves by every chunk of channels": ("if (!moves || c0 > 0) continue;", "if (!moves) continue;"),
    "things of another row": ("(things / per) + row] * per", "(things / per) + row / 2] * per"),
    "places of another list": ("list * g.places + target : -1", "target : -1"),
    "scan of a warp": ("if (lane >= step) sum += other;", "sum += other;"),
    "scan without a barrier": ("  __syncthreads();\n  if (lane == 31) warps[warp] = sum;\n  __syncthreads();", "  if (lane == 31) warps[warp] = sum;"),
    "tiles before": ("tile < blockIdx.x; tile += kThreads", "tile + 1 < blockIdx.x; tile += kThreads"),
    "not sorted": ("smaller += things[t] < mine;", "smaller += t < i;"),
    "longest": ("starts[all + 1] = longest;", "starts[all + 1] = total;"),
    "digits out of order": ("same &= set ? votes : ~votes;", "same &= votes;"),
    "a pass too few": ("passes += 2;", "break;"),
}  # fmt: skip


def outcome(folder, objects, change=lambda text: text) -> subprocess.CompletedProcess:
    """The cases of cuda_emulated_gather on sources with a change; what stays as it is has been compiled."""
    (folder / "cuda").mkdir()  # a quoted include is looked for beside the including file first
    (folder / "cuda" / "cuda").symlink_to(folder / "cuda")  # by headers, too
    changed = []
    for header in HEADERS:
        text = header.read_text()
        (folder / "cuda" / header.name).write_text(change(text))
        if change(text) != text or any(name in text for name in changed):
            changed.append(header.name)
    anew, ready = [], []
    for source in SOURCES:
        text = source.read_text()
        if change(text) != text or any(name in text for name in changed):
            (folder / source.name).write_text(change(text))
            anew.append(folder / source.name)
        else:
            ready.append(str(objects / f"{source.name}.o"))
    library = compile_library(folder, "gaussian_gather", anew, operators=True, objects=tuple(ready))
    return run_alone(cuda_emulated_gather.__file__, library)


@pytest.mark.slow
def test_unchanged_kernels_pass_what_the_errors_must_not(emulator, tmp_path):
    done = outcome(tmp_path, emulator.folder)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("error", SWAPS)
def test_deliberate_errors_show(emulator, error, tmp_path):
    old, new = SWAPS[error]
    found = sum(path.read_text().count(old) for path in (*HEADERS, *SOURCES))
    assert found == 1, f"{error}: what is to be replaced is there {found} times"
    done = outcome(tmp_path, emulator.folder, lambda text: text.replace(old, new))
    assert done.returncode != 0, "nothing noticed"
    assert done.returncode < 0 or "AssertionError" in done.stderr, done.stderr
    print(done.stderr.strip().splitlines()[-1])
