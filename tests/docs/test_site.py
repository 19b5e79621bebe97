"""The site says what the code has: nothing public, no error class and no variable is missing."""

from __future__ import annotations

import pydoc
import re
from pathlib import Path

import pytest

import ipu_pipeline
from ipu_pipeline import train
from tools.docs import tables

LINK = re.compile(r"\]\(([^)#\s]+)(#[^)\s]*)?\)")


@pytest.fixture(scope="session")
def docs(root: Path) -> Path:
    return root / "docs"


def test_every_error_class_is_explained(docs: Path) -> None:
    text = (docs / "troubleshooting.md").read_text(encoding="utf-8")
    sections = re.findall(r"^## (\w+Error)$", text, flags=re.M)
    assert sections == [kind.__name__ for kind in tables.error_classes()]


def test_every_public_name_is_in_the_reference(docs: Path) -> None:
    text = (docs / "reference" / "python.md").read_text(encoding="utf-8")
    paths = [line.removeprefix("::: ") for line in text.splitlines() if line.startswith("::: ")]
    listed = {path.rpartition(".")[2] for path in paths}
    assert [path for path in paths if pydoc.locate(path) is None] == []
    assert {*ipu_pipeline.__all__, *train.__all__} <= listed


def test_every_variable_is_in_the_tables(root: Path, docs: Path) -> None:
    text = (docs / "reference" / "tables.md").read_text(encoding="utf-8")
    read: set[str] = set()
    for path in (root / "ipu_pipeline").rglob("*.py"):
        read |= set(re.findall(r'"(IPU_PIPELINE_[A-Z_]+)"', path.read_text(encoding="utf-8")))
    assert read
    assert sorted(name for name in read if f"`{name}`" not in text) == []


def test_links_of_the_readme_lead_somewhere(root: Path) -> None:
    for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md"):
        text = (root / name).read_text(encoding="utf-8")
        found = [target for target, _ in LINK.findall(text) if "://" not in target]
        assert [target for target in found if not (root / target).exists()] == [], name


def test_the_readme_is_one_screen(root: Path) -> None:
    assert len((root / "README.md").read_text(encoding="utf-8").splitlines()) <= 72


def test_every_page_is_in_the_navigation(root: Path, docs: Path) -> None:
    text = (root / "mkdocs.yml").read_text(encoding="utf-8")
    pages = [path.relative_to(docs).as_posix() for path in docs.rglob("*.md")]
    missing = [page for page in pages if f": {page}" not in text]
    assert [page for page in missing if not page.startswith("decisions/")] == []


def test_every_table_that_a_page_includes_is_made(docs: Path) -> None:
    made = dict(tables.made())
    for path in docs.rglob("*.md"):
        for name in re.findall(r'^--8<-- "([\w-]+\.md)"', path.read_text(encoding="utf-8"), re.M):
            assert name in made or name in ("split.md", "schedules-compared.md"), (path, name)
    assert all(text.strip() for text in made.values())


def test_a_command_is_described_by_its_own_parser() -> None:
    text = dict(tables.made())["commands.md"]
    assert [f"## {name}\n" in text for name in tables.commands()] == [True] * len(tables.commands())
    assert "| `--num-stages <int range>` | Default: the config's, or the best." in text
