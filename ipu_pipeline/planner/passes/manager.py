"""Passes by name, their text form, their order, and the manager that runs them.

A pass is found by its file in this folder (``PASS``, whose ``name`` is that of the file) or by an
entry point of the group ``ipu_pipeline.passes`` that gives the class. The text form is
``name{option=value,list=[a,b]},other``; a word with marks of the form in it, such as the pattern
``layer.[0-2]``, stands in single quotes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, fields
from importlib import import_module
from pathlib import Path
from typing import Any

from ipu_pipeline.errors import PlanError, VerifyError
from ipu_pipeline.ir.entry_points import installed
from ipu_pipeline.ir.plan import Plan
from ipu_pipeline.ir.verify import verify_plan
from ipu_pipeline.planner.passes.base import Pass

GROUP = "ipu_pipeline.passes"
ORDER = (
    # Where a table is decides which stages hold it, so it comes before all that counts bytes.
    "serialize_embedding",
    # A projection may share its table with a lookup; it is cut once the lookup's slices are known.
    "serialize_projection",
    # Last: a head fused with the loss keeps no logits, so there is less to recompute.
    "recompute",
    # It changes no bytes that another one counts.
    "offload",
)
_OWN = ("__init__", "base", "manager")
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
    place = {name: position for position, name in enumerate(ORDER)}
    return tuple(sorted(passes, key=lambda one: place.get(one.name, len(ORDER))))


def available_passes() -> tuple[str, ...]:
    """Return the names of all passes, without importing one."""
    files = sorted(path.stem for path in Path(__file__).parent.glob("*.py"))
    own = [name for name in files if name not in _OWN]
    return tuple(dict.fromkeys([*own, *(point.name for point in installed(GROUP))]))


def make_pass(name: str, options: Mapping[str, Any]) -> Pass:
    """Return the pass called ``name`` with ``options``.

    Raises:
        ValueError: There is no such pass; an option is unknown, missing or out of range.
    """
    if name not in available_passes():
        raise ValueError(f"unknown pass {name!r}; passes: {', '.join(available_passes())}")
    points = (point for point in installed(GROUP) if point.name == name)
    if (Path(__file__).parent / f"{name}.py").is_file():
        kind = import_module(f"{__package__}.{name}").PASS
    else:
        kind = next(points).load()
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


@dataclass
class _Reader:
    """Tokens of one text, and how far it was read."""

    text: str
    tokens: list[str]
    position: int = 0

    def peek(self) -> str:
        return self.tokens[self.position] if self.position < len(self.tokens) else ""

    def take(self, *wanted: str) -> str:
        """Return the next token, which must be one of ``wanted``, or a word without it."""
        token = self.peek()
        if (token not in wanted) if wanted else (not token or token in _MARKS):
            expected = " or ".join(wanted) if wanted else "a word"
            raise ValueError(
                f"passes {self.text!r}: expected {expected}, found {token or 'the end'!r}; the "
                "form is name{option=value,list=[a,b]},name"
            )
        self.position += 1
        return token


def parse_passes(text: str) -> list[tuple[str, dict[str, Any]]]:
    """Return names and options of the passes in ``text``; values are words, numbers, lists.

    Raises:
        ValueError: The text has another form, or an option is given twice.
    """
    if not text.strip():
        return []
    reader = _Reader(text, _TOKEN.findall(text))
    found = [_one(reader)]
    while reader.peek():
        reader.take(",")
        found.append(_one(reader))
    return found


def _one(reader: _Reader) -> tuple[str, dict[str, Any]]:
    name, options = reader.take(), {}
    if reader.peek() == "{":
        reader.take("{")
        while reader.peek() != "}":
            key = reader.take()
            if key in options:
                raise ValueError(f"passes {reader.text!r}: {name} is given {key} twice")
            reader.take("=")
            options[key] = _value(reader)
            if reader.peek() != "}":
                reader.take(",", "}")
        reader.take("}")
    return name, options


def _value(reader: _Reader) -> Any:
    if reader.peek() != "[":
        return _scalar(reader.take())
    reader.take("[")
    items = []
    while reader.peek() != "]":
        items.append(_scalar(reader.take()))
        if reader.peek() != "]":
            reader.take(",")
    reader.take("]")
    return tuple(items)


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
