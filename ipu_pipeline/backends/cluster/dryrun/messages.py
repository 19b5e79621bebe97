"""Every message of every rank of a pipeline, as torch's schedule class issues it, and its match.

torch's own class runs once per rank, over stages that compute nothing, in a fake process group.
What it sends, receives and waits for is recorded. :func:`problem` then lets all ranks run against
each other: a send ends when its receive has begun, as in nccl, whatever a backend would buffer.
"""

from __future__ import annotations

import sys
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist

# Registers what operations of torch.distributed do to tensors without data.
import torch.distributed._tools.fake_collectives
import torch.distributed.pipelining as torch_pipelining
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, schedules
from torch.distributed.pipelining.schedules import PipelineScheduleSingle
from torch.distributed.pipelining.stage import InferenceMode  # type: ignore[attr-defined]
from torch.testing._internal.distributed import fake_pg

from ipu_pipeline.backends.cluster.layout import position_of_stages, torch_schedule
from ipu_pipeline.errors import LoweringError

FAKE = "fake_without_data"


class Message(NamedTuple):
    """One tensor on its way, as the sender and the receiver both describe it.

    Attributes:
        kind: ``F`` for an activation, ``B`` for its gradient.
        boundary: The stage before the boundary that it crosses.
        microbatch: Of one pipeline.
        part: Which of the boundary's tensors.
        num_bytes: Size.
    """

    kind: str
    boundary: int
    microbatch: int
    part: int
    num_bytes: int

    def __str__(self) -> str:
        what = "activation" if self.kind == "F" else "gradient"
        ends = f"{self.boundary} and {self.boundary + 1}"
        return (
            f"{what} {self.part} of microbatch {self.microbatch} between stages {ends} "
            f"({self.num_bytes} bytes)"
        )


class Transfer(NamedTuple):
    """One end of a message: this rank sends it to a peer, or receives it from there."""

    message: Message
    peer: int
    sends: bool


@dataclass(eq=False)
class Batch:
    """Transfers that begin together and end together."""

    transfers: tuple[Transfer, ...]


class Issued(NamedTuple):
    """What a rank does next: begin a batch, or wait until one has ended."""

    batch: Batch
    waits: bool


