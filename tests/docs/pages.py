"""Run the code of a page in its order, as a reader would who types it in.

A fence says what a block is:

* ``python`` runs; with a ``title`` it is written to that file. A ``text`` block right behind it is
  what it prints.
* ``console`` holds commands (``$ ipu-pipeline ...``) and what they print.
* ``json``, ``toml`` and ``yaml`` with a ``title`` are files.
* ``sh`` is not run, but ``pip install -e .`` announces the entry points of the page's
  ``pyproject.toml``.

``...`` in an output stands for anything.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from doctest import ELLIPSIS, NORMALIZE_WHITESPACE, OutputChecker
from importlib import invalidate_caches
from pathlib import Path
from typing import Any

import pytest
from setuptools.config.pyprojecttoml import read_configuration
from typer.testing import CliRunner

from ipu_pipeline.cli import app

FENCE = re.compile(r'^```(\w+)(?: title="([^"]+)")?[^\n]*\n(.*?)^```$', re.M | re.S)
RUNNER = CliRunner(env={"COLUMNS": "100", "TERMINAL_WIDTH": "100"})


@dataclass(frozen=True)
class CodeBlock:
    """One fenced block: where its text is in the page, and whether it follows another at once."""

    kind: str
    title: str
    text: str
    start: int
    line: int
    adjacent: bool


def blocks_of(page: str) -> Iterator[CodeBlock]:
    """Yield the fenced blocks of a page's text."""
    end = 0
    for found in FENCE.finditer(page):
        between = page[end : found.start()]
        yield CodeBlock(
            kind=found[1],
            title=found[2] or "",
            text=found[3],
            start=found.start(3),
            line=page.count("\n", 0, found.start()) + 2,
            adjacent=end > 0 and not between.strip(),
        )
        end = found.end()


@dataclass
class PageRun:
    """A page that is being run in the working directory, and what its outputs should be.

    Attributes:
        page: The page's file.
        patch: Puts back what the page changes for the process.
        changed: ``(start, end, text)`` of every output that differs.
    """

    page: Path
    patch: pytest.MonkeyPatch
    names: dict[str, Any] = field(default_factory=lambda: {"__name__": "__main__"})
    changed: list[tuple[int, int, str]] = field(default_factory=list)

    def run(self) -> str:
        """Run all blocks; return the page as it should read."""
        text = self.page.read_text(encoding="utf-8")
        printed: str | None = None
        for block in blocks_of(text):
            if block.kind == "text" and block.adjacent and printed is not None:
                self._compare(block.start, block.text, printed)
                printed = None
            elif block.title:
                Path(block.title).parent.mkdir(parents=True, exist_ok=True)
                Path(block.title).write_text(block.text, encoding="utf-8")
            elif block.kind == "python":
                printed = self._python(block)
            elif block.kind == "console":
                self._console(block)
            elif block.kind == "sh" and "pip install -e ." in block.text:
                self._install()
        for start, end, new in reversed(self.changed):
            text = text[:start] + new + text[end:]
        return text

    def _compare(self, start: int, want: str, got: str) -> None:
        if not OutputChecker().check_output(want, got, ELLIPSIS | NORMALIZE_WHITESPACE):
            self.changed.append((start, start + len(want), got))

    def _python(self, block: CodeBlock) -> str:
        code = compile("\n" * (block.line - 1) + block.text, str(self.page), "exec")
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(code, self.names)
        return out.getvalue()

    def _console(self, block: CodeBlock) -> None:
        parts = re.split(r"^\$ ((?:.*\\\n)*.*)\n", block.text, flags=re.M)
        position = block.start + len(parts[0])
        for line, want in zip(parts[1::2], parts[2::2], strict=True):
            position += len(line) + 3
            program, *arguments = shlex.split(line.replace("\\\n", " "))
            assert program == "ipu-pipeline", f"{self.page.name}: cannot run {line!r}"
            done = RUNNER.invoke(app, arguments, prog_name=program)
            wrong = done.exit_code not in (0, 1) or (done.exit_code == 1) != ("error:" in want)
            assert not wrong, f"{self.page.name}: {line!r} ended with {done.output}"
            self._compare(position, want, done.output)
            position += len(want)

    def _install(self) -> None:
        project = read_configuration("pyproject.toml")["project"]  # refuses what pip would
        name, version = project["name"], project["version"]
        info = Path(f"{name.replace('-', '_')}-{version}.dist-info")
        info.mkdir()
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n", encoding="utf-8"
        )
        groups = [
            f"[{group}]\n" + "".join(f"{name} = {value}\n" for name, value in points.items())
            for group, points in project["entry-points"].items()
        ]
        (info / "entry_points.txt").write_text("\n".join(groups), encoding="utf-8")
        self.patch.syspath_prepend(os.getcwd())  # noqa: PTH109 - sys.path holds text
        invalidate_caches()
