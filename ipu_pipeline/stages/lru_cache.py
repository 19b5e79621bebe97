"""A dictionary of bounded size that forgets what was used least recently."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class RecentlyUsed(Generic[K, V]):
    """Makes values on demand and keeps the ``limit`` that were used last.

    Args:
        limit: At most so many are kept, at least 1.
        on_drop: Called with every value that is forgotten.

    Raises:
        ValueError: ``limit`` is below 1.
    """

    def __init__(self, limit: int, on_drop: Callable[[V], None] | None = None) -> None:
        if limit < 1:
            raise ValueError(f"the limit must be at least 1, got {limit}")
        self.limit = limit
        self._on_drop = on_drop
        self._values: OrderedDict[K, V] = OrderedDict()

    def __len__(self) -> int:
        return len(self._values)

    def get(self, key: K, make: Callable[[], V]) -> V:
        """Return the value of ``key``; it is made if it is not there, and then the last used."""
        if key not in self._values:
            self._values[key] = make()
            if len(self._values) > self.limit:
                self._drop(next(iter(self._values)))
        self._values.move_to_end(key)
        return self._values[key]

    def drop_where(self, condition: Callable[[K], bool]) -> None:
        """Forget every value whose key meets ``condition``."""
        for key in [key for key in self._values if condition(key)]:
            self._drop(key)

    def _drop(self, key: K) -> None:
        value = self._values.pop(key)
        if self._on_drop is not None:
            self._on_drop(value)
