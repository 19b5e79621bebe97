"""Bytes of the storages that are alive while code runs, and their peak.

A storage counts from the operation that made it to the moment its last reference goes. Tensors
without data have the same lifetimes as real ones, so a run on them measures the real peak, except
for buffers inside a kernel, which no operation returns.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable

import torch
from torch import Tensor

from ipu_pipeline.capture.storage import storage_key


class LiveBytes:
    """Adds up living storages.

    Args:
        apart: Tensors whose storages are counted elsewhere (parameters, inputs).

    Attributes:
        now: Bytes alive now.
        peak: Most bytes alive at one time since the last :meth:`take_peak`.
    """

    def __init__(self, apart: Iterable[Tensor]) -> None:
        self.now = 0
        self.peak = 0
        # Held, not only their keys: the key of a freed storage is given to a new one.
        self._apart = {storage_key(t): t.untyped_storage() for t in apart}
        self._alive: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def note(self, tensors: Iterable[Tensor]) -> None:
        """Count the storages of ``tensors`` that are new."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            key = int(storage._cdata)
            if key not in self._apart and key not in self._alive:
                self._add(key, storage)
        self.peak = max(self.peak, self.now)

    def take_peak(self) -> int:
        """Return the peak and start again from what is alive now."""
        peak, self.peak = self.peak, self.now
        return peak

    def is_apart(self, tensor: Tensor) -> bool:
        """Whether ``tensor`` is, or is a view of, one that is counted elsewhere."""
        return storage_key(tensor) in self._apart

    def _add(self, key: int, storage: torch.UntypedStorage) -> None:
        num_bytes = int(storage.nbytes())

        def gone(_: object) -> None:
            self.now -= num_bytes
            del self._alive[key]

        self._alive[key] = weakref.ref(storage, gone)
        self.now += num_bytes
