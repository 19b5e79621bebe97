"""Every rank must be given the same batch: each one compares its own with that of the rank before.

Messages between ranks have the shapes that each derives from its own batch. Another shape would
hang, end the process inside of gloo, or (smaller than expected) go unnoticed. The comparison is one
small message per rank, sent before the step's first activations on their way and checked where
they are waited for, so it is no step of its own for all ranks together.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ipu_pipeline.backends.cluster.groups import Groups

NOTE_BYTES = 256
_DIGEST_BYTES = 8


class SameBatch:
    """Compares what the ranks are given.

    Args:
        groups: The processes.
    """

    def __init__(self, groups: Groups) -> None:
        self._groups = groups
        self._sent: tuple[dist.Work, Tensor] | None = None

    def check(self, call: str, step: int, batch: Mapping[str, Any]) -> None:
        """Compare this call and the shapes of its batch with those of the rank before.

        Every process calls this, before anything in its batch can be refused.

        Raises:
            ValueError: They differ.
        """
        rank, size = dist.get_rank(), dist.get_world_size()
        text = f"{call} in step {step} with {described(batch)}"
        own = _note(text).to(self._groups.device)
        if rank + 1 < size:
            if self._sent is not None:
                self._groups.waiter.run(self._sent[0].wait)
            work = dist.isend(own, dst=rank + 1)
            assert work is not None
            self._sent = (work, own)
        if rank == 0:
            return
        theirs = torch.empty_like(own)
        receiving = dist.irecv(theirs, src=rank - 1)
        assert receiving is not None
        self._groups.waiter.run(receiving.wait)
        if not torch.equal(theirs, own):
            raise ValueError(
                f"rank {rank} was called for {text}, but rank {rank - 1} for {_text(theirs)}; give "
                "every rank the same whole batch (each takes its own part), in the same order"
            )


def described(batch: Mapping[str, Any]) -> str:
    """Return the shapes and types of a batch as text; never fails."""
    return ", ".join(
        f"{name} {'x'.join(map(str, value.shape))} {str(value.dtype).removeprefix('torch.')}"
        if isinstance(value, Tensor)
        else f"{name} {value!r}"
        if isinstance(value, bool | int | float | str | None)
        else f"{name} {type(value).__name__}"
        for name, value in batch.items()
    )


def _note(text: str) -> Tensor:
    """Return a digest of ``text`` and as much of it as fits, shape ``(NOTE_BYTES,)``."""
    data = text.encode()
    digest = hashlib.blake2b(data, digest_size=_DIGEST_BYTES).digest()
    whole = (digest + data)[:NOTE_BYTES].ljust(NOTE_BYTES, b"\0")
    return torch.frombuffer(bytearray(whole), dtype=torch.uint8)


def _text(note: Tensor) -> str:
    data = bytes(note.cpu().numpy()[_DIGEST_BYTES:])
    return data.rstrip(b"\0").decode(errors="replace")
