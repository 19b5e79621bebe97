"""How the processes of a job find each other, and what they tell each other through the store."""

from __future__ import annotations

import contextlib
import os
import time
import uuid
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from ipu_pipeline.backends.cluster.launch.spec import SECRET_VARIABLE, STORE_VARIABLE
from ipu_pipeline.backends.cluster.ranks.signature import Signature, SignedStore
from ipu_pipeline.backends.cluster.ranks.waiting import Waiter
from ipu_pipeline.errors import LoweringError

T = TypeVar("T")
# The first rank's number, and those that it has found.
_Answer = tuple[str, list[str | None]]
# What torchrun sets, and what the rendezvous of ``env://`` reads.
ENVIRONMENT = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_POLL_S = 0.02
# What the processes that are here now call themselves; nothing where the caller has joined them.
_met: list[str] = []


def join_processes(device: torch.device, timeout_s: float) -> bool:
    """Make sure that there is a default process group; return whether it was made here.

    Raises:
        LoweringError: The script was not started by torchrun or something like it, or not all
            processes came.
    """
    if dist.is_initialized():
        return False
    missing = [name for name in ENVIRONMENT if name not in os.environ]
    if missing:
        raise LoweringError(
            f"the distributed target runs in processes that torchrun starts, but "
            f"{', '.join(missing)} is not set; start the script with "
            "'torchrun --nproc-per-node N script.py', or with "
            "'ipu-pipeline launch plan.json -- script.py'"
        )
    backend = "gloo"
    if device.type != "cpu":  # objects and sums of numbers go over the CPUs
        torch.accelerator.set_device_index(device)
        backend = f"cpu:gloo,{device.type}:{dist.get_default_backend_for_device(device)}"
    timeout = timedelta(seconds=timeout_s)
    shared, rank, world_size = _store_and_place(timeout)
    _met.append(meet(shared, rank, world_size, timeout_s))
    store = PrefixStore(_met[-1], shared)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    return True


def _store_and_place(timeout: timedelta) -> tuple[Store, int, int]:
    """Return the store of all processes, this one's rank, and their number."""
    where = os.environ.get(STORE_VARIABLE)
    if where is None:
        return next(rendezvous("env://", timeout=timeout))
    host, _, port = where.rpartition(":")
    store = dist.TCPStore(  # type: ignore[attr-defined]
        host, int(port), is_master=False, timeout=timeout
    )
    return store, int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def meet(store: Store, rank: int, world_size: int, timeout_s: float) -> str:
    """Return a name that only the processes that are here now agree on. All of them call this.

    Torchrun's agent keeps its store while it starts the processes again (torch 2.13), so a rank
    could find the addresses of processes that are gone. Its count of restarts is no name: agents
    count by themselves. So everybody shows a number made just now, and the first rank answers all
    numbers with a name until everybody has seen its own among them.

    Raises:
        LoweringError: Not all came within ``timeout_s``, or a message is not of this job.
    """
    own, board = uuid.uuid4().hex, SignedStore(store, "meeting")
    board.set(f"here/{rank}", own)
    until = time.monotonic() + timeout_s
    while True:
        if rank == 0:
            here = [_shown(board, f"here/{other}", str, other) for other in range(world_size)]
            board.set("answer", [own, here])
            absent = [r for r in range(1, world_size) if board.get(f"seen/{r}", str) != own]
            if not absent:
                return own
        else:
            absent = [0]
            name, here = _shown(board, "answer", _Answer, 0) or ("", [])
            if own in here:
                board.set(f"seen/{rank}", name)
                return name
        if time.monotonic() >= until:
            break
        time.sleep(_POLL_S)
    names = ", ".join(map(str, absent[:8])) + (", ..." if len(absent) > 8 else "")
    raise LoweringError(
        f"rank {rank} has waited {timeout_s:.0f} s for rank {names} to compile the model; see "
        "what that rank says, and whether all were started with one address and world size"
    )


def scope_of(name: str) -> str:
    """Return where messages under ``name`` count: among the processes that are here now."""
    return "/".join([*_met[-1:], name])


