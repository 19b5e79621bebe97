"""What is known of one shape of microbatch: its captures, and those tried for one microbatch."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from ipu_pipeline.capture.captured import CapturedModel
from ipu_pipeline.capture.glue import Path
from ipu_pipeline.capture.glue_run import GlueRun
from ipu_pipeline.capture.python_state import PythonState
from ipu_pipeline.capture.replay import Differs
from ipu_pipeline.capture.sizes import Sized
from ipu_pipeline.stages.batch import Microbatch
from ipu_pipeline.stages.build import at_sizes
from ipu_pipeline.stages.stage import Stage
from ipu_pipeline.stages.tables import TableUses

Signature = tuple[Any, ...]

# A whole number becomes an input of the graph after so many captures for its sake.
INTEGER_CAPTURES = 3


@dataclass(eq=False)
class StagedProgram:
    """One capture, and its stages.

    ``has_sizes``: Whether it is known to be a program of other sizes as well.
    """

    training: Signature
    captured: CapturedModel
    uses: TableUses
    stages: tuple[Stage, ...]
    has_sizes: bool | None = None


@dataclass(eq=False)
class ShapeVariant:
    """A program for one shape; ``sized``: if that is another one than when it was captured."""

    program: StagedProgram
    sized: Sized | None
    captured: CapturedModel
    stages: tuple[Stage, ...]

    @classmethod
    def of(cls, program: StagedProgram, sized: Sized | None = None) -> ShapeVariant:
        """Make one."""
        if sized is None:
            return cls(program, sized, program.captured, program.stages)
        captured = program.captured.at(sized)
        return cls(program, sized, captured, at_sizes(program.stages, captured))


@dataclass(eq=False)
class ShapeVariants:
    """The captures of one shape, the last used first.

    ``shapes`` are those of the results of a call, of every capture that an argument of it caused.
    """

    found: list[ShapeVariant] = field(default_factory=list)
    shapes: dict[tuple[int, Path], list[Any]] = field(default_factory=dict)

    @property
    def integers(self) -> frozenset[tuple[int, Path]]:
        """Where whole numbers have caused captures enough, and are no sizes."""
        return frozenset(
            place
            for place, shapes in self.shapes.items()
            if len(shapes) >= INTEGER_CAPTURES and all(s == shapes[0] for s in shapes)
        )

    def note(self, variant: ShapeVariant, place: tuple[int, Path] | None) -> None:
        """Note a new capture that is due to the argument at ``place``."""
        if place is not None and place[0] < len(variant.captured.glue.calls):
            call = variant.captured.glue.calls[place[0]]
            self.shapes.setdefault(place, []).append(call.shapes)


@dataclass(eq=False)
class Attempt:
    """The captures that are tried for one microbatch, and what there was before.

    ``is_deep``: what its blocks change is put back as well.
    """

    microbatch: Microbatch
    variants: ShapeVariants
    before: PythonState | None = None
    is_deep: bool = False
    tensors: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    tried: list[ShapeVariant] = field(default_factory=list)
    reason: Differs | None = None
    is_sized: bool = False
    is_captured: bool = False

    @property
    def inputs(self) -> Mapping[str, Any]:
        """The inputs of the model."""
        return self.microbatch.inputs

    def restore(self) -> None:
        """Put back what has changed since it began."""
        assert self.before is not None
        self.before.restore()
        with torch.no_grad():
            for tensor, values in self.tensors.values():
                tensor.copy_(values)

    def prepared(
        self, variant: ShapeVariant, hosts: Mapping[str, Any], run: GlueRun | None = None
    ) -> Prepared:
        """Return the microbatch with the stages of ``variant``, which is now the last used."""
        self.variants.found.remove(variant)
        self.variants.found.insert(0, variant)
        ready = replace(self.microbatch, inputs={**self.inputs, **hosts})
        return Prepared(variant.stages, ready, self, run)


@dataclass(frozen=True)
class Prepared:
    """A microbatch that can run.

    Attributes:
        stages: Those that do what its glue does.
        microbatch: With host values among its inputs.
        attempt: How they were found.
        run: Its glue, where that waits for values of the stages or keeps some of them.
    """

    stages: tuple[Stage, ...]
    microbatch: Microbatch
    attempt: Attempt
    run: GlueRun | None = None


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
