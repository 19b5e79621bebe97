"""Every block of code on the site runs, in its order, and prints what the page says."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.docs.pages import PageRun, blocks_of
from tests.quick_calibration import make_quick

# Lightning's own: about itself under this torch, and loaders without workers.
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*LeafSpec:FutureWarning", "ignore:.*does not have many workers"
)
DOCS = Path(__file__).resolve().parents[2] / "docs"
RUN = ("python", "console")
# Python 3.12 adds floats up more exactly, and so takes the other one of two equal layouts.
TIED = ("tune-gpus.md",)
PAGES = [
    path
    for path in sorted(DOCS.rglob("*.md"))
    if path.parent.name != "decisions"
    and any(block.kind in RUN for block in blocks_of(path.read_text(encoding="utf-8")))
]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty working directory; modules that the page writes there are forgotten afterwards."""
    make_quick(monkeypatch)
    monkeypatch.setenv("IPU_PIPELINE_CACHE", str(tmp_path / "cache"))
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    before = set(sys.modules)
    yield work
    for name in set(sys.modules) - before:
        file = getattr(sys.modules[name], "__file__", None)
        if file and Path(file).is_relative_to(work):
            del sys.modules[name]


def check(page: Path, patch: pytest.MonkeyPatch, *, update: bool) -> None:
    text, found = page.read_text(encoding="utf-8"), PageRun(page, patch).run()
    if update and found != text:
        page.write_text(found, encoding="utf-8")
        return
    if sys.version_info >= (3, 12) and page.name in TIED:
        return
    assert found == text, f"{page.name} prints something else; run pytest --update-golden"


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(DOCS).as_posix())
def test_the_code_of_a_page_runs(
    page: Path, folder: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    check(page, monkeypatch, update=request.config.getoption("--update-golden"))


@pytest.mark.acceptance
def test_the_ten_lines_of_the_readme_run(
    root: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert PageRun(root / "README.md", monkeypatch).run()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("```python\nprint(1)\n```\n\n```text\n2\n```\n", "prints something else"),
        ("```console\n$ ipu-pipeline --version\nipu-pipeline 0.0\n```\n", "prints something else"),
        ("```console\n$ ipu-pipeline explain none\n```\n", "ended with error: "),
        ("```console\n$ make test\n```\n", "cannot run 'make test'"),
    ],
)
def test_a_planted_fault_on_a_page_is_found(
    text: str, message: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = folder / "planted.md"
    page.write_text(text)
    with pytest.raises(AssertionError, match=message):
        check(page, monkeypatch, update=False)
