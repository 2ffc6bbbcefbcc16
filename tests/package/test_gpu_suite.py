"""The GPU suite without a GPU: how it runs parts and reports them, and the parts themselves on a CPU."""

import json
import subprocess
import sys
import sysconfig
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import INTERPRETED, python

import dfn_kernels
from bench import gpu_build, gpu_parts, gpu_profile, gpu_suite, gpu_training
from bench.cases import CASES
from bench.gpu_suite import NO_GPU, Outcome, Part, Report, run_all, run_part

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(INTERPRETED, reason="not about Triton kernels")


def part(name: str, code: str, limit: float = 20.0, **options) -> Part:
    return Part(name, (sys.executable, "-c", code), limit, **options)


# ---- one part -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "code, status, reason",
    [
        ("print('a'); print('all right'); print()", "ok", "all right"),
        ("raise ValueError('no luck')", "failed", "ValueError: no luck"),
        ("print('no tool here'); raise SystemExit(77)", "skipped", "no tool here"),
        ("raise SystemExit(4)", "failed", "exit status 4"),
        ("import os; print('a', flush=True); os.abort()", "failed", "ended by signal 6 (SIGABRT); last line: a"),
        ("import sys; sys.stdout.buffer.write(b'\\xff\\xfe bytes\\n')", "ok", "\ufffd\ufffd bytes"),
    ],
)
def test_outcomes(code, status, reason):
    outcome = run_part(part("x", code), 20)
    assert (outcome.status, outcome.reason) == (status, reason)
    assert 0 < outcome.seconds < 20


def test_time_limit_ends_all_that_a_part_started(tmp_path):
    witness = tmp_path / "alive"
    grandchild = f"import time, pathlib; time.sleep(3); pathlib.Path({str(witness)!r}).touch()"
    code = f"import subprocess, sys, time\nsubprocess.Popen([sys.executable, '-c', {grandchild!r}])\n" \
           "print('started', flush=True)\ntime.sleep(60)"  # fmt: skip
    start = time.monotonic()
    outcome = run_part(part("x", code), 1.5)
    assert time.monotonic() - start < 15
    assert (outcome.status, outcome.reason) == ("failed", "stopped after 2 s; last line: started")
    time.sleep(3)
    assert not witness.exists()


def test_parts_that_cannot_start():
    absent = Part("x", ("/no/such/program",), 5)
    assert run_part(absent, 5).status == "failed" and "cannot be started" in run_part(absent, 5).reason
    assert run_part(replace(absent, missing="no tool"), 5) == Outcome("x", "skipped", reason="no tool")
    assert run_part(absent, 0.5) == Outcome("x", "skipped", reason="no time was left")


def test_facts_and_environment():
    code = """
import os, json, pathlib
pathlib.Path(os.environ["DFN_SUITE_FACTS"]).write_text(json.dumps(os.environ["DFN_TEST_DEVICE"]))
import bench.gpu_suite
"""
    outcome = run_part(part("x", code, 120), 120)  # it imports PyTorch
    assert outcome.status == "ok" and outcome.facts == "cuda"


# ---- all parts ------------------------------------------------------------------------------------------------------
def test_a_failure_stops_nothing(tmp_path, capsys):
    report = Report(tmp_path)
    run_all(
        [
            part("measured", "print('3 ms')", alone=True),
            part("hangs", "import time; time.sleep(60)", limit=1),
            part("breaks", "raise RuntimeError('broken')"),
            part("absent", "", missing="no tool"),
            part("fine", "print('40 passed')"),
        ],
        report,
        seconds=100,
        jobs=2,
    )
    lines = report.summary().splitlines()
    assert [line.split()[:2] for line in lines[:-1]] == [
        ["ok", "fine"], ["ok", "measured"], ["skipped", "absent"], ["failed", "breaks"], ["failed", "hangs"],
    ]  # fmt: skip
    assert "40 passed" in lines[0] and "RuntimeError: broken" in lines[3]
    assert lines[-1].startswith("2 ok, 1 skipped, 2 failed in ")
    assert report.outcomes[-1].name == "measured"  # measurements come last
    written = json.loads((tmp_path / "results.json").read_text())["parts"]
    assert {p["name"]: p["status"] for p in written}["hangs"] == "failed"
    assert (tmp_path / "summary.txt").read_text().splitlines()[:-1] == lines[:-1]
    assert "RuntimeError: broken" in (tmp_path / "log.txt").read_text()
    assert "fine" in capsys.readouterr().out


