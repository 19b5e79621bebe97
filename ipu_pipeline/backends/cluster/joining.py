"""How the processes of a job find each other, also after torchrun has started them again."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterator, Sequence

from torch.distributed.distributed_c10d import Store

from ipu_pipeline.errors import LoweringError

_POLL_S = 0.02


def meet(store: Store, rank: int, world_size: int, timeout_s: float) -> str:
    """Return a name that only the processes that are here now agree on. All of them call this.

    Torchrun's agent keeps its store while it starts the processes again (torch 2.13), so a rank
    could find the addresses of processes that are gone. Its count of restarts is no name: agents
    count by themselves. So everybody shows a number made just now, and the first rank answers all
    numbers with a name until everybody has seen its own among them.

    Raises:
        LoweringError: Not all came within ``timeout_s``.
    """
    own = uuid.uuid4().hex
    store.set(f"here/{rank}", own)
    for _ in _tries(timeout_s):
        if rank == 0:
            here = [_read(store, f"here/{other}") for other in range(world_size)]
            store.set("answer", json.dumps([own, here]))
            absent = [r for r in range(1, world_size) if _read(store, f"seen/{r}") != own]
            if not absent:
                return own
        else:
            absent = [0]
            name, here = json.loads(_read(store, "answer") or '["", []]')
            if own in here:
                store.set(f"seen/{rank}", name)
                return str(name)
    raise LoweringError(_not_here(absent, rank, timeout_s))


def _not_here(absent: Sequence[int], rank: int, timeout_s: float) -> str:
    names = ", ".join(map(str, absent[:8])) + (", ..." if len(absent) > 8 else "")
    return (
        f"rank {rank} has waited {timeout_s:.0f} s for rank {names} to compile the model; see "
        "what that rank says, and whether all were started with one address and world size"
    )


def _tries(timeout_s: float) -> Iterator[None]:
    until = time.monotonic() + timeout_s
    yield
    while time.monotonic() < until:
        time.sleep(_POLL_S)
        yield


def _read(store: Store, key: str) -> str:
    return store.get(key).decode() if store.check([key]) else ""
