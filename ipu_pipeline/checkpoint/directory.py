"""Directories that appear whole or not at all, whatever kills the process that writes them."""

from __future__ import annotations

import os
import secrets
import shutil
from pathlib import Path

from filelock import FileLock, Timeout

_INCOMPLETE = ".incomplete."
_PREVIOUS = ".previous"
_LOCK = ".lock"
# Whoever looks whether a writer lives has its lock for a moment only.
_LOOKED_AT_S = 10.0


class AtomicDirectory:
    """A hidden sibling of ``path`` to fill; it appears as ``path`` whole or not at all.

    Its name cannot be guessed. A lock beside it is held until then, and released by the end of
    the process, whatever ends it: the next save into the same parent removes what is not locked.

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
        self.folder = _hidden(self.path)
        # A thread may begin what another one finishes.
        self._lock = FileLock(f"{self.folder}{_LOCK}", thread_local=False)
        self._lock.acquire(timeout=_LOOKED_AT_S)
        try:
            self.folder.mkdir()
        except BaseException:
            self._unlock()
            raise

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
        self._unlock()

    def discard(self) -> None:
        """Remove the directory; ``path`` is as before. Does nothing once it is published."""
        if self._lock.is_locked:
            shutil.rmtree(self.folder, ignore_errors=True)
            self._unlock()

    def _unlock(self) -> None:
        Path(self._lock.lock_file).unlink(missing_ok=True)
        self._lock.release()


def remove_directory(path: Path) -> None:
    """Delete a directory so that no half-deleted one is ever found under its name."""
    doomed = _hidden(path)
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


def remove_stale(folder: Path, name: str = "*") -> None:
    """Remove hidden directories in ``folder`` that nobody writes, of those that ``name`` matches.

    Nobody writes where there is no lock, or one that is free.
    """
    for path in folder.glob(f".{name}{_INCOMPLETE}*{_LOCK}"):
        lock = FileLock(path)
        try:
            lock.acquire(timeout=0)
        except (Timeout, OSError):  # its writer lives, or is another user's
            continue
        shutil.rmtree(str(path).removesuffix(_LOCK), ignore_errors=True)
        path.unlink(missing_ok=True)
        lock.release()
    for path in folder.glob(f".{name}{_INCOMPLETE}*"):
        if path.is_dir() and not Path(f"{path}{_LOCK}").exists():
            shutil.rmtree(path, ignore_errors=True)


def remove_abandoned(folder: Path, name: str) -> None:
    """Finish or undo what was cut off in ``folder``, of the directories that ``name`` matches."""
    for item in folder.glob(f".{name}{_PREVIOUS}"):
        restore_previous(item.with_name(item.name.removeprefix(".").removesuffix(_PREVIOUS)))
    remove_stale(folder, name)


def _previous(path: Path) -> Path:
    return path.parent / f".{path.name}{_PREVIOUS}"


def _hidden(path: Path) -> Path:
    return path.parent / f".{path.name}{_INCOMPLETE}{secrets.token_hex(8)}"


def flush(path: Path) -> None:
    """Wait until a file or directory is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
