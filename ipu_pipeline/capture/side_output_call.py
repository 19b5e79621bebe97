"""Calls of leaves that return side outputs, and what replays do in their place.

In every step the stage takes a tensor out of the place in which the leaf has put it, and leaves
the place as it was; which tensors of which leaf: :mod:`~ipu_pipeline.capture.side_outputs`.
"""

from __future__ import annotations

import contextlib
import copy
import threading
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from ipu_pipeline.capture.places import (
    LISTS,
    RECORDERS,
    Path,
    PlaceChange,
    changed,
    entries_of,
    place_at,
    put_back,
    recording,
    refill,
    set_entry,
    shown,
)
from ipu_pipeline.capture.values import tensors_in
from ipu_pipeline.errors import GuardError

# Held while a block runs whose side outputs are in a place that other threads reach too.
SHARED_PLACES = threading.RLock()


@dataclass(frozen=True)
class Taken:
    """One side output: a tensor in what a call put in a place."""

    path: Path
    key: Any
    inner: tuple[tuple[Any, Any], ...]


@dataclass(frozen=True)
class Start:
    """How a place was when a call began, at capture.

    Attributes:
        kind: Its class.
        length: Number of entries of a list.
        entries: What was in anything else, nothing in place of tensors.
        plain: Entries that were no tensors and had none.
    """

    kind: type
    length: int
    entries: Mapping[Any, Any]
    plain: frozenset[Any] = frozenset()

    @classmethod
    def of(cls, place: Any, before: Any) -> Start:
        """Describe ``place``, in which ``before`` was."""
        if isinstance(place, LISTS):
            return cls(type(place), len(before), {})
        without = {key: tree_map_only(Tensor, lambda _: None, v) for key, v in before.items()}
        plain = (key for key, value in before.items() if not any(True for _ in tensors_in(value)))
        return cls(type(place), 0, without, frozenset(plain))

    def copied(self, key: Any) -> dict[Any, Any]:
        """Return the entry by its key, if there was one; who gets a list may change it."""
        if key not in self.entries:
            return {}
        value = self.entries[key]
        return {key: copy.copy(value) if isinstance(value, (*LISTS, dict)) else value}


