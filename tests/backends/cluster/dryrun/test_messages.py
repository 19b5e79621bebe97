"""Every message of every rank meets its counterpart, and faults are found by what is wrong."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from ipu_pipeline.backends.cluster.dryrun.messages import (
    Batch,
    Issued,
    counted,
    fake_ranks,
    issued,
    problem,
)
from ipu_pipeline.backends.cluster.layout import torch_schedules
from ipu_pipeline.errors import LoweringError

Ranks = list[list[Issued]]
SHAPES = [
    (kind.name, depth * kind.stages_per_device[-1], depth)
    for kind in torch_schedules()
    for depth in (2, 4)
]


@pytest.mark.parametrize(("name", "stages", "ranks"), SHAPES)
def test_all_messages_of_a_step_meet(name: str, stages: int, ranks: int) -> None:
    found = issued(name, stages, ranks, 2 * stages)
    assert problem(found) == ""
    sent = [one for events in found for e in events if not e.waits for one in e.batch.transfers]
    places = [index for index in range(stages - 1) if one_boundary_is_sent(name, index, ranks)]
    # Forward and back, over every boundary between two ranks, for every microbatch.
    assert sum(one.sends for one in sent) == 2 * len(places) * 2 * stages


def one_boundary_is_sent(name: str, boundary: int, ranks: int) -> bool:
    in_a_v = name in ("zbv", "dualpipev")
    return not (in_a_v and boundary == ranks - 1)


@pytest.mark.acceptance
@pytest.mark.parametrize("depth", [8, 16, 32])
@pytest.mark.parametrize("kind", torch_schedules(), ids=lambda kind: kind.name)
def test_all_messages_of_deep_pipelines_meet(kind: object, depth: int) -> None:
    loops = kind.stages_per_device[-1]  # type: ignore[attr-defined]
    name = kind.name  # type: ignore[attr-defined]
    assert problem(issued(name, depth, depth // loops, 2 * depth)) == ""


def test_bytes_are_those_of_the_tensors() -> None:
    crossing = [
        (torch.empty(3, 5, device="meta", requires_grad=True), torch.empty(7, device="meta"))
    ]
    first, last = issued("1f1b", 2, 2, 4, crossing)
    # A gradient comes back only for what requires one.
    assert counted(first) == {("B", False, 1): (4, 240), ("F", True, 1): (8, 4 * (60 + 28))}
    assert counted(last) == {("B", True, 0): (4, 240), ("F", False, 0): (8, 4 * (60 + 28))}


def without(ranks: Ranks, rank: int, *, sends: bool) -> Ranks:
    """Leave out the first message of a rank in one direction."""
    lost = next(e.batch for e in ranks[rank] if e.batch.transfers[0].sends is sends)
    return [[e for e in events if e.batch is not lost] for events in ranks]


def another_size(ranks: Ranks) -> Ranks:
    at = next(i for i, event in enumerate(ranks[0]) if not event.waits)
    one = ranks[0][at].batch.transfers[0]
    wrong = one._replace(message=one.message._replace(num_bytes=3))
    ranks[0][at] = Issued(Batch((wrong,)), waits=False)
    return ranks


def swapped(ranks: Ranks) -> Ranks:
    """Send the second message before the first."""
    first, second = [
        i for i, e in enumerate(ranks[0]) if not e.waits and e.batch.transfers[0].sends
    ][:2]
    row = ranks[0]
    row[first], row[second] = row[second], row[first]
    return ranks


def both_send_first(_: Ranks) -> Ranks:
    """Let two ranks wait for their sends before they receive."""
    found = issued("1f1b", 2, 2, 2)
    rows = []
    for events in found:
        parts = [one for e in events if not e.waits for one in e.batch.transfers]
        ordered = sorted(parts, key=lambda one: not one.sends)
        batches = [Batch((one,)) for one in ordered]
        rows.append([Issued(batch, waits=w) for batch in batches for w in (False, True)])
    return rows


FAULTS: dict[str, tuple[Callable[[Ranks], Ranks], str]] = {
    "no receive": (
        lambda ranks: without(ranks, 1, sends=False),
        "rank 0 sends activation 0 of microbatch 0 .* when rank 1 receives activation 0 of microb",
    ),
    "no last send": (
        lambda ranks: [ranks[0], [e for e in ranks[1] if not last_gradient(e)]],
        "rank 0 waits for gradient 0 of microbatch 3 between .*, rank 1 never sends it",
    ),
    "no last receive": (
        lambda ranks: [[e for e in ranks[0] if not last_gradient(e)], ranks[1]],
        "rank 1 sends gradient 0 of microbatch 3 .*, rank 0 never receives it",
    ),
    "another size": (another_size, r"\(3 bytes\) when rank 1 receives"),
    "another order": (swapped, "sends activation 0 of microbatch 1 .* receives .* microbatch 0"),
    "a deadlock": (
        both_send_first,
        "2 ranks wait for each other: rank 0 waits to send activation 0 .* to rank 1; rank 1 waits",
    ),
}


def last_gradient(event: Issued) -> bool:
    return any(
        one.message.kind == "B" and one.message.microbatch == 3 for one in event.batch.transfers
    )


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named(fault: str) -> None:
    change, message = FAULTS[fault]
    assert re.search(message, problem(change(issued("gpipe", 2, 2, 4))))


def test_a_process_of_a_job_is_no_place_for_a_dry_run() -> None:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        with pytest.raises(LoweringError, match="a dry run needs a process of its own"):
            issued("1f1b", 2, 2, 2)
    finally:
        dist.destroy_process_group()
    with fake_ranks(3, 1024):
        assert dist.get_rank() == 3
    assert not dist.is_initialized()


def test_what_torch_cannot_run_is_refused() -> None:
    with pytest.raises(LoweringError, match="runs one stage per process"):
        issued("1f1b", 4, 2, 4)