@contextmanager
def fake_ranks(rank: int, world_size: int) -> Iterator[None]:
    """Be one rank of a job in a process group that does nothing.

    Raises:
        LoweringError: This process is part of a real job.
    """
    if dist.is_initialized():
        raise LoweringError(
            "this process belongs to a job of torch.distributed already; a dry run needs a process "
            "of its own: start it without torchrun"
        )
    if not hasattr(dist.Backend, FAKE.upper()):
        # Torch's own is not registered for tensors without data.
        dist.Backend.register_backend(
            FAKE, fake_pg._create_fake_pg, extended_api=True, devices=["cpu", "meta"]
        )
    hook = sys.excepthook  # torch puts its own before it, which writes the rank
    dist.init_process_group(FAKE, store=fake_pg.FakeStore(), rank=rank, world_size=world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()
        sys.excepthook = hook


class AgreedSizes:
    """A part of torch's stage: all ranks know the sizes, and need no message to agree on that."""

    _inference_mode: Any

    def _warmup_forward_vote(self, *_: Any, **__: Any) -> Tensor:
        return torch.ones(())

    def _warmup_backward_result(self, *_: Any, **__: Any) -> Tensor:
        self._inference_mode = InferenceMode.STATIC
        return torch.ones(())


class _HollowStage(AgreedSizes, PipelineStage):
    """Torch's stage without a model: all that it does is what it sends and receives."""

    def __init__(
        self, index: int, num_stages: int, received: Sequence[Tensor], sent: Sequence[Tensor]
    ) -> None:
        super().__init__(
            nn.Identity(), index, num_stages, torch.device("meta"),
            input_args=tuple(received), output_args=tuple(sent),
        )  # fmt: skip
        self._outputs = tuple(sent)
        self._gradients = tuple(t if t.requires_grad else None for t in received)

    def forward_one_chunk(self, fwd_chunk_id: int, *_: Any, **__: Any) -> Any:
        self.fwd_cache[fwd_chunk_id] = (self._outputs, [])
        return self._outputs

    def backward_one_chunk(self, bwd_chunk_id: int, *_: Any, **__: Any) -> None:
        self.fwd_cache.pop(bwd_chunk_id)
        self.bwd_cache[bwd_chunk_id] = self._gradients

    def backward_weight_one_chunk(self, bwd_chunk_id: int, last_backward: bool = False) -> None:  # noqa: FBT001, FBT002
        pass

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        return self._named(super().get_fwd_recv_ops(fwd_chunk_id), "F", -1, fwd_chunk_id)

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        return self._named(super().get_bwd_recv_ops(bwd_chunk_id), "B", 0, bwd_chunk_id)

    def get_fwd_send_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        return self._named(super().get_fwd_send_ops(fwd_chunk_id), "F", 0, fwd_chunk_id)

    def get_bwd_send_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        return self._named(super().get_bwd_send_ops(bwd_chunk_id), "B", -1, bwd_chunk_id)

    def _named(
        self, operations: list[dist.P2POp], kind: str, before: int, microbatch: int
    ) -> list[dist.P2POp]:
        for part, operation in enumerate(operations):
            num_bytes = operation.tensor.untyped_storage().nbytes()
            found = Message(kind, self.stage_index + before, microbatch, part, num_bytes)
            sends = operation.op is dist.isend
            operation.transfer = Transfer(found, operation.group_peer, sends)  # type: ignore[attr-defined]
        return operations


def _issued_by(
    rank: int,
    name: str,
    positions: Sequence[int],
    crossing: Sequence[Sequence[Tensor]],
    num_microbatches: int,
) -> list[Issued]:
    """Return what one rank of a pipeline sends, receives and waits for in one training step."""
    kind, depth, events = torch_schedule(name), len(positions), list[Issued]()

    def begin(operations: Sequence[Any], desc: str | None = None) -> list[Any]:  # noqa: ARG001
        if not operations:
            return []
        transfers = [operation.transfer for operation in operations]
        # Torch begins several sends, or several receives, one by one.
        mixed = len({one.sends for one in transfers}) > 1
        groups = [tuple(transfers)] if mixed else [(one,) for one in transfers]
        batches = [Batch(group) for group in groups]
        events.extend(Issued(batch, waits=False) for batch in batches)
        return batches

    def wait(batches: Sequence[Batch]) -> None:
        events.extend(Issued(batch, waits=True) for batch in batches)

    make: Any = getattr(torch_pipelining, kind.torch_class or "")
    patched = mock.patch.multiple(schedules, _batch_p2p=begin, _wait_batch_p2p=wait)
    with fake_ranks(rank, len(set(positions))), patched:
        own = [
            _HollowStage(
                stage,
                depth,
                crossing[stage - 1] if stage else (),
                crossing[stage] if stage + 1 < depth else (torch.zeros((), device="meta"),),
            )
            for stage in range(depth)
            if positions[stage] == rank
        ]
        single = issubclass(make, PipelineScheduleSingle)
        schedule = make(
            own[0] if single else own,
            num_microbatches,
            loss_fn=lambda *_: torch.zeros(()),
            scale_grads=False,
        )
        target = {"target": torch.zeros(num_microbatches), "losses": []}
        has_last = positions[-1] == rank
        schedule.step(return_outputs=False, **(target if has_last else {}))
    return events


def issued(
    name: str,
    num_stages: int,
    num_ranks: int,
    num_microbatches: int,
    crossing: Sequence[Sequence[Tensor]] | None = None,
) -> list[list[Issued]]:
    """Return what every rank of one pipeline issues in one step, in order.

    Args:
        name: A schedule that torch has a class for.
        num_stages: Pipeline depth.
        num_ranks: Ranks of a pipeline.
        num_microbatches: Of one step of one pipeline.
        crossing: Tensors without data that describe what crosses behind every stage but the last;
            ``None``: one number each.

    Raises:
        LoweringError: There is no such schedule, it cannot run so, or this process is part of a
            job.
    """
    positions = position_of_stages(name, num_stages, num_ranks, num_microbatches)
    plain = torch.empty(1, device="meta", requires_grad=True)
    given = [(plain,)] * (num_stages - 1) if crossing is None else crossing
    lowering: Any = {n: _remembered(getattr(schedules, n)) for n in _LOWERING}
    with mock.patch.multiple(schedules, **lowering):
        return [
            _issued_by(rank, name, positions, given, num_microbatches) for rank in range(num_ranks)
        ]


# Every rank computes the rows of all ranks, with these.
_LOWERING = ("_add_unshard_reshard", "_add_send_recv")


def _remembered(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function of rows of actions that computes each result once."""
    known: dict[Any, Any] = {}

    def call(actions: Any, *args: Any, **kwargs: Any) -> Any:
        several = isinstance(actions, dict)
        key = tuple((rank, *row) for rank, row in actions.items()) if several else tuple(actions)
        if key not in known:
            known[key] = function(actions, *args, **kwargs)
        found = known[key]
        return {rank: list(row) for rank, row in found.items()} if several else list(found)

    return call


# ---- do all of them meet? ------------------------------------------------------------------------


@dataclass
class _Rank:
    """A rank that runs against the others.

    Attributes:
        left: Events that it has not come to.
        begun: Batches that are waiting for their turn, by the peer whose stream they are on;
            batches of both directions are on all of theirs.
    """

    left: deque[Issued]
    begun: dict[int, deque[Batch]] = field(default_factory=lambda: defaultdict(deque))
    ended: set[Batch] = field(default_factory=set)

    def advance(self) -> bool:
        """Come to the next wait that is not over; return whether anything was done."""
        before = len(self.left)
        while self.left and not (self.left[0].waits and self.left[0].batch not in self.ended):
            event = self.left.popleft()
            if not event.waits:
                for peer in {one.peer for one in event.batch.transfers}:
                    self.begun[peer].append(event.batch)
        return len(self.left) < before

    def is_first(self, batch: Batch) -> bool:
        """Whether nothing is before ``batch`` on any of its streams."""
        peers = {one.peer for one in batch.transfers}
        return all(self.begun[peer] and self.begun[peer][0] is batch for peer in peers)

    def end(self, batch: Batch) -> None:
        """Take ``batch`` from its streams."""
        for peer in {one.peer for one in batch.transfers}:
            self.begun[peer].popleft()
        self.ended.add(batch)


def problem(ranks: Sequence[Sequence[Issued]]) -> str:
    """Return which message has no counterpart, or where all wait for each other; empty: neither.

    Messages between two ranks are matched in order, as torch matches them, and must then be the
    same ones. They are transferred one after another, in both directions, and only while both ends
    have begun; more streams or buffers than that cannot stop what runs with these.
    """
    unmatched = _unmatched(ranks)
    if unmatched:
        return unmatched
    running = [_Rank(deque(events)) for events in ranks]
    moved = True
    while moved:
        moved = any([rank.advance() for rank in running])
        for number, rank in enumerate(running):
            for peer in list(rank.begun):
                moved |= _transferred(running, number, peer)
    stuck = [number for number, rank in enumerate(running) if rank.left]
    stuck += [n for n, rank in enumerate(running) if not rank.left and any(rank.begun.values())]
    if not stuck:
        return ""
    waiting = "; ".join(_waiting(running[number], number) for number in stuck[:4])
    return f"{len(stuck)} ranks wait for each other: {waiting}"


def _unmatched(ranks: Sequence[Sequence[Issued]]) -> str:
    sent, received = (
        {
            (number, one.peer) if sends else (one.peer, number): [
                other.message
                for event in events
                if not event.waits
                for other in event.batch.transfers
                if other.sends is sends and other.peer == one.peer
            ]
            for number, events in enumerate(ranks)
            for one in {t.peer: t for e in events for t in e.batch.transfers}.values()
        }
        for sends in (True, False)
    )
    for pair in sorted(sent.keys() | received.keys()):
        here, there = sent.get(pair, []), received.get(pair, [])
        source, target = pair
        for one, other in zip(here, there, strict=False):
            if one != other:
                return f"rank {source} sends {one} when rank {target} receives {other}"
        for more, text in ((here[len(there) :], "sends"), (there[len(here) :], "waits for")):
            if more:
                who, whom = (source, target) if text == "sends" else (target, source)
                end = "never receives it" if text == "sends" else "never sends it"
                return f"rank {who} {text} {more[0]}, rank {whom} {end}"
    return ""


def _transferred(running: Sequence[_Rank], number: int, peer: int) -> bool:
    """Let the first batches of a rank and its peer meet, if they are each other's; return if so."""
    here = running[number].begun[peer]
    if not here or not running[number].is_first(here[0]):
        return False
    needed = {number: here[0]}
    pending = [number]
    while pending:  # all whose batch takes part in one of these
        at = pending.pop()
        for one in needed[at].transfers:
            queue = running[one.peer].begun[at]
            if not queue or not running[one.peer].is_first(queue[0]):
                return False
            if one.peer not in needed:
                needed[one.peer] = queue[0]
                pending.append(one.peer)
            elif needed[one.peer] is not queue[0]:
                return False
            counterpart = one._replace(peer=at, sends=not one.sends)
            if counterpart not in queue[0].transfers:
                return False
    for at, batch in needed.items():
        running[at].end(batch)
    return True


def _waiting(rank: _Rank, number: int) -> str:
    batch = rank.left[0].batch if rank.left else next(q[0] for q in rank.begun.values() if q)
    ends = [
        f"to {'send' if one.sends else 'receive'} {one.message} "
        f"{'to' if one.sends else 'from'} rank {one.peer}"
        for one in batch.transfers
    ]
    return f"rank {number} waits {' and '.join(ends)}"


def counted(events: Sequence[Issued]) -> dict[tuple[str, bool, int], tuple[int, int]]:
    """Return number and bytes of a rank's messages by kind, whether it sends them, and peer."""
    numbers, sizes = Counter[Any](), Counter[Any]()
    for event in events:
        for one in () if event.waits else event.batch.transfers:
            key = (one.message.kind, one.sends, one.peer)
            numbers[key] += 1
            sizes[key] += one.message.num_bytes
    return {key: (numbers[key], sizes[key]) for key in sorted(numbers)}
