"""Every benchmark case at its small size: all contenders run and agree; the instruments themselves measure."""

import json
from functools import partial

import pytest
import torch
from helpers import INTERPRETED

from bench import host_cost, migrating, report
from bench.__main__ import main
from bench.cases import CASES, Case
from bench.measure import Row, compare, fill, goal_of, run_case
from bench.timing import peak_growth_mib, time_rounds

pytestmark = pytest.mark.skipif(INTERPRETED, reason="the interpreter is no contender")
# cases that differ in size only, once
SMALL = {(case.layer or case.op) + case.variant + str(case.small): case for case in CASES}.values()


@pytest.mark.parametrize("case", SMALL, ids=lambda case: (case.layer or case.op) + case.variant)
def test_case(case):
    rows = run_case(case, small=True, seconds=0, skip=("embedding_bag, compiled weights", "compiled"))
    assert {row.who for row in rows} >= set(case.peers) - {"embedding_bag, compiled weights"}
    for row in rows:
        if "ModuleNotFoundError" in row.note:
            continue  # a peer that is not installed
        assert row.ms is not None and row.ms > 0, f"{row.who}, {row.mode}: {row.note}"
        assert row.note in ("", "not the same work")


def test_wrong_result_gets_no_time():
    case = next(case for case in CASES if case.op == "pattern_route")
    wrong = Case(**{**vars(case), "peers": {"off by 1 %": lambda **inputs: 1.01 * case.ours(**inputs)}})
    rows = [row for row in run_case(wrong, small=True, seconds=0) if row.who == "off by 1 %"]
    assert [(row.ms, row.note) for row in rows] == [(None, "wrong result")]


def test_goals_stand_beside_what_was_measured():
    """On the machine that they are for, a GPU; elsewhere there is none."""
    case = next(case for case in CASES if case.variant == "-plan" and case.goals)
    assert set(case.goals) <= {
        f"{mode} {dtype}" for mode in ("forward", "training") for dtype in ("bfloat16", "float32")
    }
    row = Row(
        case.name, case.op, "native", "forward", "bfloat16", ms=3.0, goal=goal_of(case, "forward", "bfloat16", "cuda")
    )
    assert row.goal == case.goals["forward bfloat16"] and format(row.goal, ".2f") in report.plain([row])
    assert all(row.goal is None for row in run_case(case, small=True, seconds=0))


def test_rounds_take_turns_and_ratios_are_of_the_same_turn():
    order = []
    times = time_rounds({who: partial(order.append, who) for who in "ab"}, "cpu", 0)
    assert order == list("ab") * 3 and [len(taken) for taken in times.values()] == [3, 3]
    rows = {who: Row("case", "op", who, "forward", "float32") for who in ("native", "slow", "fast")}
    times = {"native": [1.0, 2.0, 4.0], "slow": [9.0, 9.0, 9.0], "fast": [3.0, 8.0, 4.0, 5.0]}
    for who, row in rows.items():
        fill(row, times[who])
    compare(rows, times)
    assert rows["native"].ms == 2 and rows["fast"].ms == 4.5 and rows["fast"].ratio is None
    assert (rows["native"].ratio_low, rows["native"].ratio, rows["native"].ratio_high) == (1, 3, 4)


def test_host_cost_has_a_row_for_every_op():
    rows = host_cost.table(rounds=1, calls=1)
    assert [row.split("  ")[0] for row in rows[1:]] == [host_cost.BASE, "a bare Function", *host_cost.GOALS]
    for row in rows[1:]:
        assert all(float(cell.split()[-1]) > 0 for cell in row.split("(")[:2]), row


def test_peak_memory():
    grown = peak_growth_mib(lambda: torch.ones(32 * 2**20 // 4), "cpu")
    if grown is None:
        pytest.skip("this system does not let a process reset its peak")
    assert 30 < grown < 40


def test_command(tmp_path, capsys):
    assert main(["--quick", "--only", "flow_norm", "--seconds", "0", "--out", str(tmp_path)]) == 0
    assert "causal norm" in capsys.readouterr().out
    (path,) = tmp_path.glob("*.json")
    written = json.loads(path.read_text())
    assert written["machine"]["torch"] == torch.__version__ and written["rows"][0]["ms"] > 0
    assert written["ceilings"]["copy GB/s"] > 0 and path.with_suffix(".png").stat().st_size > 10_000
    assert "| causal norm" in path.with_suffix(".md").read_text()
    assert main(["compare", str(path), str(path)]) == 0
    assert "1.00x" in capsys.readouterr().out
    page = tmp_path / "page.md"
    page.write_text("before <!-- bench:begin -->old<!-- bench:end --> after")
    report.update_page(path, page)
    assert "| causal norm" in page.read_text() and "old" not in page.read_text() and " after" in page.read_text()
    assert all(report.PAGE.read_text().count(mark) == 1 for mark in report.PAGE_MARKS)
    with pytest.raises(SystemExit):
        main(["--only", "no such case"])
    assert report.markdown([]).startswith("| case")


def test_scaling(tmp_path):
    from bench import scaling

    assert scaling.exponent([(n, 3 * n**1.5) for n in (4096, 8192, 2**15, 2**16, 2**17)]) == pytest.approx(1.5)
    assert scaling.exponent([(4096, 1.0)]) is None
    case = next(case for case in CASES if case.op == "flow_norm")
    rows = scaling.grow(case, 8192, 10, "cpu")
    assert {(row["who"], row["mode"]) for row in rows} >= {("native", "forward"), ("native", "training")}
    assert all([n for n, _ in row["points"]] == [4096, 8192] for row in rows)
    scaling.plot(rows, tmp_path / "scaling.png")
    assert (tmp_path / "scaling.png").stat().st_size > 10_000


def test_a_result_that_is_none_is_said_in_one_line(tmp_path, capsys):
    from bench.__main__ import main

    (tmp_path / "x.json").write_text("{}")
    for path, message in (
        (tmp_path / "missing.json", "cannot be read: No such file"),
        (tmp_path / "x.json", "is no result"),
    ):
        with pytest.raises(SystemExit) as error:
            main(["compare", str(path), str(path)])
        said = capsys.readouterr().err.strip().splitlines()
        assert error.value.code == 2 and message in said[-1] and "Traceback" not in "".join(said)


def test_migrating():
    """Every case at its small size, ours and the others'; the table has a line for each pair."""
    rows = migrating.measure("cpu", 0.01, small=True)
    assert len(rows) == len(migrating.cases("cpu", small=True)) and all(row["ours ms"] > 0 for row in rows)
    facts = {"cpu": "some", "threads": "2", "torch": "2", "date": "today", "commit": "none"}
    text = migrating.table(facts, rows)
    assert text.count("| knn_points, norm=1") == 1 and text.count("plain PyTorch: ") == 6
    page = migrating.PAGE.read_text()
    assert all(page.count(mark) == 1 for mark in migrating.MARKS)
