"""Write what the pages of the site take from the code: ``python -m tools.docs build/docs``."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from tools.docs import pictures, tables


def main(folder: str) -> None:
    """Write every picture and table into a folder, which is made anew."""
    path = Path(folder)
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    for make in (tables.made, pictures.made):
        for name, text in make():
            (path / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