def test_checks_leave_time_for_measurements(tmp_path):
    report = Report(tmp_path)
    slow = [part(f"slow {i}", "import time; time.sleep(60)", limit=50) for i in range(3)]
    run_all([*slow, part("measured", "print('3 ms')", alone=True, limit=8)], report, seconds=12, jobs=1)
    status = {o.name: o.status for o in report.outcomes}
    assert status["measured"] == "ok" and status["slow 0"] == "failed" and status["slow 2"] == "skipped"


def test_exit_status(tmp_path, monkeypatch, capsys):
    fake = [part("fine", "print('fine')"), part("breaks", "raise SystemExit(1)")]
    monkeypatch.setattr(gpu_suite, "all_parts", lambda out: fake)
    monkeypatch.setattr(gpu_suite, "own", lambda *name: (sys.executable, "-c", "print('a GPU')"))
    monkeypatch.setattr(gpu_suite, "BUILD", part("build", "print('built')"))
    assert gpu_suite.main([str(tmp_path)]) == 1
    assert "3 ok, 0 skipped, 1 failed" in capsys.readouterr().out
    assert gpu_suite.main([str(tmp_path), "--only", "fine"]) == 0
    written = json.loads((tmp_path / "results.json").read_text())["parts"]
    assert [part["name"] for part in written] == ["environment", "build", "fine"]


@pytest.mark.parametrize("arguments", [[], ["x", "--jobs", "0"], ["x", "--minutes", "-1"], ["x", "--only", "none"]])
def test_bad_arguments(arguments, capsys):
    with pytest.raises(SystemExit, match="2"):
        gpu_suite.main(arguments)
    assert "gpu_suite.sh: error: " in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_without_a_gpu(tmp_path):
    done = subprocess.run(
        ["bash", str(ROOT / "bench" / "gpu_suite.sh"), "out"], capture_output=True, text=True, cwd=tmp_path,
        env={"PATH": "/usr/bin:/bin", "PYTHON": sys.executable},
    )  # fmt: skip
    assert done.returncode == NO_GPU, done.stderr
    assert "gpu_suite: skipped, nothing was run: no GPU: PyTorch" in done.stdout
    assert "no GPU" in (tmp_path / "out" / "summary.txt").read_text()


def test_every_part_is_known(tmp_path):
    parts = gpu_suite.all_parts(tmp_path)
    assert len({p.name for p in parts}) == len(parts)
    for p in parts:
        if "bench.gpu_parts" in p.command:
            assert p.command[p.command.index("bench.gpu_parts") + 1] in gpu_parts.PARTS
    assert {p.group for p in parts} == {"checks", "benchmark", "profile", "train", "sanitize", "counters"}
    assert (
        max(p.limit for p in parts if p.group == "checks") <= 4 * 60  # the time given by default
    )  # what a group is given by default, or documented
    assert max(p.limit for p in parts) <= 5 * 60
    assert not any(p.alone for p in parts if p.group == "checks")


# ---- what the parts do, on a CPU ------------------------------------------------------------------------------------
def test_walk_and_determinism():
    count = len(list(gpu_parts.variants("cpu", gpu_parts.ops())))
    assert gpu_parts.walk("cpu") == f"{count} right"
    assert {v[1].op for v in gpu_parts.variants("cpu", gpu_parts.ops())} == {case.op for case in CASES}
    try:
        assert gpu_parts.determinism("cpu", small=True) == f"{count} right"
    finally:
        torch.use_deterministic_algorithms(True, warn_only=True)


