"""What tests of runs share."""

import pytest


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """The path of a small text."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_bytes(b"the quick brown fox jumps over the lazy dog. " * 60)
    return str(path)
