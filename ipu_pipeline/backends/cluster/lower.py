"""Check a plan for the distributed target and turn it into an executable."""

from __future__ import annotations

import itertools
import logging

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.distributed_c10d import PrefixStore, Store, _get_default_store

from ipu_pipeline.backends.cluster.consistency import check_alike, description
from ipu_pipeline.backends.cluster.executable import DistributedExecutable
from ipu_pipeline.backends.cluster.groups import Groups
from ipu_pipeline.backends.cluster.layout import make_layout
from ipu_pipeline.backends.cluster.rendezvous import StoreGather, join_processes
from ipu_pipeline.backends.cluster.schedules import torch_schedule
from ipu_pipeline.backends.cluster.watchdog import Watchdog
from ipu_pipeline.errors import LoweringError, PipelineError
from ipu_pipeline.ir.plan import Plan
from ipu_pipeline.stages.executable import ExecutionOptions
from ipu_pipeline.stages.stage import recomputed_blocks
from ipu_pipeline.stages.tables import check_blocks
from ipu_pipeline.stages.training import check_model

logger = logging.getLogger(__name__)
# Torch gives up waiting so much later than the watchdog, which knows whom to name.
MARGIN_S = 60.0


def lower(
    model: nn.Module,
    plan: Plan,
    optimizer: torch.optim.Optimizer | None,
    options: ExecutionOptions,
) -> DistributedExecutable:
    """Return this process's executable of ``plan``. Every process of the job calls this.

    Raises:
        LoweringError: The processes cannot run the plan, or do not agree on what to run; the
            same on all of them.
        StageError: One of them failed or ended.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    made_here = join_processes(device, options.stall_timeout_s + MARGIN_S)
    try:
        return _lower(model, plan, optimizer, options, device=device, made_here=made_here)
    except LoweringError:
        if made_here:  # after other failures, threads may still be waiting in it
            dist.destroy_process_group()
        raise


def check(plan: Plan, options: ExecutionOptions, device: torch.device) -> None:
    """Refuse what the target cannot run whatever the number of processes.

    Raises:
        LoweringError: An unknown schedule, unknown blocks, the sequential mode, or autocast on a
            GPU.
    """
    torch_schedule(options.schedule or plan.schedule)
    recomputed_blocks(options.recompute, plan)
    check_blocks(plan)
    if options.sequential:
        raise LoweringError(
            "sequential runs all stages in one thread, the distributed target in several "
            "processes; use the local target for the sequential reference"
        )
    if device.type != "cpu" and options.precision != "float32":
        raise LoweringError(
            f"precision {options.precision!r} is for CPUs only in this version (the model is on "
            f"{device}); use float32"
        )


def _lower(
    model: nn.Module,
    plan: Plan,
    optimizer: torch.optim.Optimizer | None,
    options: ExecutionOptions,
    *,
    device: torch.device,
    made_here: bool,
) -> DistributedExecutable:
    world_size, rank = dist.get_world_size(), dist.get_rank()
    name = f"ipu_pipeline/{next(_numbers)}"
    watchdog = Watchdog(_own_store(name), rank, world_size, options.stall_timeout_s)
    ranks, background = (
        StoreGather(_own_store(f"{name}/{use}"), rank, world_size, watchdog.waiter)
        for use in ("ranks", "background")
    )
    try:
        with watchdog.guarding("comparing what the ranks run", 0):
            problem = _problem(model, plan, optimizer, options, device)
            check_alike(description(model, plan, optimizer, options), problem, ranks)
            layout = make_layout(plan, options.schedule or plan.schedule, rank, world_size)
            groups = Groups(layout, device, ranks)
    except BaseException:
        watchdog.close()
        raise
    if options.replicated_tensor_sharding and plan.replicas == 1:
        logger.warning(
            "replicated_tensor_sharding changes nothing: the plan has 1 replica, which keeps the "
            "optimizer state of all its parameters"
        )
    return DistributedExecutable(
        model,
        plan,
        optimizer,
        options,
        groups=groups,
        watchdog=watchdog,
        background=background,
        owns_processes=made_here,
    )


def _problem(
    model: nn.Module,
    plan: Plan,
    optimizer: torch.optim.Optimizer | None,
    options: ExecutionOptions,
    device: torch.device,
) -> str:
    """Return why this process cannot start, or nothing."""
    try:
        check(plan, options, device)
        check_model(model, optimizer)
        make_layout(plan, options.schedule or plan.schedule, dist.get_rank(), dist.get_world_size())
    except PipelineError as error:
        return str(error)
    return ""


def _own_store(name: str) -> Store:
    """Return the keys under ``name``, through a connection that no other thread waits on."""
    return PrefixStore(name, _get_default_store().clone())  # type: ignore[attr-defined]


# Each executable of this process has its own keys in the store.
_numbers = itertools.count(1)
