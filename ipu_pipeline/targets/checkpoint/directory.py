"""Directories that appear whole or not at all, whatever kills the process that writes them."""

from __future__ import annotations

import os
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_INCOMPLETE = ".incomplete."
_PREVIOUS = ".previous"
# A writer on another machine cannot be asked whether it lives; after this long it does not.
_FOREIGN_STALE_S = 24 * 3600.0


@contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Yield an empty temporary sibling that becomes ``path`` when the block ends well.

    Everything is flushed to the disk before the rename. If the block raises, the sibling is
    removed and ``path`` is as before; if the process is killed, the sibling stays under a hidden
    name and the next save into the same folder removes it. A directory that ``path`` names
    already is replaced.

    Args:
        path: Where the directory is to appear; parents are made.

    Raises:
        OSError: The disk is full, or not writable.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_stale(path.parent)
    restore_previous(path)
    temporary = path.parent / f".{path.name}{_INCOMPLETE}{socket.gethostname()}.{os.getpid()}"
    temporary.mkdir()
    try:
        yield temporary
        for item in temporary.rglob("*"):
            _flush(item)
        _flush(temporary)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _move_into_place(temporary, path)


def remove_directory(path: Path) -> None:
    """Delete a directory so that no half-deleted one is ever found under its name."""
    doomed = path.parent / f".{path.name}{_INCOMPLETE}{socket.gethostname()}.{os.getpid()}"
    path.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def restore_previous(path: Path) -> None:
    """Finish or undo a replacement of ``path`` that was cut off between its two renames."""
    previous = _previous(path)
    if not previous.exists():
        return
    if path.exists():
        shutil.rmtree(previous, ignore_errors=True)
    else:
        previous.rename(path)


def remove_stale(folder: Path) -> None:
    """Remove the temporary directories in ``folder`` whose writers are gone."""
    for item in folder.glob(f".*{_INCOMPLETE}*"):
        if item.is_dir() and _is_stale(item):
            shutil.rmtree(item, ignore_errors=True)


def _move_into_place(temporary: Path, path: Path) -> None:
    previous = _previous(path)
    if path.exists():
        path.rename(previous)
    temporary.rename(path)
    _flush(path.parent)
    if previous.exists():
        shutil.rmtree(previous, ignore_errors=True)


def _previous(path: Path) -> Path:
    return path.parent / f".{path.name}{_PREVIOUS}"


def _is_stale(temporary: Path) -> bool:
    host, _, pid = temporary.name.rpartition(_INCOMPLETE)[2].rpartition(".")
    if host != socket.gethostname() or not pid.isdigit():
        return time.time() - temporary.stat().st_mtime > _FOREIGN_STALE_S
    if int(pid) == os.getpid():
        return True
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    return False


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
