"""The text form of passes: ``name{option=value,list=[a,b]},other``.

A word with marks of the form in it, such as the pattern ``layer.[0-2]``, stands in single quotes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

_TOKEN = re.compile(r"\s*([{}\[\],=]|'[^']*'|[^\s{}\[\],=]+)")
_MARKS = frozenset("{}[],=")


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


def options_text(options: dict[str, Any]) -> str:
    """Return ``{a=1,b=[x,y]}``; nothing for no option. :func:`parse_passes` reads it back."""
    if not options:
        return ""
    return "{" + ",".join(f"{key}={_text(value)}" for key, value in options.items()) + "}"


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
