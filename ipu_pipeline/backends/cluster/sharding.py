"""Which process holds, updates and keeps the optimizer state of which parameter; sums over ranks.

A position of the pipeline holds the parameters of its stages; a tied one has several holders. With
``replicated_tensor_sharding`` every parameter is updated by one process of the job (stage 1 of
ZeRO, Rajbhandari et al., SC 2020, parameter by parameter): gradients are summed to it; it updates
the parameter and sends it to the others, which then have the very bits it has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from safetensors.torch import load, save
from torch import Tensor, nn

from ipu_pipeline.backends.cluster.groups import Groups, exchange
from ipu_pipeline.backends.cluster.layout import Layout
from ipu_pipeline.backends.cluster.row_slices import RowPlan
from ipu_pipeline.checkpoint.slices import UNCUT, Slices
from ipu_pipeline.errors import LoweringError
from ipu_pipeline.ir.codec import Count
from ipu_pipeline.ops.master_weights import MasterWeights
from ipu_pipeline.stages.stage import Stage
from ipu_pipeline.stages.training import UpdateResult, apply_update, total_norm_of


class Place(NamedTuple):
    """A process: which pipeline, and where in it. Places sort as ranks do."""

    replica: int
    position: int


@dataclass(frozen=True)
class Ownership:
    """Who holds what. What no stage uses belongs to the first position.

    Attributes:
        holders: Positions that use a parameter or buffer, ascending, by its ``id``; the first
            is its owner.
        here: This process.
        cut: Those of which every position that uses them has rows of its own, by ``id``.
        updaters: The one process that keeps the optimizer state of a parameter and updates it,
            by ``id``; empty: every holder in every replica does.
    """

    holders: Mapping[int, tuple[int, ...]]
    here: Place
    updaters: Mapping[int, Place] = field(default_factory=dict)
    cut: frozenset[int] = frozenset()

    def owner(self, tensor: Tensor) -> int:
        """Return the position whose copy counts."""
        return self.holders.get(id(tensor), (0,))[0]

    def is_held(self, tensor: Tensor) -> bool:
        """Whether this process trains ``tensor``."""
        return self.here.position in self.holders.get(id(tensor), (0,))

    def is_updated(self, tensor: Tensor) -> bool:
        """Whether this process keeps the optimizer state of ``tensor`` and updates it."""
        return self.is_chief(tensor) if self.updaters else self.is_held(tensor)

    def is_chief(self, tensor: Tensor) -> bool:
        """Whether this process alone counts where ``tensor`` must count once in the whole job."""
        if id(tensor) in self.cut:
            return self.here.replica == 0 and self.is_held(tensor)
        return self.here == self.updaters.get(id(tensor), Place(0, self.owner(tensor)))

    def held(self, model: nn.Module) -> list[nn.Parameter]:
        """Return the trainable parameters that this process holds, each once."""
        return [p for p in model.parameters() if p.requires_grad and self.is_held(p)]

    def shared(self, tensor: Tensor) -> tuple[int, ...]:
        """Return the positions that hold all of ``tensor``, if there are several."""
        if id(tensor) in self.cut:
            return ()
        found = self.holders.get(id(tensor), (0,))
        return found if len(found) > 1 else ()


def find_ownership(
    stages: Sequence[Stage],
    layout: Layout,
    rows: RowPlan | None = None,
    named: Mapping[str, Tensor] | None = None,
) -> Ownership:
    """Return who holds what under a split; ``rows``: of which tensors, by name, rows are spread."""
    positions: dict[int, set[int]] = {}
    for stage in stages:
        tensors: list[Tensor] = [share.table.parameter for share in stage.row_shards]
        for program in stage.programs:
            tensors += [*program.module.parameters(), *program.module.buffers()]
        for tensor in tensors:
            positions.setdefault(id(tensor), set()).add(layout.positions[stage.index])
    cut: set[int] = set()
    if rows is not None and named is not None:
        cut = {id(named[name]) for name in rows.tables}
        positions.update((key, set(rows.rows)) for key in cut)
        for name in rows.biases:
            positions.setdefault(id(named[name]), set()).update(rows.rows)
    return Ownership(
        {key: tuple(sorted(found)) for key, found in positions.items()},
        Place(layout.replica, layout.position),
        cut=frozenset(cut),
    )


class OwnParameters:
    """The user's optimizer, cut down to the parameters that this process updates."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self._all: list[list[nn.Parameter]] = [list(g["params"]) for g in optimizer.param_groups]
        self._ids = {id(parameter) for members in self._all for parameter in members}

    def keep(self, ownership: Ownership) -> None:
        """Drop every parameter that is not updated here, with its state."""
        for group, members in zip(self.optimizer.param_groups, self._all, strict=True):
            group["params"] = [p for p in members if ownership.is_updated(p)]
            for parameter in members:
                if not ownership.is_updated(parameter):
                    self.optimizer.state.pop(parameter, None)

    def trains(self, parameter: nn.Parameter) -> bool:
        """Whether the user's optimizer has ``parameter``, and it is not frozen."""
        return id(parameter) in self._ids and parameter.requires_grad

    def restore(self) -> None:
        """Put all parameters back, without state."""
        for group, members in zip(self.optimizer.param_groups, self._all, strict=True):
            group["params"] = list(members)

    def groups(self) -> list[dict[str, Any]]:
        """Return the groups with all parameters, held here or not."""
        pairs = zip(self.optimizer.param_groups, self._all, strict=True)
        return [{**group, "params": list(members)} for group, members in pairs]

    def names_with_state(self, model: nn.Module) -> list[str]:
        """Return the parameters whose optimizer state is here."""
        return [name for name, p in model.named_parameters() if self.optimizer.state.get(p)]


