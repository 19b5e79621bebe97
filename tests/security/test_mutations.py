"""Files with one thing wrong: the same result, or one error of ours that names the file.

``make test`` tries 2,000 of them, ``make test-acceptance`` 50,000, in shares by kind. A file that
makes its reader hang fails by the time limit of tests.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from ipu_pipeline.errors import PipelineError
from tests.security.kinds import KINDS, Kind
from tests.security.mutations import mutated

LONGEST = 600


@pytest.mark.parametrize("name", KINDS)
def test_a_mutated_file_is_used_or_refused_by_name(tmp_path: Path, name: str) -> None:
    check(tmp_path / name, KINDS[name], range(2 * KINDS[name].share))


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
    for number in numbers:
        path.write_bytes(mutated(good, path.suffix, random.Random(number)))
        wrong = problem(kind, path)
        assert not wrong, f"mutation {number}: {wrong}"


def problem(kind: Kind, path: Path) -> str:
    """Return what is wrong with how a file is used or refused; nothing where that is right."""
    try:
        kind.use(path)
    except (PipelineError, ValueError) as error:  # wrong argument values are plain ValueError
        if not isinstance(error, PipelineError) and type(error) is not ValueError:
            return f"{type(error).__name__}: {error!s:.500}"
        text = str(error)
        if len(text) - text.count(str(path)) * len(str(path)) > LONGEST:
            return f"a message of {len(text)} characters: {text}"
        return "" if str(path) in text else f"the file is not named: {text}"
    except Exception as error:
        return f"{type(error).__name__}: {error!s:.500}"
    return ""
