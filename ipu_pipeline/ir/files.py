"""Files in and out: read whole and checked, written whole or not at all.

A file that is read may be a stranger's, so only regular files of a bounded size in UTF-8 are read.
An output is checked before any work is done for it, and nothing is replaced unless that was asked.
"""

from __future__ import annotations

import csv
import errno
import io
import os
import secrets
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from ipu_pipeline.errors import OutputError, PipelineError, shown

# Bytes of the largest file that is read.
MAX_BYTES = 2**30
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFBLK: "a device",
    stat.S_IFCHR: "a device",
}
_REMEDIES = {
    errno.ENOENT: "check the path",
    errno.ENOTDIR: "a part of the path is a file; choose another path",
    errno.EACCES: "change the permissions, or choose another path",
    errno.ENAMETOOLONG: "choose a shorter one",
    errno.ENOSPC: "make room, or choose another path",
}


def read_text(
    path: str | Path, what: str, error: type[PipelineError], *, most_bytes: int = MAX_BYTES
) -> str:
    """Return the text of a file, with its line ends as they are.

    Args:
        path: A regular file in UTF-8, with or without a byte order mark.
        what: What it is, such as ``the plan``, for the message.
        error: Raised if it cannot be read; says why and what to do.
        most_bytes: A larger file is refused.
    """
    try:
        state = Path(path).stat()
        if kind := _KINDS.get(stat.S_IFMT(state.st_mode)):
            raise ValueError(f"it is {kind}; give the path of a regular file")
        if state.st_size > most_bytes:
            raise ValueError(
                f"it has {state.st_size} bytes, at most {most_bytes} are read; split it"
            )
        return Path(path).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as problem:
        raise error(
            f"cannot read {what} {named(path)} as UTF-8 text: {problem.reason} at byte "
            f"{problem.start}; save it as UTF-8"
        ) from problem
    except (OSError, ValueError) as problem:
        raise error(f"cannot read {what} {named(path)}: {_reason(problem)}") from problem


def read_table(
    text: str, source: str, error: type[PipelineError], columns: Sequence[str] = ()
) -> list[dict[str, str]]:
    """Return the rows of a CSV text by the names in its first line, by the rules of ``csv``.

    Fields may be as long as the text, and hold line ends where they are quoted.

    Args:
        text: Of :func:`read_text`.
        source: Named at the start of every message.
        error: Raised where the table is wrong; says in which line.
        columns: The names that the first line must have; any, if there are none.
    """
    before = csv.field_size_limit(MAX_BYTES)
    try:
        reader = csv.reader(io.StringIO(text, newline=""), strict=True)
        names = next(reader, [])
        if columns and names != list(columns):
            raise error(f"{source} must have the columns {', '.join(columns)}, got {shown(names)}")
        if (twice := first_twice(names)) is not None:
            raise error(f"{source} has several columns {shown(twice)}; give each its own name")
        rows = []
        for row in filter(None, reader):
            if len(row) != len(names):
                raise error(
                    f"{source}, line {reader.line_num} has {len(row)} columns, not the "
                    f"{len(names)} of the first line; quote fields that hold a comma"
                )
            rows.append(dict(zip(names, row, strict=True)))
    except csv.Error as problem:
        raise error(
            f"{source}, line {reader.line_num} is no CSV: {problem}; quote fields that hold quotes "
            "or line ends"
        ) from problem
    finally:
        csv.field_size_limit(before)
    return rows


@contextmanager
def of_file(path: str | Path) -> Iterator[None]:
    """Name a file at the start of every error about what it says, unless it is named."""
    try:
        yield
    except (PipelineError, ValueError) as error:
        kind = type(error) if isinstance(error, PipelineError) else ValueError
        if str(path) in str(error):
            raise
        raise kind(f"{named(path)}: {error}") from error


