"""The pages: what they say to run runs, prints what they say it prints, and their links lead somewhere."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import run_page
from helpers import INTERPRETED

import dfn_kernels as dk

pytest.importorskip("safetensors")
ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMANDS = {"README.md", "use-a-run.md"}  # pages whose `dfn` commands run; elsewhere they take hours, and are parsed
pytestmark = pytest.mark.skipif(INTERPRETED, reason="not about Triton kernels")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_says_is_so(page, tmp_path):
    for name in ("README.md", "docs", "dfn"):  # what its commands find in a clone
        (tmp_path / name).symlink_to(ROOT / name)
    done = subprocess.run(
        [sys.executable, run_page.__file__, page, *["commands"] * (page.name in COMMANDS)],
        cwd=tmp_path, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_WAIT_POLICY": "passive"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    for target, anchor in re.findall(r"\]\((?!\w+:)([^)#\s]*)(?:#([^)\s]*))?[^)]*\)", text):
        aim = page.parent / target if target else page
        assert aim.exists(), f"{page.name} links to {target}"
        if anchor:
            assert anchor in anchors(aim), f"{page.name} links to {target}#{anchor}"


def anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_page_can_be_reached():
    """From the README, by links."""
    seen, open_pages = set(), [ROOT / "README.md"]
    while open_pages:
        page = open_pages.pop()
        if page in seen or page.suffix != ".md":
            continue
        seen.add(page)
        open_pages += [(page.parent / t).resolve() for t in re.findall(r"\]\((?!\w+:)([^)#\s]+)", page.read_text())]
    assert set(PAGES) <= seen, f"not linked: {[p.name for p in set(PAGES) - seen]}"


def test_public_names_are_documented():
    """In a docstring, and those that are called on the page of the ops."""
    page = (ROOT / "docs" / "ops.md").read_text()
    for name in dk.__all__:
        assert (getattr(dk, name).__doc__ or "").strip(), f"{name} has no docstring"
        assert name.endswith("Function") or name in page, f"{name} is not on docs/ops.md"


WRONG = {
    "other output": "```python\nprint(1 + 1)  # 3\n```\n",
    "a number too far off": "```python\nprint(2.0)  # about 2.4\n```\n",
    "an error": "```python\n1 / 0\n```\n",
    "other lines": "```python\nprint(1)\n```\n\n```text\n2\n```\n",
    "no such option": "```sh\ndfn train text --no-such-flag\n```\n",
}


@pytest.mark.parametrize("what", WRONG)
def test_a_page_that_is_wrong_is_found(what, tmp_path):
    (tmp_path / "page.md").write_text(WRONG[what])
    with pytest.raises((AssertionError, ZeroDivisionError, SystemExit)):
        run_page.main(tmp_path / "page.md", False)
    right = "```python\nprint(1 + 1)  # 2\nprint(1.9)  # about 2 \n```\n\n```text\n2\n...\n```\n"
    (tmp_path / "page.md").write_text(right)
    run_page.main(tmp_path / "page.md", False)
