"""Every error the library raises on purpose.

::

    PipelineError
    |-- CaptureError        the model could not be captured faithfully
    |   `-- GuardError      a value read by Python differs from the captured one
    |-- PartitionError      no split satisfies the constraints (says what would help)
    |-- PlanError           a plan is malformed, stale, or made for something else
    |-- LoweringError       a target cannot run the plan
    |-- StageError          a stage failed while running (names stage, block, microbatch)
    |   `-- StallError      no stage made progress before the watchdog's deadline
    |-- CheckpointError     a checkpoint is corrupt, incomplete or foreign
    |-- DatasetError        a data set cannot be read
    |-- ConfigError         an ipu_config.json or an override is wrong
    |-- OutputError         a file cannot be written where it was asked for
    `-- VerifyError         an invariant of ours is broken: a bug here, not in the input

Messages say what failed, the values involved and the remedy. Wrong argument *values*
are plain ``ValueError``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from reprlib import Repr

# Values out of a broken file, longer than any path or sentence: their beginnings say enough.
_LONG = re.compile(r"(\S{80})\S{320,}")
_LONG_QUOTED = re.compile(r"('[^'\n]{80})[^'\n]{700,}(?=')")


# Exit code of a command that Ctrl-C has ended, as shells have it: 128 + SIGINT.
INTERRUPTED = 130
_REPR = Repr()
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = 80


class PipelineError(Exception):
    """Base class of every error that this library raises on purpose."""

    def __str__(self) -> str:
        """Return the message, printable; of a word or quoted text without end the beginning."""
        return printable(super().__str__())


def printable(text: str) -> str:
    """Return a message as a terminal may show it.

    What would act there, lines apart, is escaped; of a word or quoted text without end the
    beginning is kept.
    """
    text = _LONG_QUOTED.sub(r"\1...", _LONG.sub(r"\1...", text))
    if text.replace("\n", "").isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)


def first_line(error: BaseException) -> str:
    """Return the first line of what an error of another library says, without a full stop."""
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")


def shown(value: object) -> str:
    """Return a value out of a file for a message: short, however large the value is."""
    return _REPR.repr(value)


def listed(names: Iterable[str], most: int = 5) -> str:
    """Return names for a message: the first ones, each short, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(n if len(n) <= 80 else f"{n[:80]}..." for n in names[:most]) + more


class CaptureError(PipelineError):
    """The model could not be captured, or the capture does not compute what the model does."""


class GuardError(CaptureError):
    """A tensor value that the model reads in Python differs from the one seen at capture."""


class PartitionError(PipelineError):
    """No split satisfies the constraints; the message names what would make it fit."""


class PlanError(PipelineError):
    """A plan file is malformed, or belongs to another model, machine or library version."""


class LoweringError(PipelineError):
    """A target cannot run this plan; raised before anything is executed."""


class StageError(PipelineError):
    """A stage failed while running; the cause is chained, stage and block are named."""


class StallError(StageError):
    """No stage made progress before the watchdog's deadline."""


class CheckpointError(PipelineError):
    """A checkpoint is corrupt, incomplete, or was written for another model."""


class DatasetError(PipelineError):
    """A data set cannot be read: says which file, where in it, and what to do."""


class ConfigError(PipelineError):
    """An IPU configuration holds an unknown key, a wrong type or inconsistent lengths."""


class OutputError(PipelineError):
    """A file cannot be written where it was asked for: says which path, and why."""


class VerifyError(PipelineError):
    """An internal invariant is broken: a bug in this library, not in the caller's input."""
