"""Optimizer state divided among replicas: every parameter is updated by one process of the job.

All processes that hold a parameter would compute the same update from the same gradients, and
keep the same optimizer state for it. Divided (``replicated_tensor_sharding``; stage 1 of ZeRO,
Rajbhandari et al., SC 2020, parameter by parameter), gradients are summed to one of them; it
updates the parameter and sends it to the others, which then have the very bits it has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn

from ipu_pipeline.backends.cluster.buckets import buckets, exchange, joined, spread
from ipu_pipeline.backends.cluster.groups import Groups
from ipu_pipeline.backends.cluster.ownership import Ownership, Place


def sharded(
    ownership: Ownership,
    parameters: Sequence[nn.Parameter],
    num_replicas: int,
    trains: Callable[[nn.Parameter], bool],
) -> Ownership:
    """Choose the process that updates each parameter: the holder with the least to do so far.

    Larger parameters are given away first. No process then gets more than its share and one
    parameter (Graham, SIAM J. Appl. Math. 1969), where all parameters have the same holders.

    Args:
        ownership: Who holds what.
        parameters: Of the model, each once, in the same order on every process.
        num_replicas: Copies of the pipeline.
        trains: Whether a parameter has optimizer state; the others are shared out after these.
    """
    load: dict[Place, int] = {}
    updaters: dict[int, Place] = {}
    for parameter in sorted(parameters, key=lambda p: (not trains(p), -p.numel())):
        positions = ownership.holders.get(id(parameter), (0,))
        places = [Place(r, position) for r in range(num_replicas) for position in positions]
        place = min(places, key=lambda p: (load.get(p, 0), p))
        updaters[id(parameter)] = place
        load[place] = load.get(place, 0) + parameter.numel()
    return replace(ownership, updaters=updaters)


@torch.no_grad()
def sum_to_updaters(
    parameters: Iterable[nn.Parameter], ownership: Ownership, groups: Groups
) -> None:
    """Sum gradients over the replicas, each to the process that needs it.

    Elsewhere a gradient only says afterwards that there is one; its values mean nothing.

    Args:
        parameters: Held here, with a gradient, the same in every replica.
        ownership: Who updates what.
        groups: The processes.
    """
    gradients: dict[int, list[Tensor]] = {}
    for parameter in parameters:
        replica, position = ownership.updaters[id(parameter)]
        if position == ownership.here.position and parameter.grad is not None:
            gradients.setdefault(replica, []).append(parameter.grad)
    _exchange(gradients, groups.start_reduce, groups, lambda r: r == ownership.here.replica)


@torch.no_grad()
def share_updated(parameters: Sequence[nn.Parameter], ownership: Ownership, groups: Groups) -> None:
    """Give every holder what the updating process has made of a parameter.

    Args:
        parameters: Held here and updated somewhere, the same in every replica.
        ownership: Who updates what.
        groups: The processes.
    """
    here = ownership.here
    values: dict[int, list[Tensor]] = {}
    tied: dict[tuple[tuple[int, ...], int], list[Tensor]] = {}
    for parameter in parameters:
        replica, position = ownership.updaters[id(parameter)]
        if position == here.position:
            values.setdefault(replica, []).append(parameter.detach())
        if positions := ownership.shared(parameter):
            tied.setdefault((positions, position), []).append(parameter.detach())
    _exchange(values, groups.start_broadcast, groups, lambda r: r != here.replica)
    for (positions, position), tensors in sorted(tied.items(), key=lambda item: item[0]):
        exchange(tensors, lambda m, at=(positions, position): groups.from_holder(m, *at))  # type: ignore[misc]


def _exchange(
    tensors: Mapping[int, Sequence[Tensor]],
    start: Callable[[Tensor, int], Any],
    groups: Groups,
    is_receiver: Callable[[int], bool],
) -> None:
    """Run a collective for every replica's tensors; a message of each is under way at a time."""
    num_replicas = groups.layout.num_replicas
    for turn in zip_longest(*(buckets(tensors.get(r, ())) for r in range(num_replicas))):
        messages = [(r, bucket, joined(bucket)) for r, bucket in enumerate(turn) if bucket]

        def run(messages: list[Any] = messages) -> None:
            for work in [start(message, replica) for replica, _, message in messages]:
                work.wait()

        groups.waiter.run(run)
        for replica, bucket, message in messages:
            if is_receiver(replica):
                spread(message, bucket)
