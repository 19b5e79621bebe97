"""How a process joins the others: it is watched, compared, and given its place and weights."""

from __future__ import annotations

import itertools
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.distributed_c10d import PrefixStore, Store, _get_default_store

from ipu_pipeline.backends.cluster.cut_plan import (
    CutPlan,
    cut_plan,
    refuse_whole_tensors,
    refuse_with_slices,
)
from ipu_pipeline.backends.cluster.groups import Groups
from ipu_pipeline.backends.cluster.layout import make_layout
from ipu_pipeline.backends.cluster.ranks.consistency import (
    check,
    check_alike,
    description,
    refuse_sparse_gradients,
    together,
)
from ipu_pipeline.backends.cluster.ranks.rendezvous import StoreGather, join_processes, scope_of
from ipu_pipeline.backends.cluster.ranks.watchdog import Watchdog
from ipu_pipeline.backends.cluster.row_slices import RowSlices, refuse_with_rows, row_plan
from ipu_pipeline.checkpoint.slices import UNCUT, Slices
from ipu_pipeline.errors import LoweringError, PipelineError
from ipu_pipeline.stages.block_runs import offloaded_blocks
from ipu_pipeline.stages.materialize import materialize
from ipu_pipeline.stages.training import LossScaler, check_model

if TYPE_CHECKING:
    from ipu_pipeline.ir.plan import Plan
    from ipu_pipeline.stages.executable import ExecutionOptions

logger = logging.getLogger(__name__)
# Torch gives up waiting so much later than the watchdog, which knows whom to name.
MARGIN_S = 60.0
# Each executable of this process has its own keys in the store.
_numbers = itertools.count(1)


@dataclass(frozen=True)
class Job:
    """What one executable shares with the other processes.

    Attributes:
        groups: Process groups of its layout.
        watchdog: Names a process that dies, fails or hangs.
        background: All-gathers of the thread that writes checkpoints.
        owns_processes: Whether torch's processes have met for it.
    """

    groups: Groups
    watchdog: Watchdog
    background: StoreGather
    owns_processes: bool

    def leave(self) -> None:
        """End torch's processes, if they have met for this."""
        if self.owns_processes and dist.is_initialized():
            dist.destroy_process_group()


@dataclass(frozen=True)
class Joining:
    """What this process is about to run with the others."""

    model: nn.Module
    plan: Plan
    optimizer: torch.optim.Optimizer | None
    options: ExecutionOptions
    device: torch.device
    scaler: LossScaler

    def join(self) -> Job:
        """Start to watch the other processes, compare what they run, and make the groups.

        Raises:
            LoweringError: The processes cannot run the plan, or do not agree on what to run; the
                same on all of them.
        """
        plan, options = self.plan, self.options
        owns_processes = join_processes(self.device, options.stall_timeout_s + MARGIN_S)
        rank, world_size = dist.get_rank(), dist.get_world_size()
        name = f"ipu_pipeline/{next(_numbers)}"
        watchdog = Watchdog(
            _own_store(name), rank, world_size, options.stall_timeout_s, scope_of(name)
        )
        ranks, background = (
            StoreGather(_own_store(own), rank, world_size, watchdog.waiter, scope_of(own))
            for own in (f"{name}/ranks", f"{name}/background")
        )
        try:
            with watchdog.guarding("comparing what the ranks run", 0):
                own = description(self.model, plan, self.optimizer, options)
                check_alike(own, self._problem(), ranks)
                layout = make_layout(plan, options.schedule or plan.schedule, rank, world_size)
                groups = Groups(layout, self.device, ranks)
        except BaseException as error:
            watchdog.close()
            # After other failures, threads may still be waiting in it.
            if owns_processes and isinstance(error, LoweringError):
                dist.destroy_process_group()
            raise
        if options.replicated_tensor_sharding and plan.replicas == 1:
            logger.warning(
                "replicated_tensor_sharding changes nothing: the plan has 1 replica, which keeps "
                "the optimizer state of all its parameters"
            )
        return Job(groups, watchdog, background, owns_processes)

    def _problem(self) -> str:
        """Return why this process cannot start, or nothing."""
        model, plan, options = self.model, self.plan, self.options
        try:
            check(plan, options)
            refuse_sparse_gradients(model)
            check_model(model, self.optimizer)
            self.scaler.check(model, master_weights=options.master_weights)
            offloaded = offloaded_blocks(options.offload_activations, plan, self.device)
            schedule = options.schedule or plan.schedule
            layout = make_layout(plan, schedule, dist.get_rank(), dist.get_world_size())
            cuts = cut_plan(model, plan, layout.tp)
            if self.optimizer is not None:
                refuse_whole_tensors(self.optimizer, cuts, master_weights=options.master_weights)
            refuse_with_slices(options, offloaded, layout.tp)
            refuse_with_rows(model, plan, self.optimizer, options, self.device, layout)
        except PipelineError as error:
            return str(error)
        return ""


def slices_of(
    model: nn.Module, plan: Plan, optimizer: torch.optim.Optimizer | None, groups: Groups
) -> tuple[Slices, CutPlan]:
    """Give every process its slices, if processes share products or a vocabulary; say what is cut.

    Rows of a vocabulary are no slices of products, and no part of the latter.
    """
    cuts = cut_plan(model, plan, groups.layout.tp)
    rows = row_plan(plan, groups.layout.positions)
    if rows is not None:
        return RowSlices(model, optimizer, rows, groups), cuts
    if groups.layout.tp == 1:
        return UNCUT, cuts
    from ipu_pipeline.backends.cluster.tensor_parallel import TensorParallel

    return TensorParallel(model, optimizer, cuts, groups.slices), cuts


def read_own_weights(
    model: nn.Module, plan: Plan, options: ExecutionOptions, groups: Groups, slices: Slices
) -> frozenset[str]:
    """Give a model on ``meta`` the weights of the own stages; return what is held, by name.

    Raises:
        LoweringError: On any rank: they cannot be read or initialised.
    """
    used = [
        {n for b in (*stage.blocks, *stage.table_slices) for n in plan.graph[b].parameters}
        for stage in plan.stages
    ]
    own = set().union(*(used[index] for index in groups.layout.own_stages))
    rows = row_plan(plan, groups.layout.positions)
    if rows is not None:
        own -= set(rows.tables)
        if groups.layout.position in rows.rows:
            own |= {*rows.tables, *rows.biases}
    # What no block has is used between them, on all ranks.
    held = own | (set(model.state_dict(keep_vars=True)) - set().union(*used))
    together(groups.ranks, lambda: materialize(model, options.weights, options.seed, held, slices))
    return frozenset(held)


def _own_store(name: str) -> Store:
    """Return the keys under ``name``, through a connection that no other thread waits on."""
    return PrefixStore(name, _get_default_store().clone())  # type: ignore[attr-defined]