def sharded(
    ownership: Ownership,
    parameters: Sequence[nn.Parameter],
    num_replicas: int,
    trains: Callable[[nn.Parameter], bool],
    slices: Slices = UNCUT,
) -> Ownership:
    """Choose the process that updates each parameter: the holder with the least to do so far.

    Larger parameters are given away first, those that the optimizer does not train last. No
    process then gets more than its share and one parameter (Graham, SIAM J. Appl. Math. 1969),
    where all parameters have the same holders. ``parameters`` are those of the model, each once,
    in the same order on every process. Ranks that share products choose alike, by whole sizes.
    """
    load: dict[Place, int] = {}
    updaters: dict[int, Place] = {}
    sizes = {id(p): slices.shape(p).numel() for p in parameters}
    for parameter in sorted(parameters, key=lambda p: (not trains(p), -sizes[id(p)])):
        positions = ownership.holders.get(id(parameter), (0,))
        places = [Place(r, position) for r in range(num_replicas) for position in positions]
        place = min(places, key=lambda p: (load.get(p, 0), p))
        updaters[id(parameter)] = place
        load[place] = load.get(place, 0) + sizes[id(parameter)]
    return replace(ownership, updaters=updaters)


@torch.no_grad()
def sum_to_updaters(
    parameters: Iterable[nn.Parameter], ownership: Ownership, groups: Groups
) -> None:
    """Sum gradients over the replicas, each to the process that needs it.

    Elsewhere a gradient only says afterwards that there is one; its values mean nothing.
    ``parameters`` are held here, have a gradient, and are the same in every replica.
    """
    gradients: dict[int, list[Tensor]] = {}
    for parameter in parameters:
        replica, position = ownership.updaters[id(parameter)]
        if position == ownership.here.position and parameter.grad is not None:
            gradients.setdefault(replica, []).append(parameter.grad)
    for replica, found in sorted(gradients.items()):
        exchange(found, lambda m, to=replica: groups.sum_to_replica(m, to))  # type: ignore[misc]


@torch.no_grad()
def share_updated(parameters: Sequence[nn.Parameter], ownership: Ownership, groups: Groups) -> None:
    """Give every holder what the updating process has made of a parameter.

    ``parameters`` are held here, updated somewhere, and the same in every replica.
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
    sources = [(groups.replicas, replica, found) for replica, found in sorted(values.items())]
    for (positions, position), found in sorted(tied.items(), key=lambda item: item[0]):
        sources.append((groups.holders[positions], positions.index(position), found))
    for group, source, tensors in sources:
        exchange(tensors, lambda m, of=(group, source): groups.broadcast(m, *of))  # type: ignore[misc]


@torch.no_grad()
def share_buffers(buffers: Sequence[Tensor], groups: Groups) -> None:
    """Give every replica the first one's buffers, as ``DistributedDataParallel`` does."""
    if groups.layout.num_replicas > 1:
        wires = [b.view(torch.uint8) if b.dtype == torch.bool else b for b in buffers]
        exchange(wires, lambda message: groups.broadcast(message, groups.replicas, 0))


