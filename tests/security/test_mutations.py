"""Files with one thing wrong: the same result, or one error of ours that names the file.

``make test`` tries 1,000 of them, ``make test-acceptance`` 50,000, in shares by kind.
"""

from __future__ import annotations

import random
import signal
from pathlib import Path

import pytest

from ipu_pipeline.errors import PipelineError, PlanError
from tests.security.kind import Kind
from tests.security.kinds import KINDS
from tests.security.mutations import mutated

LONGEST = 600
# Of processor time, which does not depend on what else the machine does. The slowest good file
# takes less than one.
HANGS_AFTER_S = 20


class HangError(BaseException):
    """A file has kept its reader busy for too long; nothing may catch this."""


@pytest.mark.parametrize("name", KINDS)
def test_a_mutated_file_is_used_or_refused_by_name(tmp_path: Path, name: str) -> None:
    check(tmp_path / name, KINDS[name], range(KINDS[name].share))


@pytest.mark.acceptance
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", KINDS)
def test_many_mutated_files(tmp_path: Path, name: str) -> None:
    check(tmp_path / name, KINDS[name], range(100_000, 100_000 + 50 * KINDS[name].share))


def test_the_shares_are_of_a_thousand() -> None:
    assert sum(kind.share for kind in KINDS.values()) == 1000


def check(path: Path, kind: Kind, numbers: range) -> None:
    """Try mutations of a good file, by number."""
    path.parent.mkdir(exist_ok=True)
    kind.write(path)
    good = path.read_bytes()
    kind.use(path)
    found = []
    for number in numbers:
        path.write_bytes(mutated(good, path.suffix, random.Random(number)))
        if wrong := problem(kind, path):
            found.append(f"mutation {number}: {wrong}")
    print(f"{path.name}: {len(numbers)} mutations, {len(found)} wrong")
    assert not found, "\n".join(found[:20])


def problem(kind: Kind, path: Path, hangs_after_s: float = HANGS_AFTER_S) -> str:
    """Return what is wrong with how a file is used or refused; nothing where that is right."""

    def hangs(*_: object) -> None:
        raise HangError(f"busy for {hangs_after_s:g} s")

    before = signal.signal(signal.SIGVTALRM, hangs)
    signal.setitimer(signal.ITIMER_VIRTUAL, hangs_after_s)
    try:
        kind.use(path)
    except (PipelineError, ValueError) as error:  # wrong argument values are plain ValueError
        if not isinstance(error, PipelineError) and type(error) is not ValueError:
            return f"{type(error).__name__}: {error!s:.500}"
        text = str(error)
        if len(text) - text.count(str(path)) * len(str(path)) > LONGEST:
            return f"a message of {len(text)} characters: {text}"
        return "" if str(path) in text else f"the file is not named: {text}"
    except (Exception, HangError) as error:
        return f"{type(error).__name__}: {error!s:.500}"
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
    return ""


def test_what_is_wrong_with_a_reader_is_found(tmp_path: Path) -> None:
    """A reader that hangs, fails, or does not say which file it refuses."""

    def hang(_: Path) -> None:
        while True:
            pass

    def fail(path: Path) -> None:
        {}[path.name]

    def refuse(_: Path) -> None:
        raise PlanError("no plan")

    for use, wrong in ((hang, "HangError: busy for 0.05 s"), (fail, "KeyError"), (refuse, "named")):
        assert wrong in problem(Kind(Path.touch, use, 0), tmp_path / "file", 0.05)
