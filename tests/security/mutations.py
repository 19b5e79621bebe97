"""Damaged and hostile files: one mutation of a good file at a time."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from typing import Any

# What stands in the place of a value: other types, and numbers outside of every range.
STRANGE: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 3, -7, 10**9, 10**400, -(10**30), 0.5, -0.5, 1e-300, 1e300,
    float("inf"), float("-inf"), float("nan"), "", "x", "0", "1e9", "\x00", "\u2028", "a" * 3000,
    [], [1], [[]], ["x", 3], {}, {"x": 1}, {"": None}, [None] * 3,
)  # fmt: skip
DEPTH = 5000


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of every value inside ``value``."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in items:
        yield (*path, key)
        if isinstance(inner, dict | list):
            yield from places(inner, (*path, key))


def mutated(text: str, draw: random.Random) -> str:
    """Return ``text``, a JSON file, with one thing wrong."""
    kind = draw.randrange(12)
    if kind == 0:
        return text[: draw.randrange(len(text))]
    if kind == 1:
        at = draw.randrange(len(text))
        return text[:at] + draw.choice('\x00"{}[],:-e9\u2028\ud7ff') + text[at + 1 :]
    if kind == 2:
        return "[" * DEPTH + "]" * DEPTH if draw.random() < 0.2 else text + draw.choice(("}", text))
    data = json.loads(text)
    return json.dumps(_changed(data, kind, draw))


def _changed(data: Any, kind: int, draw: random.Random) -> Any:
    data = copy.deepcopy(data)
    path = draw.choice(list(places(data)))
    owner = data
    for key in path[:-1]:
        owner = owner[key]
    key = path[-1]
    if kind == 3:
        del owner[key]
    elif kind == 4 and isinstance(owner, dict):
        owner[f"{key}_"] = owner.pop(key)
    elif kind == 5 and isinstance(owner, list):
        owner.insert(key, copy.deepcopy(owner[key]))
    elif kind == 6 and isinstance(owner, list):
        draw.shuffle(owner)
    elif kind == 7 and isinstance(owner[key], int | float) and not isinstance(owner[key], bool):
        owner[key] *= draw.choice((-1, 0, 2, 10**6, 10**18, 0.5))
    elif kind == 8:
        deep: Any = 1
        for _ in range(draw.choice((3, 300, DEPTH // 10))):
            deep = [deep]
        owner[key] = deep
    else:
        owner[key] = draw.choice(STRANGE)
    return data