@contextmanager
def same_buffers(model: nn.Module, changing: list[Tensor]) -> Iterator[None]:
    """Write what blocks assign to buffers into the tensors by which all ranks know them.

    These are ``changing`` from then on.

    Raises:
        LoweringError: One that is saved has another shape or dtype afterwards.
    """
    places = [(m._buffers, n, m) for m in model.modules() for n in m._buffers]
    before = [(buffers, n, m, buffers[n]) for buffers, n, m in places]
    yield
    replaced = [
        (buffers, n, m, old, now.detach().clone())
        for buffers, n, m, old in before
        if isinstance(old, Tensor) and isinstance(now := buffers.get(n), Tensor) and now is not old
    ]
    for buffers, name, module, old, now in replaced:
        if (old.shape, old.dtype) == (now.shape, now.dtype):
            with torch.no_grad():
                old.copy_(now)
            buffers[name] = old
            if not any(old is tensor for tensor in changing):
                changing.append(old)
        elif name not in module._non_persistent_buffers_set:
            raise LoweringError(
                f"{type(module).__name__} replaces its buffer {name!r} by a {tuple(now.shape)} "
                f"{now.dtype} tensor, which other processes do not see: register it at its full "
                "size, or with persistent=False"
            )


# ---- gradients and the update -------------------------------------------------------------------