def first_twice(names: Iterable[str]) -> str | None:
    """Return the first name that was there before, in one pass; ``None`` if all differ."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None


def write_text(path: str | Path, text: str) -> None:
    """Write a file in UTF-8 as :func:`write_bytes` does."""
    write_bytes(path, text.encode())


def write_bytes(path: str | Path, data: bytes) -> None:
    """Write a file: whole at any time, or unchanged if that fails.

    A link stays, what it leads to is replaced; devices and pipes are written as they are.

    Raises:
        OutputError: It cannot be written; says why.
    """
    with _output(f"cannot write {named(path)}"):
        target, state = _target(path)
        if state and stat.S_IFMT(state.st_mode) in _KINDS:
            target.write_bytes(data)  # of a folder, it says so
            return
        partial = _new_file_beside(target)
        try:
            partial.write_bytes(data)
            if state:
                partial.chmod(stat.S_IMODE(state.st_mode))
            partial.replace(target)
        except BaseException:
            with suppress(OSError):
                partial.unlink()
            raise


def check_outputs(outputs: Mapping[str, Path | None], *, force: bool) -> None:
    """Refuse files that could not be written, or would be replaced, before any work is done.

    Args:
        outputs: The path of every file, by the option that named it.
        force: Whether files may be replaced.

    Raises:
        OutputError: Says which option, which path, and why.
    """
    seen: dict[Path, str] = {}
    for name, path in outputs.items():
        if path is None:
            continue
        with _output(f"{name} {named(path)}"):
            target, state = _target(path)
            kind = _KINDS.get(stat.S_IFMT(state.st_mode)) if state else None
            if kind == "a folder":
                raise ValueError("it is a folder; give the path of a file")
            if state and not os.access(target, os.W_OK):
                raise PermissionError(errno.EACCES, "it may not be written")
            if kind:
                continue
            if state and state.st_size and not force:
                raise ValueError("it exists; choose another path, or replace it with --force")
            if target in seen:
                raise ValueError(f"{seen[target]} names the same file; give two paths")
            _new_file_beside(target).unlink()
            seen[target] = name


def make_folder(name: str, path: str | Path, *, force: bool = True) -> Path:
    """Make a folder for outputs if there is none, and try that files can be written there.

    Args:
        name: The option that named it.
        path: The folder.
        force: Whether it may hold files.

    Raises:
        OutputError: Says which option, which path, and why.
    """
    folder = Path(path)
    with _output(f"{name} {named(path)}"):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except FileExistsError:
            raise ValueError("it is a file; give a folder") from None
        if not force and any(folder.iterdir()):
            raise ValueError("it is not empty; choose another, or replace its files with --force")
        _new_file_beside(folder / "any").unlink()
    return folder


def named(path: str | Path) -> str:
    """Return a path for a message: as it is, unless it is long or holds what does not print."""
    text = str(path)
    return text if len(text) <= 300 and text.isprintable() else shown(text)


def _target(path: str | Path) -> tuple[Path, os.stat_result | None]:
    """Return where links lead to, and what is there."""
    target = Path(os.path.realpath(path))
    with suppress(OSError):
        state = Path(path).stat()
        if not stat.S_ISREG(state.st_mode):  # what a pipe's link says, as /dev/stdout, is no path
            return Path(path), state
    try:
        return target, target.stat()
    except FileNotFoundError:
        return target, None


def _new_file_beside(target: Path) -> Path:
    """Make an empty file in the folder of ``target``, under a name that cannot be guessed."""
    path = target.with_name(f".{secrets.token_hex(8)}.partial")
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    return path


@contextmanager
def _output(what: str) -> Iterator[None]:
    """Turn what the system says about an output into an error of ours."""
    try:
        yield
    except FileNotFoundError as problem:
        raise OutputError(f"{what}: there is no such folder; make it first") from problem
    except (OSError, ValueError) as problem:
        raise OutputError(f"{what}: {_reason(problem)}") from problem


def _reason(problem: Exception) -> str:
    if not isinstance(problem, OSError):
        return str(problem)
    remedy = _REMEDIES.get(problem.errno or 0, "choose another path")
    return f"{problem.strerror or problem}; {remedy}"
