"""Recomputation that changes nothing twice.

The second forward pass of a block starts from what its first one started from: values of the
buffers that it changes (running statistics, the vectors of a spectral norm, queues), plain
attributes of its modules (counters), and the generators of Python that it draws from. Afterwards
they are again what they were before it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor
from torch.nn.modules.batchnorm import _NormBase

from ipu_pipeline.capture.calls import OtherTensors
from ipu_pipeline.capture.programs import Program
from ipu_pipeline.capture.python_state import Generators
from ipu_pipeline.capture.state import PlainState, key_of, values_of


@dataclass
class ReplayedBlock:
    """What the forward passes of one recomputed block change.

    Tensors that none was seen to change have one copy, made when a value is new, so that the
    first change of one is no surprise: in a block that updates an average every tenth step.

    Args:
        program: The block.
    """

    program: Program

    def __post_init__(self) -> None:
        self.modules = list(self.program.module.modules())
        self._generators = Generators(self.modules) if self.program.draws else None
        changing = list(self.program.changing.values())
        for module in self.modules:  # torch does not count these writes
            if isinstance(module, _NormBase) and module.track_running_stats:
                changing += [t for t in (module.running_mean, module.running_var) if t is not None]
        self._changing = {id(tensor): tensor for tensor in changing}
        self._copies: dict[int, tuple[Tensor, int, Tensor]] = {}
        self._first_copies: dict[int, tuple[Tensor, Tensor]] = {}

    def passes(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """Return ``call`` of one microbatch: its first call is the first pass, others replay it."""
        start: list[Callable[[], AbstractContextManager[None]]] = []

        def run(*inputs: Any) -> Any:
            if start:
                with start[0]():
                    return call(*inputs)
            plain = PlainState(self.modules)
            random = self._generators.states() if self._generators else []
            before = [(tensor, tensor.detach().clone()) for tensor in self._changing.values()]
            self._copy_others()
            result = call(*inputs)
            start.append(partial(self._as_before, plain, random, [*before, *self._surprises()]))
            return result

        return run

    def unshared(self, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        """Return ``inputs`` with copies of those that are views of what passes change."""
        changing = {key_of(tensor) for tensor in self.program.changing.values()}
        return tuple(
            value.clone() if isinstance(value, Tensor) and key_of(value) in changing else value
            for value in inputs
        )

    @contextmanager
    def _as_before(
        self, plain: PlainState, random: list[Any], values: list[tuple[Tensor, Tensor]]
    ) -> Iterator[None]:
        newest = PlainState(self.modules)
        drawn = self._generators.states() if self._generators else []
        plain.put_back()
        if self._generators:
            self._generators.put_back(random)
        # Passes that were before the first change of a tensor all saw what it was before that.
        values = list({**self._first_copies, **{id(t): (t, v) for t, v in values}}.values())
        try:
            with values_of([t for t, _ in values], [v.clone() for _, v in values]):
                # Autograd keeps aliases: the tensors themselves get their newest values back.
                aliases = {id(t): t.detach() for t, _ in values if not t.requires_grad}
                with OtherTensors(aliases):
                    yield
        finally:
            newest.put_back()
            if self._generators:
                self._generators.put_back(drawn)

    def _surprises(self) -> list[tuple[Tensor, Tensor]]:
        """Return tensors that were changed for the first time, with their values before."""
        changed = [entry for entry in self._copies.values() if entry[0]._version != entry[1]]
        found = {id(tensor): (tensor, copy) for tensor, _, copy in changed}
        self._changing.update((key, tensor) for key, (tensor, _) in found.items())
        self._first_copies.update(found)
        return list(found.values())

    def _copy_others(self) -> None:
        known, self._copies = self._copies, {}
        for tensor in self.program.module.buffers():
            key, version = id(tensor), tensor._version
            if key not in self._changing:
                entry = known.get(key)
                if entry is None or entry[1] != version:
                    entry = (tensor, version, tensor.detach().clone())
                self._copies[key] = entry
