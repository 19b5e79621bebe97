"""What a caller of ``plan`` asks for: machine, depth, microbatches, layers, prices.

An IPU configuration answers what the arguments leave open; where both speak they must agree.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from ipu_pipeline.backends.ipu.config import IPUConfig
from ipu_pipeline.backends.ipu.config.layers import WILDCARD
from ipu_pipeline.backends.ipu.prices import IPUCostModel, IPUSettings, ProgramChoices, is_ipu
from ipu_pipeline.backends.ipu.prices.planning import configured_partition
from ipu_pipeline.backends.local.measure import local_machine, profile_blocks
from ipu_pipeline.capture import CapturedModel
from ipu_pipeline.ir.graph import BlockGraph
from ipu_pipeline.ir.machine import Machine
from ipu_pipeline.ir.machines import machine_by_name
from ipu_pipeline.planner.options.block_cost import CostModel
from ipu_pipeline.planner.options.cost_models import AnalyticCostModel, ProfiledCostModel
from ipu_pipeline.planner.search import Constraints, Partition
from ipu_pipeline.planner.search.objective import in_flight

DEFAULT_MICROBATCHES = 8


def depth_of(num_stages: int | None, config: IPUConfig | None) -> int | None:
    """Return the pipeline depth, ``None``: the best.

    Raises:
        ValueError: ``num_stages`` is not the configuration's.
    """
    if config is None or (config.ipus_per_replica is None and len(config.layers_per_ipu) == 1):
        return num_stages
    depth = config.num_ipus()
    if num_stages not in (None, depth):
        raise ValueError(
            f"num_stages is {num_stages}, but the IPU configuration has {depth} IPUs in a replica; "
            "leave num_stages out, or change layers_per_ipu and ipus_per_replica"
        )
    return depth


def machine_of(machine: str | Machine, depth: int | None) -> Machine:
    """Return the described machine: this one (measured), a known one, or a file's."""
    if isinstance(machine, Machine):
        return machine
    if machine == "local":
        return local_machine(depth or max(1, torch.get_num_threads()))
    return machine_by_name(machine)


def machine_limits(machine: Machine) -> Constraints:
    """Return what the machine insists on: IPUs cut the execution order and copy no weight."""
    if is_ipu(machine):
        return Constraints(execution_order=True, tied="same_device")
    return Constraints()


def cost_model_of(
    captured: CapturedModel,
    batch: Mapping[str, Any],
    machine: Machine,
    costs: str,
    config: IPUConfig | None,
    limits: Constraints,
) -> CostModel:
    """Return what prices the blocks.

    Raises:
        ValueError: ``costs`` is neither ``analytic`` nor ``profiled``.
    """
    replicas = limits.replicas or 1
    if costs == "analytic" and is_ipu(machine):
        return _ipu_model(config, replicas)
    microbatches = (limits.total_microbatches or limits.num_microbatches * replicas) // replicas
    last = in_flight(limits.schedule, 1, microbatches)
    if costs == "analytic":
        return AnalyticCostModel(loss_in_flight=last)
    if costs == "profiled":
        times = profile_blocks(captured, batch, num_devices=len(machine.devices))
        return ProfiledCostModel(times, loss_in_flight=last)
    raise ValueError(f"costs {costs!r} is unknown; use 'analytic' or 'profiled'")


def offering(
    costs: CostModel, factors: Mapping[str, int], unfused: tuple[str, ...] = ()
) -> CostModel:
    """Let the menus of some blocks have so many slices, too."""
    if isinstance(costs, AnalyticCostModel | ProfiledCostModel):
        sliced = {name: (factor,) for name, factor in factors.items() if factor > 1}
        return replace(costs, factors=sliced, unfused=unfused)
    return costs


def _ipu_model(config: IPUConfig | None, replicas: int) -> IPUCostModel:
    """Price IPUs as the configuration says: memory proportion, optimizer's place, precision."""
    if config is None:
        return IPUCostModel()
    settings = IPUSettings.from_config(config, replicas=replicas)
    return IPUCostModel(settings, ProgramChoices.fixed(settings))


def microbatches_of(microbatches: int | None, config: IPUConfig | None) -> int:
    """Return the microbatches per optimizer step."""
    if microbatches is not None:
        return microbatches
    return config.gradient_accumulation_steps if config is not None else DEFAULT_MICROBATCHES


def layers_of(
    graph: BlockGraph, config: IPUConfig | None, depth: int | None
) -> tuple[int, ...] | None:
    """Return the layers of each IPU that the configuration asks for; ``None``: no wish."""
    if config is None or depth is None or config.layers_per_ipu == (-1,):
        return None
    num_layers = sum(block.kind == "layer" for block in graph.blocks)
    return config.resolve_layers(num_layers)


def is_spelled_out(config: IPUConfig | None, machine: Machine) -> bool:
    """Whether the configuration says where every layer runs, so that nothing is left to solve."""
    return config is not None and is_ipu(machine) and config.layers_per_ipu != (WILDCARD,)


def configured(
    graph: BlockGraph, machine: Machine, config: IPUConfig | None, limits: Constraints
) -> Partition:
    """Return the split that a spelled-out configuration describes.

    Raises:
        ConfigError: It does not fit the model or the machine.
        PartitionError: It does not fit the memory.
    """
    assert config is not None
    settings = replace(
        IPUSettings.from_config(config, replicas=limits.replicas),
        accumulation=limits.num_microbatches,
    )
    return configured_partition(graph, settings, machine)
