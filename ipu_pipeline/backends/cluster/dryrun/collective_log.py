"""Which operations of ``torch.distributed`` a rank calls, with the bytes of each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch.distributed as dist
from torch.distributed._tools.fake_collectives import CollectiveOp, collective_ops, sync_ops
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

_SENT, _RECEIVED = "send", "recv"


class CollectiveLog(TorchDispatchMode):
    """Counts calls by operation and group; messages by the peer's rank in the job.

    Attributes:
        found: Number and bytes by operation and by what the group, or the peer, is called.
    """

    def __init__(self, groups: Mapping[str, dist.ProcessGroup]) -> None:
        super().__init__()
        self._names = {tuple(dist.get_process_group_ranks(g)): n for n, g in groups.items()}
        self._numbers: Counter[tuple[str, str]] = Counter()
        self._bytes: Counter[tuple[str, str]] = Counter()

    @property
    def found(self) -> dict[tuple[str, str], tuple[int, int]]:
        """Calls and bytes by operation, and group or peer."""
        return {key: (self._numbers[key], self._bytes[key]) for key in sorted(self._numbers)}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(found, DTensor) for found in types):
            return NotImplemented  # it then shows what it does on this rank
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func in collective_ops and func not in sync_ops:
            name = func.overloadpacket.__name__.rstrip("_")
            group = CollectiveOp.get_process_group(func, args)
            ranks = dist.get_process_group_ranks(group)
            whom = self._names.get(tuple(ranks), f"{len(ranks)} ranks")
            if name in (_SENT, _RECEIVED):
                whom = f"rank {ranks[args[2]]}"
            self._numbers[name, whom] += 1
            self._bytes[name, whom] += CollectiveOp.get_comm_tensor_size(func, result, args, kwargs)
        return result
