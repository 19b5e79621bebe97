"""Process groups of a layout, and the few collectives that everything else is made of."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from ipu_pipeline.backends.cluster.layout import Layout
from ipu_pipeline.backends.cluster.rendezvous import StoreGather

# The copy that a message costs stays small beside the weights, its latency beside its transfer.
BUCKET_BYTES = 64 << 20


class Groups:
    """The process groups of one executable.

    Args:
        layout: Who stands where.
        device: Where tensors have to be for the backend.
        ranks: All-gathers of the caller's thread; every wait for another rank goes through its
            waiter.

    Attributes:
        pipeline: The ranks of this replica.
        replicas: The ranks at this position, one per replica.
    """

    def __init__(self, layout: Layout, device: torch.device, ranks: StoreGather) -> None:
        self.layout = layout
        self.device = device
        mesh = init_device_mesh(
            device.type,
            (layout.num_replicas, layout.num_ranks),
            mesh_dim_names=("replica", "pipeline"),
        )
        self.pipeline = mesh.get_group("pipeline")
        self.replicas = mesh.get_group("replica")
        self.ranks = ranks
        self.waiter = ranks.waiter
        self._holders: dict[tuple[int, ...], dist.ProcessGroup] = {}

    def make_holders(self, sets: Sequence[tuple[int, ...]]) -> None:
        """Make the groups of positions that share parameters. Every process must call this."""
        for positions in sets:
            if positions in self._holders:
                continue
            for replica in range(self.layout.num_replicas):
                ranks = [replica * self.layout.num_ranks + position for position in positions]
                group = self.waiter.run(lambda ranks=ranks: dist.new_group(ranks))  # type: ignore[misc]
                if self.layout.rank in ranks:
                    self._holders[positions] = group

    def holders(self, positions: tuple[int, ...]) -> dist.ProcessGroup:
        """Return the group of these positions of this replica's pipeline."""
        return self._holders[positions]

    def sum_in_order(self, tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
        """Return the sum over a group, added in the order of its ranks: the same bits for all."""
        parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
        own = tensor.contiguous()
        self.waiter.run(lambda: dist.all_gather(parts, own, group=group))
        total = parts[0]
        for part in parts[1:]:
            total += part
        return total

    def sum_numbers(self, value: float, group: dist.ProcessGroup | None = None) -> float:
        """Return the sum of a number over a group (default: all processes)."""
        own = torch.tensor([value], dtype=torch.float64, device=self.device)
        return float(self.sum_in_order(own, group or _world()))

    def sum_over_replicas(self, tensor: Tensor) -> None:
        """Sum ``tensor`` over the replicas, in place."""
        self.waiter.run(lambda: dist.all_reduce(tensor, group=self.replicas))

    def start_reduce(self, tensor: Tensor, replica: int) -> dist.Work:
        """Begin to sum ``tensor`` over the replicas, for one of them; spoils it on the others."""
        work = dist.reduce(tensor, group=self.replicas, group_dst=replica, async_op=True)
        assert work is not None
        return work

    def start_broadcast(self, tensor: Tensor, replica: int) -> dist.Work:
        """Begin to overwrite ``tensor`` with what it is in one of the replicas."""
        work = dist.broadcast(tensor, group=self.replicas, group_src=replica, async_op=True)
        assert work is not None
        return work

    def from_holder(self, tensor: Tensor, positions: tuple[int, ...], position: int) -> None:
        """Overwrite ``tensor`` with what it is at one of the positions that share parameters."""
        group, source = self.holders(positions), positions.index(position)
        self.waiter.run(lambda: dist.broadcast(tensor, group=group, group_src=source))

    def any_true(self, flags: Sequence[bool], group: dist.ProcessGroup) -> list[bool]:
        """Return for every flag whether it is set on any process of a group."""
        own = torch.tensor(flags, dtype=torch.uint8, device=self.device)
        self.waiter.run(lambda: dist.all_reduce(own, op=dist.ReduceOp.MAX, group=group))
        return [bool(flag) for flag in own.tolist()]

    def from_position(self, tensor: Tensor, position: int) -> None:
        """Overwrite ``tensor`` with what the process at ``position`` of this pipeline has."""
        wire = tensor.detach().contiguous().to(self.device)
        wire = wire.view(torch.uint8) if wire.dtype == torch.bool else wire
        self.waiter.run(lambda: dist.broadcast(wire, group=self.pipeline, group_src=position))
        with torch.no_grad():
            tensor.copy_(wire.view(tensor.dtype))

    def close(self) -> None:
        """Destroy the groups made here. No process may still be using them."""
        for group in {self.pipeline, self.replicas, *self._holders.values()}:
            if group is not dist.group.WORLD:
                dist.destroy_process_group(group)
        self._holders.clear()
        del self.pipeline, self.replicas

    def of_pipeline(self, value: Any) -> list[Any]:
        """Return the values of the ranks of this pipeline, by position."""
        found: list[Any] = [None] * self.layout.num_ranks
        self.waiter.run(lambda: dist.all_gather_object(found, value, group=self.pipeline))
        return found


# ---- many tensors in few messages ------------------------------------------------------


def buckets(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Yield the tensors in groups of one type, in a fixed order, each group a message long."""
    by_type: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        by_type.setdefault(tensor.dtype, []).append(tensor)
    for members in by_type.values():
        bucket: list[Tensor] = []
        num_bytes = 0
        for tensor in members:
            if bucket and num_bytes + tensor.nbytes > BUCKET_BYTES:
                yield bucket
                bucket, num_bytes = [], 0
            bucket.append(tensor)
            num_bytes += tensor.nbytes
        yield bucket


def joined(bucket: Sequence[Tensor]) -> Tensor:
    """Return the elements of all tensors; those of a single contiguous one are not copied."""
    if len(bucket) == 1:
        return bucket[0].reshape(-1)
    return torch.cat([tensor.reshape(-1) for tensor in bucket])


def spread(message: Tensor, bucket: Sequence[Tensor]) -> None:
    """Write what came back for :func:`joined` tensors into them."""
    parts = message.split([tensor.numel() for tensor in bucket])
    for tensor, part in zip(bucket, parts, strict=True):
        if tensor.data_ptr() != part.data_ptr():
            tensor.copy_(part.view_as(tensor))


def exchange(tensors: Iterable[Tensor], message: Callable[[Tensor], Any]) -> None:
    """Send all tensors through ``message``, which changes its argument in place."""
    for bucket in buckets(tensors):
        whole = joined(bucket)
        message(whole)
        spread(whole, bucket)


def _world() -> dist.ProcessGroup:
    world = dist.group.WORLD
    assert world is not None
    return world
