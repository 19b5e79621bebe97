"""Order that no data edge shows: in-place writes and the reads around them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

Versions = list[tuple[Tensor, int]]


class StorageHistory:
    """Remembers for every storage who wrote it last and who has read it since."""

    def __init__(self) -> None:
        self._writer: dict[int, fx.Node] = {}
        self._readers: dict[int, list[fx.Node]] = defaultdict(list)

    def versions(self, arguments: Any) -> Versions:
        """Return the version counters of all tensors in ``arguments`` before a call."""
        return [(t, t._version) for t in tree_leaves(arguments) if isinstance(t, Tensor)]

    def written(self, before: Versions) -> list[Tensor]:
        """Return the tensors whose storage the call changed."""
        return [tensor for tensor, version in before if tensor._version != version]

    def record(
        self, node: fx.Node, read: Iterable[Tensor], written: list[Tensor]
    ) -> tuple[fx.Node, ...]:
        """Note what ``node`` reads and writes; return the nodes that must run before it."""
        after: dict[fx.Node, None] = {}
        written_keys = {storage_key(tensor) for tensor in written}
        for key in {storage_key(tensor) for tensor in read}:
            if key in self._writer:
                after[self._writer[key]] = None
            if key in written_keys:
                after.update(dict.fromkeys(self._readers.pop(key, [])))
                self._writer[key] = node
            else:
                self._readers[key].append(node)
        after.pop(node, None)
        return tuple(after)


def storage_key(tensor: Tensor) -> int:
    """Return a key that tensors share when they share memory (works without data, too)."""
    return int(tensor.untyped_storage()._cdata)
