"""Bytes that are alive, by what they are for, while a rank's step runs on tensors without data.

torch's own ``MemTracker`` tells kinds apart by hooks on modules, which assume that one microbatch
is forward or backward at a time; in a pipeline several are.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ipu_pipeline.capture.values import storage_key, storage_of

WEIGHTS, GRADIENTS, OPTIMIZER = "weights", "gradients", "optimizer state"
ACTIVATIONS, TEMPORARY = "activations", "temporary"
KINDS = (WEIGHTS, GRADIENTS, OPTIMIZER, ACTIVATIONS, TEMPORARY)


class MemoryTally(TorchDispatchMode):
    """Adds up living storages of ``meta`` by kind, and keeps the moment with the most of all.

    What an operation makes is of the kind that :meth:`making` says; a gradient of ``parameters`` is
    one as soon as autograd has added it up.

    Attributes:
        now: Bytes by kind.
        peak: The same at the moment with most bytes.
        most: Most bytes of every kind at one time.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()
        self.most: Counter[str] = Counter()
        self._kind = ACTIVATIONS
        self._alive: dict[int, tuple[str, int, Any]] = {}

    @contextmanager
    def making(self, kind: str) -> Iterator[None]:
        """Within it, new storages are of this kind."""
        before, self._kind = self._kind, kind
        try:
            yield
        finally:
            self._kind = before

    def start(self) -> None:
        """Forget what was most before."""
        self.peak, self.most = self.now.copy(), self.now.copy()

    def hold(self, tensors: Iterable[Tensor], kind: str) -> None:
        """Count the storages of ``tensors`` as of this kind from now on."""
        for tensor in tensors:
            self._count(local(tensor), kind)
        self._note_peak()

    def follow(self, parameters: Iterable[nn.Parameter]) -> None:
        """Count what autograd leaves in ``.grad`` of these parameters as gradients."""
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(self._accumulated)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(found, DTensor) for found in types):
            return NotImplemented  # it then shows what it does on this rank
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor) and value.is_meta:
                key = storage_key(value)
                if key not in self._alive:
                    self._add(key, value, self._kind)
        self._note_peak()
        return result

    def _accumulated(self, parameter: Tensor) -> None:
        if parameter.grad is not None:
            self._count(local(parameter.grad), GRADIENTS)

    def _count(self, tensor: Tensor, kind: str) -> None:
        if not tensor.is_meta:
            return
        key = storage_key(tensor)
        found = self._alive.get(key)
        if found is None:
            self._add(key, tensor, kind)
        elif found[0] != kind:
            before, num_bytes, reference = found
            self.now[before] -= num_bytes
            self.now[kind] += num_bytes
            self._alive[key] = (kind, num_bytes, reference)

    def _add(self, key: int, tensor: Tensor, kind: str) -> None:
        storage = storage_of(tensor)

        def gone(_: object) -> None:
            kind, num_bytes, _ref = self._alive.pop(key)
            self.now[kind] -= num_bytes

        num_bytes = int(storage.nbytes())
        self._alive[key] = (kind, num_bytes, weakref.ref(storage, gone))
        self.now[kind] += num_bytes

    def _note_peak(self) -> None:
        for kind, num_bytes in self.now.items():
            if num_bytes > self.most[kind]:
                self.most[kind] = num_bytes
        if self.now.total() > self.peak.total():
            self.peak = self.now.copy()


def local(tensor: Tensor) -> Tensor:
    """Return this rank's part of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()