def test_compiled():
    cases = [next(case for case in CASES if case.op == "flow_norm")]
    assert gpu_parts.compiled("cpu", cases) == f"{len(gpu_parts.backends_of('flow_norm', 'cpu'))} right"


def test_what_is_wrong_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DFN_SUITE_FACTS", str(tmp_path / "facts"))

    def check(x):
        if x == 2:
            raise RuntimeError("bad luck\nand more")
        return "too large" if x == 3 else None

    with pytest.raises(AssertionError, match="2 of 3 wrong: b: RuntimeError: bad luck; c: too large"):
        gpu_parts.each([("a", 1), ("b", 2), ("c", 3)], check)
    assert json.loads((tmp_path / "facts").read_text()) == ["b: RuntimeError: bad luck", "c: too large"]
    monkeypatch.setitem(gpu_parts.PARTS, "walk", lambda: gpu_parts.each([("a", 3)], check))
    assert gpu_parts.main(["walk"]) == 1
    monkeypatch.setitem(gpu_parts.PARTS, "walk", lambda: gpu_parts.each([("a", 1)], check))
    assert gpu_parts.main(["walk"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "1 right"


def test_noise_is_found():
    """The comparison of bits sees what it is there to see."""
    step = gpu_parts.Step(CASES[0], "reference", torch.float32, "cpu", CASES[0].small)
    first = step()
    assert len(first) == 1 + len(CASES[0].grads) and gpu_parts.same_bits(step(), first)
    step.refresh()
    assert not gpu_parts.same_bits(step(), first)
    assert not gpu_parts.same_bits([torch.tensor(0.0)], [torch.tensor(-0.0)])


def test_replays_are_compared_without_touching_the_inputs():
    """Overwriting what was captured must not reach the incoming gradient, of which a gradient may be a view."""

    def record(run, spoil=lambda held: None):
        held = run()

        def replay():
            for x, fresh in zip(held, run(), strict=True):
                x.copy_(fresh)
            spoil(held)

        return held, replay

    case = next(case for case in CASES if case.op == "flow_drift")
    step = gpu_parts.Step(case, "reference", torch.float32, "cpu", {**case.small, "N": 31})
    grad = step.grad.clone()
    assert gpu_parts.replay_differs(step, record) is None
    assert step.grad.equal(grad)
    wrong = gpu_parts.replay_differs(step, lambda run: record(run, lambda held: held[3].add_(1)))
    assert wrong == "a replay gives other bits than an eager run: gradient of weight"


def test_models():
    assert gpu_parts.models_agree("cpu") == "6 right"


def test_train():
    assert "DFNLanguageModel 48: " in gpu_training.train("cpu", lengths=(48,), small=True)


def test_whole_steps():
    assert "transformer++ tiny: " in gpu_training.whole_steps("cpu", {"tiny": (32, 1, 2, 2, 37)})


def test_benchmark(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_parts, "CASES", [case for case in CASES if case.op == "flow_norm"])
    assert "rows" in gpu_parts.benchmark(str(tmp_path), "cpu", small=True)
    (path,) = tmp_path.glob("*.json")
    assert {row["dtype"] for row in json.loads(path.read_text())["rows"]} == {"float32", "bfloat16"}


def test_profile(tmp_path, monkeypatch):
    monkeypatch.setenv("DFN_SUITE_FACTS", str(tmp_path / "facts"))
    cases = [case for case in CASES if case.op in ("flow_norm", "knn")][:2]
    assert gpu_profile.profiled_cases("cpu", small=True, cases=cases).endswith(" profiled")
    rows = json.loads((tmp_path / "facts").read_text())
    assert {row["mode"] for row in rows} >= {"forward"} and all(row["ms"] > 0 and row["launches"] > 0 for row in rows)
    assert all(row["host_us"] > 0 and row["kernels"][0][1] >= row["kernels"][-1][1] for row in rows)


def test_profile_of_searches(tmp_path, monkeypatch):
    monkeypatch.setenv("DFN_SUITE_FACTS", str(tmp_path / "facts.json"))
    assert gpu_profile.profiled_searches("cpu", sizes=(47,), largest=483) == "16 searches"
    rows = json.loads((tmp_path / "facts.json").read_text())
    assert {(row["N"], row["D"], row["causal"]) for row in rows} == {(n, D, c) for n in (47, 483) for D in (2, 3)
                                                                    for c in (False, True)}  # fmt: skip
    assert {row["set"] for row in rows} == {"uniform", *gpu_profile.HOSTILE} and {row["wrong"] for row in rows} == {0}
    assert all(row["launches"] > 0 and row["ms"] > 0 and row["kernels"] for row in rows)


@pytest.mark.parametrize("spoil", [lambda f: f.indices[:, -1].add_(1), lambda f: f.sq_dists[:, 0].add_(1e-45)])
def test_profile_of_searches_sees_wrong_rows(spoil):
    x = torch.rand(101, 3)
    found = dfn_kernels.knn(x, 5, causal=True)
    assert gpu_profile.wrong_rows(x, found, 5, True) == 0
    spoil(found)
    assert gpu_profile.wrong_rows(x, found, 5, True) == 64


@pytest.mark.slow
def test_what_is_missing_is_built(tmp_path, monkeypatch):
    """The host module, by g++ alone, for this Python; and it loads."""
    monkeypatch.setattr(gpu_build, "host_module", lambda: tmp_path / f"_host{sysconfig.get_config_var('EXT_SUFFIX')}")
    assert gpu_build.build_host() == "_host is built"
    code = "import _host; index = _host.StreamingKNN(1, 2); print(index is not None)"
    assert python(code, tmp_path) == "True\n"
    assert gpu_build.build_host() == "_host is there"
    assert gpu_build.build_libraries([]) == "the libraries load"
    monkeypatch.setattr(gpu_build.shutil, "which", lambda name: None)
    assert "Triton and the reference take over" in gpu_build.build_libraries(["_C_cuda"])


def test_sanitizer_verdict():
    clean = "========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: 0 errors\n"
    assert gpu_parts.sanitizer_verdict(clean, 0) == "nothing found"
    race = "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n"
    assert gpu_parts.sanitizer_verdict(race, 0) == "nothing found"
    with pytest.raises(gpu_parts.Skip, match="Device not supported"):
        gpu_parts.sanitizer_verdict("========= Error: Device not supported", 1)
    found = "========= Invalid __global__ read of size 4 bytes\n=========     at gather_forward+0x1b0 in x.py:81\n" \
            "========= ERROR SUMMARY: 3 errors\n"  # fmt: skip
    with pytest.raises(AssertionError, match="3 findings, exit status 9, in: gather_forward"):
        gpu_parts.sanitizer_verdict(found, 9)
    with pytest.raises(AssertionError, match="exit status 1"):  # the program failed under the tool
        gpu_parts.sanitizer_verdict(clean, 1)


def test_counters():
    table = """a line of the program
"ID","Process ID","Kernel Name","dram__bytes.sum","gpu__time_duration.sum"
"","","","byte","ns"
"0","17","gather_forward","1,048,576","12,345"
==PROF== Disconnected
"""
    (kernel,) = gpu_parts.parse_counters(table)
    assert kernel["kernel"] == "gather_forward"
    assert (kernel["bytes"], kernel["time"], kernel["registers"]) == (2**20, 12345, 0)
    assert gpu_parts.parse_counters("==ERROR== Failed to initialize the profiler") == []


def test_counters_without_a_profiler(tmp_path):
    program = tmp_path / "ncu"
    program.write_text("#!/bin/sh\necho '==ERROR== no permission'\nexit 1\n")
    program.chmod(0o755)
    with pytest.raises(gpu_parts.Skip, match="cannot be read here: ==ERROR== no permission"):
        gpu_parts.counters(str(program))
