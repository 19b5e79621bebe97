"""A distribution in a temporary folder: modules, and the entry points that announce them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import invalidate_caches
from pathlib import Path

import pytest

NAME = "outside_of_us"


@contextmanager
def installed(
    folder: Path, files: Mapping[str, str], points: Mapping[str, str]
) -> Iterator[pytest.MonkeyPatch]:
    """Write ``files`` into ``folder`` as a distribution and put it on ``sys.path``.

    Args:
        folder: An empty folder.
        files: Text by path.
        points: ``name = value`` by entry point group.
    """
    for path, text in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)
    info = folder / f"{NAME}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {NAME}\nVersion: 1.0\n")
    text = "\n".join(f"[{group}]\n{point}\n" for group, point in points.items())
    (info / "entry_points.txt").write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        invalidate_caches()
        yield patch