class StoreGather:
    """All-gathers through the store; every rank makes the same ones in the same order.

    A collective of a process group belongs to the thread that trains: one from another thread
    would pair with the wrong one elsewhere, and none can be given up when a rank is gone. Only
    this object uses ``store``, in one thread.

    A message is plain data (msgpack), never pickled: whoever reaches the store can run nothing
    here. Where the job has a secret, a message without its signature is refused.

    Args:
        store: For these messages only.
        rank: Of this process.
        world_size: How many there are.
        waiter: Says when to give up.
        scope: Where the messages count.
    """

    def __init__(
        self, store: Store, rank: int, world_size: int, waiter: Waiter, scope: str = ""
    ) -> None:
        self.rank = rank
        self.waiter = waiter
        self._store = store
        self._world_size = world_size
        self._signature = Signature(scope)
        self._count = 0

    def gather(self, value: Any, kind: Any = Any) -> list[Any]:
        """Return the values of all processes, by rank; ranks may take as long as they need.

        Args:
            value: Plain data: texts, numbers, lists and mappings. A tuple arrives as a list, a
                path as its text.
            kind: Type of each; another one is refused.

        Raises:
            GivenUp: Some rank has failed.
            LoweringError: A message is not of this job.
            TypeError: ``value`` is no plain data.
        """
        self._count += 1
        body = msgspec.msgpack.encode(value, enc_hook=_path_as_text)
        key = f"{self._count}/{self.rank}"
        self._store.set(key, self._signature.signed(key, body))  # type: ignore[arg-type]
        found = []
        with self.waiter.activity.waits():
            for rank in range(self._world_size):
                while not self._store.check([f"{self._count}/{rank}"]):
                    self.waiter.give_up_after_failure()
                    time.sleep(_POLL_S)
                found.append(self._opened(f"{self._count}/{rank}", rank, kind))
        # Who takes part in this all-gather has read the one before.
        self._store.delete_key(f"{self._count - 1}/{self.rank}")
        return found

    def _opened(self, key: str, rank: int, kind: Any) -> Any:
        body = self._signature.opened(key, self._store.get(key))
        with contextlib.suppress(msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            if body is not None:
                return msgspec.msgpack.decode(body, type=kind)
        raise _not_this_jobs(rank)


def _shown(board: SignedStore, key: str, kind: Any, rank: int) -> Any:
    """Return what ``rank`` shows; ``None`` as long as it shows nothing."""
    there = board.holds(key)
    found = board.get(key, kind)
    if there and found is None:
        raise _not_this_jobs(rank)
    return found


def _not_this_jobs(rank: int) -> LoweringError:
    return LoweringError(
        f"the message of rank {rank} in the job's store is not this job's: another program "
        f"writes there, or the ranks have different {SECRET_VARIABLE}; start the job again, "
        "where nobody else reaches its port"
    )


def gather_over(
    group: dist.ProcessGroup | None, value: Any, kind: Any = Any, device: str | torch.device = "cpu"
) -> list[Any]:
    """Return the plain data of all ranks of a process group, by rank; as in a collective of torch.

    Like :class:`StoreGather` it pickles nothing, but it belongs to the thread that trains.

    Raises:
        LoweringError: A message is not of type ``kind``.
        TypeError: ``value`` is no plain data.
    """
    body = bytearray(msgspec.msgpack.encode(value, enc_hook=_path_as_text))
    count = dist.get_world_size(group)
    sizes = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(count)]
    dist.all_gather(sizes, torch.tensor([len(body)], device=device), group=group)
    longest = max(int(size) for size in sizes)
    own = torch.frombuffer(body.ljust(longest, b"\0"), dtype=torch.uint8).to(device)
    parts = [torch.empty_like(own) for _ in range(count)]
    dist.all_gather(parts, own, group=group)
    found = []
    for rank, (part, size) in enumerate(zip(parts, sizes, strict=True)):
        try:
            text = part[: int(size)].cpu().numpy().tobytes()
            found.append(msgspec.msgpack.decode(text, type=kind))
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise LoweringError(
                f"the message of rank {rank} is not what ranks tell each other ({error}); start "
                "the job again with one version on all machines, where nobody else reaches it"
            ) from error
    return found


def _path_as_text(value: Any) -> str:
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"ranks tell each other plain data only, got {type(value).__name__}")
