"""Directories that appear whole or not at all, whatever kills the process that writes them."""

from __future__ import annotations

import os
import shutil
import socket
import time
from pathlib import Path

_INCOMPLETE = ".incomplete."
_PREVIOUS = ".previous"
# A writer on another machine cannot be asked whether it lives; after this long it does not.
_FOREIGN_STALE_S = 24 * 3600.0


# Of this process, in whatever thread: not stale.
_in_use: set[Path] = set()


class AtomicDirectory:
    """A hidden sibling of ``path`` to fill; it appears as ``path`` whole or not at all.

    If the process is killed, it stays under its hidden name, and the next save into the same
    parent removes it.

    Args:
        path: Where the directory is to appear; parents are made. What is there stays until then.

    Attributes:
        path: The same, absolute.
        folder: The hidden directory, empty at first.

    Raises:
        OSError: The disk is full, or not writable.
    """

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()
        parent = self.path.parent
        parent.mkdir(parents=True, exist_ok=True)
        remove_stale(parent)
        restore_previous(self.path)
        self.folder = parent / f".{path.name}{_INCOMPLETE}{socket.gethostname()}.{os.getpid()}"
        self.folder.mkdir()
        _in_use.add(self.folder)

    def publish(self) -> None:
        """Flush everything to the disk, then rename; a directory at ``path`` is replaced.

        Raises:
            OSError: The disk is full; ``path`` is as before and the new directory is gone.
        """
        try:
            for item in self.folder.rglob("*"):
                flush(item)
            flush(self.folder)
            previous = _previous(self.path)
            if self.path.exists():
                self.path.rename(previous)
            self.folder.rename(self.path)
            flush(self.path.parent)
            if previous.exists():
                shutil.rmtree(previous, ignore_errors=True)
        except BaseException:
            self.discard()
            restore_previous(self.path)
            raise
        _in_use.discard(self.folder)

    def discard(self) -> None:
        """Remove the directory; ``path`` is as before. Does nothing once it is published."""
        if self.folder in _in_use:
            shutil.rmtree(self.folder, ignore_errors=True)
            _in_use.discard(self.folder)


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
        if item.is_dir() and item.absolute() not in _in_use and _is_stale(item):
            shutil.rmtree(item, ignore_errors=True)


def remove_abandoned(folder: Path, name: str) -> None:
    """Finish or undo what was cut off in ``folder``, of the directories that ``name`` matches.

    The caller makes sure that no other process writes such ones there (by a lock): unlike
    :func:`remove_stale` this asks no process id, which another one may have by now.
    """
    for item in folder.glob(f".{name}{_PREVIOUS}"):
        restore_previous(item.with_name(item.name.removeprefix(".").removesuffix(_PREVIOUS)))
    for item in folder.glob(f".{name}{_INCOMPLETE}*"):
        if item.is_dir() and item.absolute() not in _in_use:
            shutil.rmtree(item, ignore_errors=True)


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


def flush(path: Path) -> None:
    """Wait until a file or directory is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
