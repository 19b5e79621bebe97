"""What ranks tell each other through the store, in whatever thread, without a process group.

A collective of a process group belongs to the thread that trains: one from another thread would
pair with the wrong one elsewhere, and none can be given up when a rank is gone.
"""

from __future__ import annotations

import pickle
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch.distributed.distributed_c10d import Store

from ipu_pipeline.backends.cluster.waiting import GivenUp

_POLL_S = 0.02


class Notes:
    """Exchanges values; every rank makes the same exchanges in the same order.

    Args:
        store: Used by this object only.
        rank: Of this process.
        world_size: How many there are.
        failed: Whether some rank has failed, so that it may not answer.
        waits: Entered while others are waited for.
    """

    def __init__(
        self,
        store: Store,
        rank: int,
        world_size: int,
        failed: Callable[[], bool],
        waits: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self.rank = rank
        self.failed = failed
        self._waits = waits
        self._store = store
        self._world_size = world_size
        self._exchanges = 0

    def everyones(self, value: Any) -> list[Any]:
        """Return the values of all processes, by rank; ranks may take as long as they need.

        Raises:
            GivenUp: Some rank has failed.
        """
        self._exchanges += 1
        self._store.set(self._key(self._exchanges, self.rank), pickle.dumps(value))  # type: ignore[arg-type]
        found = []
        with self._waits():
            for rank in range(self._world_size):
                key = self._key(self._exchanges, rank)
                while not self._store.check([key]):
                    self.give_up_after_failure()
                    time.sleep(_POLL_S)
                found.append(pickle.loads(self._store.get(key)))
        # Who takes part in this exchange has read the one before.
        self._store.delete_key(self._key(self._exchanges - 1, self.rank))
        return found

    def give_up_after_failure(self) -> None:
        """Raise if some rank has failed.

        Raises:
            GivenUp: It has.
        """
        if self.failed():
            raise GivenUp("another rank has failed")

    @staticmethod
    def _key(exchange: int, rank: int) -> str:
        return f"{exchange}/{rank}"
