"""Passes by name, their text form, their order, and the manager that runs them.

A pass is one of :data:`PASSES`, or a class that an entry point of the group
``ipu_pipeline.passes`` gives. The text form is ``name{option=value,list=[a,b]},other``; a word with
marks of the form in it, such as the pattern ``layer.[0-2]``, stands in single quotes.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any, ClassVar, Protocol, TypeVar

from ipu_pipeline.errors import PlanError, VerifyError
from ipu_pipeline.ir.entry_points import installed
from ipu_pipeline.ir.plan import Plan
from ipu_pipeline.ir.verify import verify_plan
from ipu_pipeline.planner.passes.annotations import (
    Offload,
    Recompute,
    SerializeEmbedding,
    SerializeProjection,
)

T = TypeVar("T")


class Pass(Protocol):
    """One decision about how blocks run; a frozen dataclass whose fields are its options."""

    name: ClassVar[str]
    __dataclass_fields__: ClassVar[dict[str, Any]]

    def run(self, plan: Plan) -> Plan:
        """Return ``plan`` with this pass's annotations; running it again changes nothing."""
        ...


GROUP = "ipu_pipeline.passes"
# In the order in which they run.
PASSES: tuple[type[Pass], ...] = (
    # Where a table is decides which stages hold it, so it comes before all that counts bytes.
    SerializeEmbedding,
    # A projection may share its table with a lookup; it is cut once the lookup's slices are known.
    SerializeProjection,
    # Last: a head fused with the loss keeps no logits, so there is less to recompute.
    Recompute,
    # It changes no bytes that another one counts.
    Offload,
)
ORDER = tuple(one.name for one in PASSES)
_TOKEN = re.compile(r"\s*([{}\[\],=]|'[^']*'|[^\s{}\[\],=]+)")
_MARKS = frozenset("{}[],=")


@dataclass(frozen=True)
class PassManager:
    """Passes in the order in which they run."""

    passes: tuple[Pass, ...] = ()

    @classmethod
    def parse(cls, text: str) -> PassManager:
        """Read ``serialize_embedding{factor=4},recompute{blocks=[a,b]}``.

        The passes run in the order of ``ORDER``, not in the written one.

        Raises:
            ValueError: The text has another form, or a pass or an option is unknown or wrong.
        """
        return cls(in_default_order(make_pass(*found) for found in parse_passes(text)))

    def __str__(self) -> str:
        return ",".join(map(pass_text, self.passes))

    def run(self, plan: Plan) -> Plan:
        """Return ``plan`` with the annotations of all passes; its predictions are left alone.

        Raises:
            PlanError: ``plan`` is invalid, or a pass cannot be applied to it.
            VerifyError: A pass left an invalid plan behind.
        """
        verify_plan(plan)
        for one in self.passes:
            plan = one.run(plan)
            try:
                verify_plan(plan)
            except PlanError as error:
                raise VerifyError(
                    f"pass {pass_text(one)} left an invalid plan: {error}; this is a bug in the "
                    "pass, not in the plan"
                ) from error
        return plan


def in_default_order(passes: Iterable[Pass]) -> tuple[Pass, ...]:
    """Return ``passes`` as ``ORDER`` says; equal names, and names it lacks, stay as given."""
    return tuple(sorted(passes, key=lambda one: [*ORDER, one.name].index(one.name)))


def available_passes() -> tuple[str, ...]:
    """Return the names of all passes; of those from outside without importing one."""
    return tuple(dict.fromkeys([*sorted(ORDER), *(point.name for point in installed(GROUP))]))


def make_pass(name: str, options: Mapping[str, Any]) -> Pass:
    """Return the pass called ``name`` with ``options``.

    Raises:
        ValueError: There is no such pass; an option is unknown, missing or out of range.
    """
    if name not in available_passes():
        raise ValueError(f"unknown pass {name!r}; passes: {', '.join(available_passes())}")
    kind = next((one for one in PASSES if one.name == name), None) or next(
        point.load() for point in installed(GROUP) if point.name == name
    )
    known = [item.name for item in fields(kind)]
    unknown = [key for key in options if key not in known]
    if unknown:
        raise ValueError(
            f"pass {name} has no option {', '.join(unknown)}; its options: {', '.join(known)}"
        )
    missing = [
        item.name
        for item in fields(kind)
        if item.default is MISSING and item.default_factory is MISSING and item.name not in options
    ]
    if missing:
        raise ValueError(f"pass {name} misses the option {', '.join(missing)}: {name}{{...=...}}")
    made: Pass = kind(**options)
    return made


def pass_text(one: Pass) -> str:
    """Return the text form: the name, and the options that differ from their defaults.

    :func:`parse_passes` reads it back.
    """
    given = {}
    for item in fields(one):
        value = getattr(one, item.name)
        if item.default is MISSING or value != item.default:
            given[item.name] = value
    options = ",".join(f"{key}={_text(value)}" for key, value in given.items())
    return f"{one.name}{{{options}}}" if given else one.name


class _Reader:
    """What is left of the tokens of one text."""

    def __init__(self, text: str) -> None:
        self.text = text
        self._left: deque[str] = deque(_TOKEN.findall(text))

    @property
    def next(self) -> str:
        """The next token; empty at the end."""
        return self._left[0] if self._left else ""

    def take(self, *wanted: str) -> str:
        """Return the next token, which must be one of ``wanted``, or a word without it."""
        token = self.next
        if (token not in wanted) if wanted else (not token or token in _MARKS):
            expected = " or ".join(wanted) if wanted else "a word"
            raise ValueError(
                f"passes {self.text!r}: expected {expected}, found {token or 'the end'!r}; the "
                "form is name{option=value,list=[a,b]},name"
            )
        return self._left.popleft()

    def between(self, begin: str, end: str, one: Callable[[], T]) -> list[T]:
        """Return what ``one`` reads, again and again, with commas between, up to ``end``."""
        self.take(begin)
        found = []
        while self.next != end:
            found.append(one())
            if self.next != end:
                self.take(",", end)
        self.take(end)
        return found

    def one_pass(self) -> tuple[str, dict[str, Any]]:
        """Return a name with its options."""
        name = self.take()
        pairs = self.between("{", "}", self._option) if self.next == "{" else []
        options = dict(pairs)
        if len(options) < len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in keys if keys.count(key) > 1)
            raise ValueError(f"passes {self.text!r}: {name} is given {twice} twice")
        return name, options

    def _option(self) -> tuple[str, Any]:
        key = self.take()
        self.take("=")
        if self.next == "[":
            return key, tuple(self.between("[", "]", lambda: _scalar(self.take())))
        return key, _scalar(self.take())


def parse_passes(text: str) -> list[tuple[str, dict[str, Any]]]:
    """Return names and options of the passes in ``text``; values are words, numbers, lists.

    Raises:
        ValueError: The text has another form, or an option is given twice.
    """
    reader = _Reader(text)
    found: list[tuple[str, dict[str, Any]]] = []
    while reader.next:
        if found:
            reader.take(",")
        found.append(reader.one_pass())
    return found


def _scalar(word: str) -> str | int:
    if word.startswith("'") and word.endswith("'"):
        return word.strip("'")
    return int(word) if _is_number(word) else word


def _text(value: Any) -> str:
    if isinstance(value, tuple):
        return "[" + ",".join(map(_text, value)) + "]"
    if isinstance(value, str) and (not value or set(value) & {*_MARKS, " "} or _is_number(value)):
        return f"'{value}'"
    return str(value)


def _is_number(word: str) -> bool:
    return re.fullmatch(r"-?\d+", word) is not None
