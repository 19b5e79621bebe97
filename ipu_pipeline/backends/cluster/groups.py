"""Process groups of a layout, and the few collectives that everything else is made of."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._utils import _flatten_dense_tensors, _take_tensors, _unflatten_dense_tensors
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from ipu_pipeline.backends.cluster.layout import Layout
from ipu_pipeline.backends.cluster.ranks.rendezvous import StoreGather

if TYPE_CHECKING:
    from ipu_pipeline.backends.cluster.vocabulary import SpreadVocabulary

# The copy that a message costs stays small beside the weights, its latency beside its transfer.
BUCKET_BYTES = 64 << 20
# DTensor's caches take a mesh of equal names for the one before, whose groups are gone.
_numbers = itertools.count()


class Groups:
    """The process groups of one executable; every wait goes through the waiter of ``ranks``.

    Attributes:
        device: Where tensors have to be for the backend.
        pipeline: The ranks of this replica that compute this rank's slice, one per position.
        replicas: The ranks at this position with this slice, one per replica.
        slices: The ranks that share the products of this position and replica, as a mesh.
        holders: Those of this replica's pipeline that share parameters, by their positions.
        vocabulary: What this process does for a vocabulary that is spread, if one is.
    """

    def __init__(self, layout: Layout, device: torch.device, ranks: StoreGather) -> None:
        self.layout = layout
        self.device = device
        slices = f"tp{next(_numbers)}"
        mesh = init_device_mesh(
            device.type,
            (layout.num_replicas, layout.num_ranks, layout.tp),
            mesh_dim_names=("replica", "pipeline", slices),
        )
        self.world: dist.ProcessGroup | None = dist.group.WORLD
        self.pipeline = mesh.get_group("pipeline")
        self.replicas = mesh.get_group("replica")
        self.slices = mesh[slices]
        # A step that fails leaves messages behind, which the next executable must not receive. On
        # GPUs another group is memory, and such messages stop all that follows on the device.
        if device.type == "cpu" and dist.get_world_size() > 1:
            self.world = dist.new_group()
            if self.pipeline is dist.group.WORLD:
                self.pipeline = self.world
            if self.replicas is dist.group.WORLD:
                self.replicas = self.world
            if self.slices.get_group() is dist.group.WORLD:
                names = (slices,)
                self.slices = DeviceMesh.from_group(self.world, "cpu", mesh_dim_names=names)
        self.ranks = ranks
        self.waiter = ranks.waiter
        self.holders: dict[tuple[int, ...], dist.ProcessGroup] = {}
        self.vocabulary: SpreadVocabulary | None = None
        self._more: list[dist.ProcessGroup] = []

    def make_holders(self, sets: Sequence[tuple[int, ...]]) -> None:
        """Make the groups of positions that share parameters. Every process must call this."""
        layout = self.layout
        for positions, replica, part in itertools.product(
            sets, range(layout.num_replicas), range(layout.tp)
        ):
            ranks = [(replica * layout.num_ranks + p) * layout.tp + part for p in positions]
            group = self.waiter.run(lambda ranks=ranks: dist.new_group(ranks))  # type: ignore[misc]
            if layout.rank in ranks:
                self.holders[positions] = group

    def another_pipeline(self) -> dist.ProcessGroup:
        """Make a group of the ranks of a pipeline, for another thread. Every process calls this."""
        layout = self.layout
        for replica in range(layout.num_replicas):
            ranks = [replica * layout.num_ranks + p for p in range(layout.num_ranks)]
            group = self.waiter.run(lambda ranks=ranks: dist.new_group(ranks))  # type: ignore[misc]
            if layout.rank in ranks:
                self._more.append(group)
        return self._more[-1]

    def sum_in_order(self, tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
        """Return the sum over a group, added in the order of its ranks: the same bits for all."""
        parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
        own = tensor.contiguous()
        self.waiter.run(lambda: dist.all_gather(parts, own, group=group))
        total = parts[0]
        for part in parts[1:]:
            total += part
        return total

    def sum_numbers(
        self, values: Sequence[float], group: dist.ProcessGroup | None = None
    ) -> list[float]:
        """Return the sum of each number over a group, by default over all processes."""
        if not values:
            return []
        own = torch.tensor(values, dtype=torch.float64, device=self.device)
        group = group or self.world
        assert group is not None
        return [float(value) for value in self.sum_in_order(own, group)]

    def sum_over_replicas(self, tensor: Tensor) -> None:
        """Sum ``tensor`` over the replicas, in place."""
        self.waiter.run(lambda: dist.all_reduce(tensor, group=self.replicas))

    def sum_to_replica(self, tensor: Tensor, replica: int) -> None:
        """Sum ``tensor`` over the replicas, for one of them; spoils it on the others."""
        group = self.replicas
        self.waiter.run(lambda: dist.reduce(tensor, group=group, group_dst=replica))

    def broadcast(self, tensor: Tensor, group: dist.ProcessGroup, source: int) -> None:
        """Overwrite ``tensor`` with what it is on a rank of a group."""
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
        self.broadcast(wire, self.pipeline, position)
        with torch.no_grad():
            tensor.copy_(wire.view(tensor.dtype))

    def start_send(self, wire: Tensor, position: int, tag: int = 0) -> Callable[[], object]:
        """Begin to send bytes to a position of this pipeline; return what waits for that."""
        work = dist.isend(wire, group=self.pipeline, tag=tag, group_dst=position)
        assert work is not None
        return partial(self.waiter.run, work.wait)

    def start_receive(self, wire: Tensor, position: int, tag: int = 0) -> Callable[[], object]:
        """Begin to overwrite ``wire`` with bytes from a position; return what waits for them."""
        work = dist.irecv(wire, group=self.pipeline, tag=tag, group_src=position)
        assert work is not None
        return work.wait

    def receive(self, wire: Tensor, position: int) -> None:
        """Overwrite ``wire`` with the next bytes from a position of this pipeline."""
        self.waiter.run(self.start_receive(wire, position))

    def close(self) -> None:
        """Destroy the groups made here. No process may still be using them."""
        slices = self.slices.get_group()
        made = {self.pipeline, self.replicas, slices, *self.holders.values(), *self._more}
        for group in made | {self.world}:
            if group is not dist.group.WORLD:
                dist.destroy_process_group(group)
        self.holders.clear()
        self._more.clear()
        self.vocabulary = None
        del self.world, self.pipeline, self.replicas, self.slices


def exchange(tensors: Iterable[Tensor], message: Callable[[Tensor], Any]) -> None:
    """Send all tensors, joined to few messages, through ``message``, which changes its argument."""
    for bucket in _take_tensors(tensors, BUCKET_BYTES):
        whole = _flatten_dense_tensors(bucket)
        message(whole)
        for tensor, part in zip(bucket, _unflatten_dense_tensors(whole, bucket), strict=True):
            if tensor.data_ptr() != part.data_ptr():
                tensor.copy_(part)
