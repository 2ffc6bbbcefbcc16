"""The tables of what a GPU suite measured, from its own files."""

import json

import pytest

from bench import gpu_table

FACTS = dict(gpu="NVIDIA X100", date="2026-01-02", torch="2.0", triton="3.0", driver="1", commit="abc")
ROW = dict(case="knn-B1-N1000000-D3-k16", op="knn", mode="forward", dtype="float32", goal=1.5)
BENCHMARK = [
    ROW | dict(who="triton", ms=2.0), ROW | dict(who="reference", ms=9.0), ROW | dict(who="CuPy KDTree", ms=60.0),
    ROW | dict(who="broken", ms=None), ROW | dict(who="slow", ms=70.0, goal=None),
]  # fmt: skip
SEARCHES = [dict(set="outliers", N=8192, D=3, k=16, causal=True, eager_ms=0.51, graph_ms=0.25, ms=0.24, launches=43,
                 wrong=0, kernels=[])]  # fmt: skip
PARTS = [
    dict(name="environment", status="ok", reason="", facts=FACTS),
    dict(name="build", status="ok", reason="", facts=None),
    dict(name="searches", status="ok", reason="", facts=SEARCHES),
    dict(name="graphs", status="failed", reason="1 of 28 wrong", facts=["x"]),
]  # fmt: skip


NORM = "flow_norm-B4-N65536-d256"
PROFILE = [
    dict(case=case, mode="training", dtype="float32", backend="triton", ms=2.5, launches=43, graph_ms=2.6, host_us=9.0)
    for case in (NORM, ROW["case"])
]  # fmt: skip


def written(tmp_path, commit="abc"):
    first, second = tmp_path / "a" / "results.json", tmp_path / "b" / "results.json"
    for path in (first, second):
        path.parent.mkdir(exist_ok=True)
    first.write_text(json.dumps({"parts": PARTS}))
    (second.parent / "rows.json").write_text(json.dumps({"rows": BENCHMARK}))
    environment = PARTS[0] | {"facts": FACTS | {"commit": commit}}
    benchmark = dict(name="benchmark", status="ok", reason="", facts={"file": "rows.json"})
    profile = dict(name="profile", status="ok", reason="", facts=PROFILE)
    second.write_text(json.dumps({"parts": [environment, benchmark, profile]}))
    return [str(first), str(second)]


def test_tables(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{gpu_table.MARKS[0]}\nold\n{gpu_table.MARKS[1]}\nafter\n")
    said = []
    assert gpu_table.main([*written(tmp_path, "def"), "--out", str(tmp_path), "--page", str(page)], said.append) == 0
    first, second = (json.loads((tmp_path / f"2026-01-02-nvidia-x100-{c}.json").read_text()) for c in ("abc", "def"))
    assert first["machine"] == FACTS and first["searches"] == SEARCHES and "benchmark" not in first
    assert second["benchmark"] == BENCHMARK and first["checks"] == ["graphs: failed, 1 of 28 wrong"]
    text = page.read_text()
    assert "| search, 1M points in space, 16 nearest | forward | float32 | 2 | 1.5 | 60 (CuPy KDTree) | 30x |" in text
    assert "| outliers | 8,192 | 3 | 16 | causal | 0.51 | 0.25 | 0.24 | 43 | 0 |" in text
    norm = "| causal norm, 4 x 66k entities, 256 channels | with gradients | float32 | triton | 2.5 | 43 | 2.6 | 0.4 |"
    assert norm in text and "with gradients | float32 | triton | 2.5 | 43 | 2.6 |  |" not in text
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert "commit abc" in text and "commit def" in text
    assert "graphs: failed" in (tmp_path / "2026-01-02-nvidia-x100-abc.md").read_text()


def test_a_result_names_its_machine(tmp_path):
    path = tmp_path / "results.json"
    path.write_text(json.dumps({"parts": PARTS[1:]}))
    with pytest.raises(ValueError, match="no part of .* says which machine"):
        gpu_table.main([str(path), "--out", str(tmp_path)])
