import os
import warnings

import pytest
import torch


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Fresh memory is filled with NaN (integers: the largest), so an output that is not written shows.

    PyTorch does that in its deterministic mode; the mode's own complaints about other ops are not our subject.
    """
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*deterministic.*")
        yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def fresh_random_inputs(request):
    """Another seed in every test, the same one in every run; a failure names the test and so the seed.

    DFN_TEST_SEED=1, 2, .. draws others: what then fails has passed by luck.
    """
    torch.manual_seed(hash_of(request.node.nodeid) + int(os.environ.get("DFN_TEST_SEED", 0)))


@pytest.fixture
def one_thread():
    """For models so small that threads would spend their time waiting for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def legible(monkeypatch):
    """Looks at every picture as it is written (tests/legible.py); there must be one, and nothing wrong with any."""
    figure = pytest.importorskip("matplotlib.figure")
    from legible import faults

    seen, save = [], figure.Figure.savefig

    def savefig(self, *args, **options):
        save(self, *args, **options)
        seen.append(faults(self))

    monkeypatch.setattr(figure.Figure, "savefig", savefig)
    yield
    assert seen and not any(seen), "\n".join(sum(seen, []))


def hash_of(text: str) -> int:
    import zlib

    return zlib.crc32(text.encode())
