"""Damaged and hostile files: one mutation of a good file at a time."""

from __future__ import annotations

import copy
import csv
import io
import json
import random
from collections.abc import Iterator
from typing import Any

import yaml

# What stands in the place of a value: other types, and numbers outside of every range.
STRANGE: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 3, -7, 10**9, 2**62, 10**400, -(10**30), 0.5, -0.5, 1e-300, 1e300,
    float("inf"), float("-inf"), float("nan"), "", "x", "0", "1e9", "9" * 5000, "\x00", "\u2028",
    "\x85\x0c", "\ud800", "a" * 3000, "a b " * 1000,
    [], [1], [[]], ["x", 3], {}, {"x": 1}, {"": None}, [None] * 3,
)  # fmt: skip
DEPTH = 5000
BINARY = (".parquet", ".safetensors", ".pt", ".npz")
PIECES = (b"\x00", b'"', b"{", b"}", b"[", b"]", b",", b":", b"-", b"e9", b"\n", b"\r",
          b"\xe2\x80\xa8", b"\xc2\x85", b"\x0c", b"\xff", b"\xed\xa0\x80", b"9" * 5000, b"NaN",
          b"&a [*a]", b"1e400")  # fmt: skip


def mutated(data: bytes, suffix: str, draw: random.Random) -> bytes:
    """Return the bytes of a file with one thing wrong, in its structure where that is known."""
    change = _STRUCTURES.get(suffix)
    if suffix == ".safetensors" and draw.random() < 0.7:
        size = 8 + int.from_bytes(data[:8], "little")
        header = _any_json(data[8:size].decode(), draw).encode("utf-8", errors="surrogatepass")
        return len(header).to_bytes(8, "little") + header + data[size:]
    if change is not None and draw.random() < 0.7:
        return change(data.decode(), draw).encode("utf-8", errors="surrogatepass")
    return _broken(data, suffix, draw)


def _broken(data: bytes, suffix: str, draw: random.Random) -> bytes:
    at = draw.randrange(len(data))
    kind = draw.randrange(9)
    if kind == 0:
        return data[:at]
    if kind == 1:
        return data[:at] + draw.choice(PIECES) + data[at + 1 :]
    if kind == 2:
        return data[:at] + bytes([data[at] ^ 1 << draw.randrange(8)]) + data[at + 1 :]
    if kind == 3:
        return data[:at] + draw.choice(PIECES) + data[at:]
    if kind == 4:
        return data + draw.choice((b"}", b"\n", b"\x00", data))
    if kind == 5:
        end = at + draw.randrange(1, 40)
        return data[:at] + data[end:]
    if kind == 6 and suffix not in BINARY:
        text = data.decode()
        return draw.choice((text.encode("utf-16"), text.encode("utf-8-sig"), text.encode("utf-7")))
    if kind == 7:
        return b"[" * DEPTH + (b"]" * DEPTH if draw.random() < 0.5 else b"")
    return draw.choice((b"", b" ", b"\n", b"null", b"[]", b"{}", b"0", b'""', b"\x93NUMPY"))


def _json(text: str, draw: random.Random) -> str:
    return json.dumps(_changed(json.loads(text), draw))


def _json_with_a_key_twice(text: str, draw: random.Random) -> str:
    """Write one key of an object again, with another value."""
    marks = [i for i, letter in enumerate(text) if letter == "{"]
    keys = json.JSONDecoder()
    at = draw.choice(marks) + 1
    try:
        key, _ = keys.raw_decode(text, at + len(text[at:]) - len(text[at:].lstrip()))
    except ValueError:
        return text
    return f"{text[:at]}{json.dumps(key)}: {json.dumps(draw.choice(STRANGE))}, {text[at:]}"


def _any_json(text: str, draw: random.Random) -> str:
    return (_json_with_a_key_twice if draw.random() < 0.08 else _json)(text, draw)


def _lines(text: str, draw: random.Random) -> str:
    lines = text.removesuffix("\n").split("\n")
    at = draw.randrange(len(lines))
    lines[at] = _any_json(lines[at], draw)
    return "\n".join(lines) + "\n"


def _yaml(text: str, draw: random.Random) -> str:
    return str(yaml.safe_dump(_changed(yaml.safe_load(text), draw), allow_unicode=True))


def _table(text: str, draw: random.Random) -> str:
    rows = list(csv.reader(io.StringIO(text)))
    row = draw.choice(rows)
    column = draw.randrange(len(row))
    kind = draw.randrange(6)
    if kind == 0:
        del row[column]
    elif kind == 1:
        row.insert(column, row[column])
    elif kind == 2:
        for each in rows:
            del each[min(column, len(each) - 1)]
    elif kind == 3:
        draw.shuffle(rows)
    else:
        row[column] = str(draw.choice(STRANGE))
        if draw.random() < 0.1:
            row[column] = "a" * 200_000
    written = io.StringIO()
    csv.writer(written, lineterminator=draw.choice(("\n", "\r\n"))).writerows(rows)
    return written.getvalue()


_STRUCTURES = {".json": _any_json, ".jsonl": _lines, ".yaml": _yaml, ".csv": _table}


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of every value inside ``value``."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in items:
        yield (*path, key)
        if isinstance(inner, dict | list):
            yield from places(inner, (*path, key))


def _changed(data: Any, draw: random.Random) -> Any:
    data = copy.deepcopy(data)
    path = draw.choice(list(places(data)))
    owner = data
    for key in path[:-1]:
        owner = owner[key]
    key = path[-1]
    kind = draw.randrange(9)
    if kind == 0:
        del owner[key]
    elif kind == 1 and isinstance(owner, dict):
        owner[draw.choice((f"{key}_", "a" * 3000, "", "\ud800"))] = owner.pop(key)
    elif kind == 2 and isinstance(owner, list):
        owner.insert(key, copy.deepcopy(owner[key]))
    elif kind == 3 and isinstance(owner, list):
        draw.shuffle(owner)
    elif kind == 4 and isinstance(owner[key], int | float) and not isinstance(owner[key], bool):
        owner[key] *= draw.choice((-1, 0, 2, 10**6, 10**18, 0.5))
    elif kind == 5:
        deep: Any = 1
        for _ in range(draw.choice((3, 101, 300))):
            deep = [deep]
        owner[key] = deep
    else:
        owner[key] = draw.choice(STRANGE)
    return data
