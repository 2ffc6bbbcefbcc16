"""Pictures of benchmarks, from the results that are there, and of the pages are legible (tests/legible.py)."""

import json
import runpy
import shutil
from pathlib import Path

import pytest
from helpers import INTERPRETED

pytest.importorskip("matplotlib")
pytestmark = pytest.mark.skipif(INTERPRETED, reason="not about Triton kernels")
ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "bench" / "results"


def test_speedups_and_roofline(tmp_path, legible):
    from bench import plots

    result = RESULTS / "2026-11-26-amd-epyc-2threads.json"
    shutil.copy(result, tmp_path)
    assert plots.draw(tmp_path / result.name).stat().st_size < 200_000
    loaded = json.loads(result.read_text())
    for name, keep in (("none", lambda row: False), ("slower", lambda row: row["case"].startswith("flow_norm"))):
        rows = [{**row, "ratio": row["ratio"] and 0.2 * row["ratio"]} for row in loaded["rows"] if keep(row)]
        (tmp_path / f"{name}.json").write_text(json.dumps({**loaded, "rows": rows}))
        plots.draw(tmp_path / f"{name}.json")


@pytest.mark.parametrize(
    "name, part", [("scaling", "*-scaling-*"), ("generation", "*-generation-*"), ("words", "flownetwork-words")]
)
def test_other_results(tmp_path, legible, name, part):
    import importlib

    (path,) = RESULTS.glob(f"{part}.json")
    found = json.loads(path.read_text())
    module = importlib.import_module(f"bench.{name}")
    module.plot(found if name == "words" else found["rows"], tmp_path / "drawn.png")
    assert (tmp_path / "drawn.png").stat().st_size < 100_000


def test_ops(tmp_path, legible, capsys):
    draw = runpy.run_path(str(ROOT / "docs" / "draw.py"))
    names = ["knn", "gaussian_gather", "flow_drift", "flow_norm", "short_convolution", "flow_attention",
             "pattern_route", "low_rank_route", "field_sample"]  # fmt: skip
    draw["main"](names, tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {f"{name}.png" for name in names}
    assert set(draw["NAMES"]) == {*names, "entities", "drift"}
    assert all((ROOT / "docs" / file).exists() for file in draw["PICTURES"])
    with pytest.raises(SystemExit):
        draw["main"](["nonesuch"], tmp_path)
    assert "got nonesuch" in capsys.readouterr().err
