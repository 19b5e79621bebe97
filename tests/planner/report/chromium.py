"""Headless Chromium: what it makes of a page, and what it writes to the console."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

PROGRAM = shutil.which("chromium") or shutil.which("chromium-browser")
_OPTIONS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--enable-logging=stderr", "--virtual-time-budget=20000", "--window-size=1240,2400",
    "--host-resolver-rules=MAP * ~NOTFOUND",
)  # fmt: skip


@dataclass(frozen=True)
class Rendered:
    """A page after its scripts ran.

    Attributes:
        dom: Its HTML.
        console: Lines that it wrote to the console.
    """

    dom: str
    console: list[str]

    def count(self, pattern: str) -> int:
        """Occurrences of a regular expression in the HTML."""
        return len(re.findall(pattern, self.dom))

    def figure(self, name: str) -> str:
        """HTML of one figure, without the ones behind it."""
        start = self.dom.index(f'id="figure-{name}"')
        following = self.dom.find('id="figure-', start + 1)
        return self.dom[start : following if following > 0 else None]


def render(path: Path, profile: Path) -> Rendered:
    """Open a local file and return what became of it; nothing outside can be reached."""
    assert PROGRAM is not None
    command = [PROGRAM, *_OPTIONS, f"--user-data-dir={profile}", "--dump-dom", path.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=True)
    return Rendered(done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line])
