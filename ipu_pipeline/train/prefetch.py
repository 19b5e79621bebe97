"""Batches that are evaluated ahead of the loop that asks for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any


class Prefetch:
    """Yields a loader's batches one by one; ``run`` gets the next ``depth`` of them before.

    Everything else is the loader's own. accelerate's loaders say at the last batch that the end is
    reached, and gathering reads it: they are made to say so when that batch is handed out, not
    when it is read ahead.
    """

    def __init__(self, loader: Any, depth: int, run: Callable[[list[Any]], None]) -> None:
        self._loader = loader
        self._depth = depth
        self._run = run

    def __len__(self) -> int:
        return len(self._loader)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def __iter__(self) -> Iterator[Any]:
        batches = iter(self._loader)
        while chunk := self._next(batches):
            self._run(chunk)
            at_end = self._at_end()
            for left in range(len(chunk), 0, -1):
                if at_end:
                    self._loader.end_of_dataloader = left == 1
                yield chunk[-left]

    def _next(self, batches: Iterator[Any]) -> list[Any]:
        chunk: list[Any] = []
        for batch in batches:
            chunk.append(batch)
            # Asking for one batch more would tell accelerate that the loop is over.
            if len(chunk) == self._depth or self._at_end():
                break
        return chunk

    def _at_end(self) -> bool:
        return bool(getattr(self._loader, "end_of_dataloader", False))
