"""What the benchmark shows: names that a person can read, pages made of the JSON beside them, ten lines for a demo."""

import json
import re
import runpy
import shutil
from pathlib import Path

import pytest
from helpers import INTERPRETED

from bench import presets, report
from bench.__main__ import main
from bench.cases import CASES, chosen, quick_cases
from bench.measure import Row
from bench.names import readable
from dfn import demo

pytestmark = pytest.mark.skipif(INTERPRETED, reason="not about Triton kernels")
ROOT = Path(__file__).parents[2]
RESULTS = [p for p in (ROOT / "bench" / "results").glob("*.json") if "ceilings" in json.loads(p.read_text())]
CRYPTIC = re.compile(r"\b[A-Za-z]\d+\b|[a-z]_[a-z]|\b[BNMDdkcTPIOH] ?=")


def test_every_case_has_words_of_its_own():
    words = {case.name: case.words for case in [*CASES, *quick_cases()]}
    assert len(set(words.values())) == len(words)
    for key, said in words.items():
        assert said != key and not CRYPTIC.search(said) and CRYPTIC.search(key), said
    assert readable("gaussian_gather-plan-B1-H1-N262144-D3-c256-k16").startswith("gather, 262k points, ")
    assert readable("knn-B1-N1000000-D2-k16") == "search, 1M points in the plane, 16 nearest"
    assert readable("knn-B1-N5000-D768-k16") == "search, 5,000 points of 768 dimensions, 16 nearest"
    assert readable("flow_norm-B4-N8192-d256") == "causal norm, 4 x 8,192 entities, 256 channels"
    for other in ("case", "knn-B1", "something-B1-N7"):
        assert readable(other) == other  # what is not known is not guessed


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_pages_are_those_of_their_json(path, tmp_path, capsys):
    """To the letter, names included, and without a cryptic one."""
    copy = shutil.copy(path, tmp_path)
    assert main(["page", str(copy)]) == 0
    page = (tmp_path / path.name).with_suffix(".md").read_text()
    assert page == path.with_suffix(".md").read_text()
    cells = [line.split(" | ")[0] for line in page.splitlines() if line.startswith("| ")][2:]
    assert len(cells) > 20 and not any(CRYPTIC.search(cell) for cell in cells)
    assert "ModuleNotFoundError" not in page
    rows = json.loads(path.read_text())["rows"]
    assert {row["case"] for row in rows} <= {case.name for case in CASES}  # the keys that guard and others go by


def test_the_table_in_the_docs_is_that_of_a_result():
    page = report.PAGE.read_text()
    assert any(report.page_table(path) in page for path in RESULTS)


def test_the_presets_in_the_docs_are_those_of_the_last_result():
    path = max((ROOT / "bench" / "results").glob("*-presets-*.json"))
    result = json.loads(path.read_text())
    said = presets.table(result["rows"], result["machine"])
    assert said in presets.PAGE.read_text() and said in path.with_suffix(".md").read_text()
    for row in result["rows"]:  # a quartile of one time is none
        work = row["forward"]
        work[presets.SIZE] = [1.5] * 3
    assert "1.50x (one round) of" in presets.table(result["rows"], result["machine"])


def test_a_case_is_found_by_its_key_and_by_its_words():
    for only in ("gaussian_gather-B1", "gather, 33k"):
        assert {case.op for case in chosen(CASES, only)} == {"gaussian_gather"}
    with pytest.raises(ValueError, match=r"no case has 'nothing' in its name; there are:") as error:
        chosen(CASES[:2], "nothing")
    assert all(case.name in str(error.value) and case.words in str(error.value) for case in CASES[:2])


def rows_of_everybody(cases, **options):
    for case in cases:
        for who in ("native", "reference", "a peer", "another"):
            for mode in ("forward", "training") if case.grads else ("forward",):
                ratio = dict(ratio=2.0, ratio_low=1.5, ratio_high=2.5) if who == "native" else {}
                if case.op not in ("low_rank_route", "field_sample") or who != "native":
                    yield Row(case.name, case.op, who, mode, "float32", ms=3.0, mib=1.0, **ratio)
        yield Row(case.name, case.op, "KeOps", "forward", "float32", note="ModuleNotFoundError: No module named 'x'")


def test_ten_lines_for_the_demo(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "measure_all", lambda *a, **k: list(rows_of_everybody(*a, **k)))
    said = report.quick_table(tmp_path)
    lines = [line for line in said.splitlines() if line.startswith("| ")][2:]
    assert len(lines) == 10 == len(set(lines)) and not any(CRYPTIC.search(line.split(" | ")[0]) for line in lines)
    assert all("2.0x (1.5-2.5)" in line and "(a peer)" in line for line in lines)
    assert "KeOps" not in said and "](kernels.md)" in said
    whole = (tmp_path / "kernels.md").read_text()
    assert "| another |" in whole and "ModuleNotFoundError" not in whole
    assert "Not installed, so not measured: KeOps." in whole and "| KeOps |" not in whole


def test_the_demo_of_the_benchmark_names_itself(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["x", "--help"])
    for module, run in (
        ("bench.demo", lambda: runpy.run_module("bench.demo", run_name="__main__", alter_sys=False)),
        ("dfn.demo", demo.main),
    ):
        with pytest.raises(SystemExit):
            run()
        assert capsys.readouterr().out.startswith(f"usage: python -m {module} ")