@contextmanager
def kept_aside(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Start without gradients; add those that were there when the block ends well.

    Sums over ranks must not count again what an earlier call has summed.
    """
    earlier = [(p, p.grad) for p in parameters]
    for parameter in parameters:
        parameter.grad = None
    yield
    for parameter, gradient in earlier:
        if gradient is not None:
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient


@torch.no_grad()
def sum_over_ranks(
    model: nn.Module,
    ownership: Ownership,
    groups: Groups,
    *,
    for_update: bool,
    slices: Slices = UNCUT,
) -> None:
    """Sum gradients over the holders of tied parameters, and over the replicas.

    Every rank calls this. What has no gradient on any rank keeps none. Losses are weighted by
    their share of the whole batch, so sums are all that is needed. Parameters of one position
    come first: replicas of a late stage sum them while earlier stages still run. With
    ``for_update`` the sums are needed only where a parameter is updated.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    to_updaters = for_update and bool(ownership.updaters)
    alone = [p for p in parameters if ownership.is_held(p) and not ownership.shared(p)]
    if groups.layout.num_replicas > 1:
        alone = _present(alone, groups, groups.replicas)
        if to_updaters:
            sum_to_updaters(alone, ownership, groups)
        else:
            exchange([_gradient(p) for p in alone], groups.sum_over_replicas)
    for positions in sorted({ownership.shared(p) for p in parameters} - {()}):
        if ownership.here.position in positions:
            tied = [p for p in parameters if ownership.shared(p) == positions]
            _sum_tied(tied, positions, ownership, groups, to_updaters=to_updaters)
    if slices.size > 1:  # their copies of what is not cut must not drift apart by rounding
        held = [p for p in parameters if ownership.is_held(p) and p.grad is not None]
        whole = [_gradient(p) for p in held if not slices.is_cut(p)]
        group = groups.slices.get_group()
        exchange(whole, lambda message: groups.broadcast(message, group, 0))


def _sum_tied(
    tied: Sequence[nn.Parameter],
    positions: tuple[int, ...],
    ownership: Ownership,
    groups: Groups,
    *,
    to_updaters: bool,
) -> None:
    holders = groups.holders[positions]
    found = _present(tied, groups, holders)
    if groups.layout.num_replicas > 1:
        found = _present(tied, groups, groups.replicas)
    for parameter in found:
        parameter.grad = groups.sum_in_order(_gradient(parameter), holders)
    if to_updaters:
        sum_to_updaters(found, ownership, groups)
    elif groups.layout.num_replicas > 1:
        for parameter in found:  # one by one: every holder then adds in the same order
            groups.sum_over_replicas(_gradient(parameter))


def update(
    optimizer: torch.optim.Optimizer,
    parameters: Sequence[nn.Parameter],
    ownership: Ownership,
    groups: Groups,
    *,
    loss_scaling: float,
    max_grad_norm: float | None,
    masters: MasterWeights | None = None,
    slices: Slices = UNCUT,
) -> UpdateResult:
    """Unscale, check, clip and apply the gradients, then clear them; alike on all ranks.

    ``optimizer`` has the parameters that this process updates, ``parameters`` are those that it
    holds, ``slices`` says of which it has a slice only. Every element counts once in the norm.
    """
    with_grad = [p for p in parameters if p.grad is not None]
    updated = [p for p in with_grad if ownership.is_updated(p)]
    done = apply_update(
        optimizer,
        updated,
        loss_scaling=loss_scaling,
        max_grad_norm=max_grad_norm,
        total_norm=lambda _: grad_norm(updated, ownership, groups, slices),
        masters=masters,
    )
    if ownership.updaters and not done.skipped:
        share_updated(with_grad, ownership, groups)
    for parameter in with_grad:
        parameter.grad = None
    return done


def grad_norm(
    parameters: Sequence[nn.Parameter], ownership: Ownership, groups: Groups, slices: Slices
) -> Tensor:
    """Return the norm over the gradients of all ranks; the same bits on each.

    Every element counts once; ``parameters`` are those with a gradient here.
    """
    first = groups.layout.slice == 0
    chief = [p for p in parameters if ownership.is_chief(p) and (first or slices.is_cut(p))]
    counted = [_gradient(p) for p in chief]
    square = float(total_norm_of(counted)) ** 2 if counted else 0.0
    return torch.tensor(groups.sum_numbers([square])[0]).sqrt()


def collect_states(optimizer: torch.optim.Optimizer, ownership: Ownership, groups: Groups) -> None:
    """Give the first rank the state of every parameter, which are whole. Every rank calls this."""
    parameters = _all_of(optimizer)
    tensors: dict[str, Tensor] = {}
    values: dict[str, dict[str, Any]] = {}
    first = groups.layout.slice == 0  # the others have joined the same
    for n, parameter in enumerate(parameters):
        if first and parameter in optimizer.state and ownership.is_chief(parameter):
            values[str(n)] = {}
            for key, value in optimizer.state[parameter].items():
                if isinstance(value, Tensor):
                    tensors[f"{n}/{key}"] = value
                else:
                    values[str(n)][key] = value
    found, plain = to_first_rank(tensors, values, groups)
    for number, entry in plain.items():
        optimizer.state[parameters[int(number)]] = dict(entry)
    for name, tensor in found.items():
        number, _, key = name.partition("/")
        optimizer.state[parameters[int(number)]][key] = tensor


def to_first_rank(
    tensors: Mapping[str, Tensor], values: Mapping[str, Mapping[str, Any]], groups: Groups
) -> tuple[dict[str, Tensor], dict[str, Mapping[str, Any]]]:
    """Return tensors and plain data of all ranks, by name, on the first; every rank calls this.

    Nothing is pickled. Those of the first rank stay what they are.
    """
    own = {name: tensor.contiguous() for name, tensor in tensors.items()}
    sent = torch.frombuffer(bytearray(save(own)), dtype=torch.uint8)
    told = groups.ranks.gather((len(sent), values), tuple[Count, dict[str, dict[str, Any]]])
    wait, device = groups.waiter.run, groups.device
    if groups.ranks.rank != 0:
        wait(lambda: dist.send(sent.to(device), dst=0))
        return {}, {}
    found = dict(tensors)
    for rank, (size, _) in enumerate(told[1:], start=1):
        received = torch.empty(size, dtype=torch.uint8, device=device)
        wait(lambda source=rank, data=received: dist.recv(data, src=source))  # type: ignore[misc]
        found |= load(received.cpu().numpy().tobytes())
    theirs = {name: entry for _, of_rank in told for name, entry in of_rank.items()}
    return found, {**theirs, **values}


def keep_own_states(optimizer: torch.optim.Optimizer, ownership: Ownership) -> None:
    """Drop the state of parameters that are not updated here."""
    for parameter in _all_of(optimizer):
        if not ownership.is_updated(parameter):
            optimizer.state.pop(parameter, None)


def _all_of(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _present(
    parameters: Sequence[nn.Parameter], groups: Groups, group: dist.ProcessGroup
) -> list[nn.Parameter]:
    """Return those that have a gradient on any rank of the group; all have one afterwards."""
    if not parameters:
        return []
    flags = groups.any_true([p.grad is not None for p in parameters], group)
    found = [p for p, flag in zip(parameters, flags, strict=True) if flag]
    for parameter in found:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    return found


def _gradient(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad
