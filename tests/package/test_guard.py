"""The benchmark that guards: two trees in turns, a threshold, an exit status."""

import shutil
from pathlib import Path

import pytest
from helpers import INTERPRETED

from bench import guard

pytestmark = pytest.mark.skipif(INTERPRETED, reason="not about Triton kernels")
ROOT = Path(__file__).parents[2]


class Fake:
    """A tree whose runs take what it says, and the log of who ran when."""

    log: list[str] = []

    def __init__(self, tree, python, name, *case):
        self.who, self.modes, self.closed = ("here" if tree == guard.ROOT else "base"), ["forward"], False

    def ms(self, mode):
        self.log.append(self.who)
        return {"here": 12.0, "base": 10.0}[self.who]

    def close(self):
        self.closed = True


def test_turns_threshold_and_status(monkeypatch, tmp_path, capsys):
    (tmp_path / "dfn_kernels").mkdir()
    monkeypatch.setattr(guard, "Runner", Fake)
    Fake.log.clear()
    words = [str(tmp_path), "--only", "flow_norm", "--seconds", "0.1"]
    assert guard.main([*words, "--threshold", "1.1"]) == 1
    assert "1 of 1 slower than 1.1x" in capsys.readouterr().out
    assert Fake.log[:6] == ["here", "base", "base", "here", "here", "base"]
    assert guard.main([*words, "--threshold", "1.3"]) == 0
    monkeypatch.setattr(Fake, "__init__", lambda self, *case: setattr(self, "modes", []))
    monkeypatch.setattr(Fake, "close", lambda self: None)
    assert guard.main(words) == 2 and "no case runs in both trees" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        guard.main([str(tmp_path), "--only", "no such case"])


@pytest.mark.slow
def test_a_slower_tree_is_found(monkeypatch, tmp_path, capsys):
    """A copy of this tree that waits 20 milliseconds in flow_norm, held against this tree."""
    for name in ("bench", "dfn", "dfn_kernels"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("results", "__pycache__"))
    op = tmp_path / "dfn_kernels" / "flow_norm.py"
    text = op.read_text()
    begin = text.index("\ndef flow_norm(")
    body = text.index('"""\n', text.index('"""', begin) + 3) + 4
    op.write_text(text[:body] + "    import time\n    time.sleep(0.02)\n" + text[body:])
    monkeypatch.setattr(guard, "ROOT", tmp_path)
    assert guard.main([str(ROOT), "--only", "flow_norm", "--small", "--seconds", "0.5", "--threshold", "2"]) == 1
    assert "causal norm" in capsys.readouterr().out