class SideOutputCall(nn.Module):
    """Calls a leaf and returns, beside its result, what it put in places.

    Args:
        function: The leaf, or what calls it.
        leaf: Where the paths begin.
        recorded: Lengths of the recorders' lists at capture.
        taken: What to return.
        given: Path and entry of every tensor that it finds in a place, and its number.
        undone: Path and entry of everything that is put back.
        starts: How these places were.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        leaf: nn.Module,
        *,
        recorded: Mapping[str, int],
        taken: Sequence[Taken],
        given: Sequence[tuple[Path, Any, int]],
        undone: Iterable[tuple[Path, Any]],
        starts: Mapping[Path, Start],
    ) -> None:
        super().__init__()
        self.function = function
        self.recorded = dict(recorded) if any(t.path[:1] == RECORDERS for t in taken) else {}
        self.taken = tuple(taken)
        self.given = tuple(given)
        self.undone: dict[Path, list[Any]] = {}
        for path, key in (*undone, *((path, key) for path, key, _ in given)):
            self.undone.setdefault(path, []).append(key)
        self._starts = {path: starts[path] for path in self.undone}
        self._leaf = (leaf,)  # no part of its own: it is one of ``function``

    def forward(
        self, *args: Any, side_inputs: Sequence[Tensor] = (), **kwargs: Any
    ) -> tuple[Any, tuple[Tensor, ...]]:
        """Call the leaf; return its result and the side outputs.

        Raises:
            GuardError: It does not put there what it did at capture.
        """
        with contextlib.ExitStack() as stack:
            if self.undone:
                stack.enter_context(SHARED_PLACES)
            if self.recorded:
                stack.enter_context(recording(self.recorded))
            places = {path: stack.enter_context(self._isolated(path)) for path in self.undone}
            for path, key, number in self.given:
                set_entry(places[path], key, side_inputs[number])
            recorders = {t.path for t in self.taken} - places.keys()
            places |= {path: place_at(self._leaf[0], path) for path in recorders}
            before = {path: entries_of(place) for path, place in places.items()}
            result = self.function(*args, **kwargs)
            now = {
                (path, change.key): change.value
                for path, place in places.items()
                for change in changed(path, place, before[path])
            }
            return result, tuple(self._tensor(taken, now) for taken in self.taken)

    @contextlib.contextmanager
    def _isolated(self, path: Path) -> Iterator[Any]:
        """Let a place be as it was at capture when the call began; put it back afterwards."""
        start, keys = self._starts[path], self.undone[path]
        place, made = self._place(path, start.kind)
        before = entries_of(place)
        if start.kind in LISTS:
            refill(place, [None] * start.length)
        for key in keys if start.kind not in LISTS else ():
            if (key in start.entries) != (key in before) or key in start.plain:
                put_back(place, key, start.copied(key))
        try:
            yield place
        finally:
            now = entries_of(place) or {}
            if start.kind in LISTS:
                refill(place, before)
            for key in keys if start.kind not in LISTS else ():
                if isinstance(now.get(key), Tensor):  # whoever logs it finds the last one
                    set_entry(place, key, now[key].detach())
                else:
                    put_back(place, key, before)
            if made is not None:
                put_back(*made, {})

    def _place(self, path: Path, kind: type) -> tuple[Any, tuple[Any, Any] | None]:
        """Return a place; a list or dict that the glue makes in every pass may have to be made."""
        if kind in (dict, *LISTS) and path:
            parent, (_, key) = place_at(self._leaf[0], path[:-1]), path[-1]
            entries = entries_of(parent)
            if isinstance(entries, dict) and key not in entries:
                set_entry(parent, key, kind())
                return place_at(self._leaf[0], path), (parent, key)
        return place_at(self._leaf[0], path), None

    def _tensor(self, taken: Taken, now: Mapping[Any, Any]) -> Tensor:
        value = now.get((taken.path, taken.key))
        for access, key in taken.inner:
            try:
                value = access(value, key)
            except (TypeError, KeyError, IndexError, AttributeError):
                value = None
        if not isinstance(value, Tensor):
            raise GuardError(
                f"{type(self._leaf[0]).__name__} put a tensor in {shown(taken.path)} when it was "
                "captured, and none for this batch; capture it again with this batch"
            )
        return value

    def extra_repr(self) -> str:
        """Return what tells this call from others."""
        return f"{[(t.path, t.key) for t in self.taken]}, {self.given}, {sorted(self.recorded)}"


@dataclass(frozen=True)
class RepeatedChanges:
    """What a leaf did to places that the glue reads, to be done again without running it.

    Attributes:
        leaf: Where the paths begin.
        changes: Their values have stand-ins in place of tensors.
        starts: How the places were when the call began.
    """

    leaf: nn.Module
    changes: tuple[PlaceChange, ...]
    starts: Mapping[Path, Start]

    def apply(self) -> None:
        """Put the stand-ins in the places.

        Raises:
            GuardError: A place is not as it was when the call began at capture.
        """
        self._check()
        for change in self.changes:
            value = tree_map_only(Tensor, lambda tensor: tensor, change.value)  # containers anew
            place = place_at(self.leaf, change.path)
            if isinstance(place, LISTS):
                place.append(value)
            else:
                set_entry(place, change.key, value)

    def entries(self) -> Iterator[tuple[int, Any]]:
        """Yield the dicts, by id, and the keys in them in which stages leave the last tensors."""
        for change in self.changes:
            place = place_at(self.leaf, change.path)
            if not isinstance(place, (*LISTS, types.FunctionType)):
                yield id(place if isinstance(place, dict) else vars(place)), change.key

    def _check(self) -> None:
        for path, start in self.starts.items():
            place = place_at(self.leaf, path)
            now = Start.of(place, entries_of(place) or {})
            keys = [change.key for change in self.changes if change.path == path]
            if now.length != start.length or any(
                now.entries.get(key, start) != start.entries.get(key, start)
                if key in start.plain
                else (key in now.entries) != (key in start.entries)
                for key in keys
            ):
                raise GuardError(
                    f"{type(self.leaf).__name__} finds something else in {shown(path)} than when "
                    "the model was captured: empty it in the model's forward pass, or keep what is "
                    "to last from batch to batch in a buffer"
                )
