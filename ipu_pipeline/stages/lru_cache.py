"""A cache from which the values that were used least recently are dropped."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class LRUCache(Generic[K, V]):
    """Makes values on demand and keeps the ``limit`` that were used last, at least 1.

    ``on_drop`` is called with every value that is dropped.
    """

    def __init__(self, limit: int, on_drop: Callable[[V], None] = lambda _: None) -> None:
        self.limit = limit
        self._on_drop = on_drop
        self._values: OrderedDict[K, V] = OrderedDict()

    def __len__(self) -> int:
        return len(self._values)

    def values(self) -> Iterator[V]:
        """Yield the values, the last used first."""
        yield from reversed(self._values.values())

    def get(self, key: K, make: Callable[[], V]) -> V:
        """Return the value of ``key``; it is made if it is not there, and then the last used."""
        if key not in self._values:
            self._values[key] = make()
            if len(self._values) > self.limit:
                self._on_drop(self._values.popitem(last=False)[1])
        self._values.move_to_end(key)
        return self._values[key]

    def drop_where(self, condition: Callable[[K], bool]) -> None:
        """Drop every value whose key meets ``condition``."""
        for key in [key for key in self._values if condition(key)]:
            self._on_drop(self._values.pop(key))
