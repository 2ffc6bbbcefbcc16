"""Checkpoints: written whole, checked when read; a damaged one is named and the last good one used."""

import json

import pytest
import torch
from helpers import same_bits

from dfn.training import checkpoints
from dfn.training.checkpoints import CheckpointError

pytestmark = pytest.mark.skipif(
    pytest.importorskip("safetensors") is None, reason="needs safetensors, of the extra models"
)


def some_tensors():
    shared = torch.randn(7, 3)
    return {
        "model.a": shared,
        "model.b": shared.T,  # not contiguous, and the same memory
        "model.half": torch.randn(5).bfloat16(),
        "random.torch": torch.get_rng_state(),
        "state.step": torch.tensor(3),
        "state.none": torch.zeros(0, 4, dtype=torch.float64),
        "state.mask": torch.rand(5) < 0.5,
    }


def test_what_is_saved_comes_back_to_the_bit(tmp_path):
    tensors, facts = some_tensors(), {"step": 3, "text": "a ± b"}
    path = checkpoints.save(tmp_path, 3, tensors, facts)
    found = checkpoints.load(path)
    assert found.facts == facts and set(found.tensors) == set(tensors)
    assert all(same_bits(found.tensors[name], x.contiguous()) for name, x in tensors.items())
    assert set(found.part("state")) == {"step", "none", "mask"}
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000003.safetensors"]


def test_the_last_two_are_kept(tmp_path):
    for step in (1, 2, 10, 9):  # 9 after 10: a run that went back
        checkpoints.save(tmp_path, step, {"x": torch.randn(3)}, {"step": step})
    assert [checkpoints.load(p).facts["step"] for p in checkpoints.found(tmp_path)] == [9, 10]


def test_any_damage_is_found(tmp_path):
    """Cut off anywhere, or one bit of any byte turned over: never a silently different checkpoint."""
    path = checkpoints.save(tmp_path, 1, {"x": torch.randn(9), "y": torch.arange(3)}, {"a": 1})
    raw = path.read_bytes()
    for length in range(0, len(raw), 7):
        path.write_bytes(raw[:length])
        with pytest.raises(CheckpointError, match=str(path)):
            checkpoints.load(path)
    for place in range(len(raw)):
        path.write_bytes(raw[:place] + bytes([raw[place] ^ 1 << int(torch.randint(8, ()))]) + raw[place + 1 :])
        with pytest.raises(CheckpointError, match=str(path)):
            checkpoints.load(path)
    path.write_bytes(raw)
    assert checkpoints.load(path).facts == {"a": 1}


def test_the_last_good_one_is_used_and_the_others_are_named(tmp_path):
    said = []
    assert checkpoints.latest(tmp_path, said.append) is None
    paths = [checkpoints.save(tmp_path, step, {"x": torch.randn(300)}, {"step": step}, keep=3) for step in (1, 2, 3)]
    assert checkpoints.latest(tmp_path, said.append).path == paths[2] and not said
    paths[2].write_bytes(paths[2].read_bytes()[:-1])
    assert checkpoints.latest(tmp_path, said.append).path == paths[1]
    assert "step-00000003.safetensors is damaged" in said[0] and str(paths[1]) in said[1]
    checkpoints.set_aside(tmp_path, paths[1])
    assert checkpoints.found(tmp_path) == paths[:2] and (tmp_path / "step-00000003.safetensors.damaged").exists()
    for path in paths[:2]:
        path.write_bytes(b"")
    with pytest.raises(CheckpointError, match="none of the 2 checkpoints in .* is good"):
        checkpoints.latest(tmp_path, said.append)


def test_a_foreign_file_is_refused(tmp_path):
    from safetensors.torch import save_file

    path = tmp_path / "step-00000001.safetensors"
    save_file({"x": torch.zeros(2)}, path)
    with pytest.raises(CheckpointError, match="no checkpoint of dfn"):
        checkpoints.load(path)
    save_file({"x": torch.zeros(2)}, path, {"facts": json.dumps({}), "sha256": "0" * 64})
    with pytest.raises(CheckpointError, match="checksum"):
        checkpoints.load(path)


def test_two_kinds_of_files_are_written_at_once(tmp_path, monkeypatch):
    """As when a run is judged while it trains: each ends up in its place."""
    from dfn.training import checkpoints

    fsync, others = checkpoints.os.fsync, [tmp_path / "figures.json"]

    def meanwhile(number):
        if others:
            checkpoints.write_whole(others.pop(), b"figures")
        fsync(number)

    monkeypatch.setattr(checkpoints.os, "fsync", meanwhile)
    checkpoints.write_whole(tmp_path / "step.safetensors", b"weights")
    assert (tmp_path / "step.safetensors").read_bytes() == b"weights"
    assert (tmp_path / "figures.json").read_bytes() == b"figures" and len(list(tmp_path.iterdir())) == 2


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    checkpoints.write_whole(path, b"old")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        checkpoints.write_whole(path, b"new")
    assert path.read_bytes() == b"old"
