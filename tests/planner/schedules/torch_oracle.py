"""The rows that torch's own schedule classes make, without a process group."""

from __future__ import annotations

from typing import Any

from torch.distributed.pipelining import schedules as torch_schedules
from torch.distributed.pipelining.schedules import _Action, _get_1f1b_rank_ops

from ipu_pipeline.planner.schedules import PipelineShape, ScheduleKind


def shape_for(
    kind: ScheduleKind, num_devices: int, loops: int, num_microbatches: int
) -> PipelineShape | None:
    """Return the shape of ``loops`` stages per device; ``None`` where it cannot run."""
    devices = kind.place(num_devices * loops, num_devices)
    if devices is None:
        return None
    shape = PipelineShape.of(len(devices), num_microbatches, devices)
    return None if kind.problem(shape) else shape


def torch_rows(kind: ScheduleKind, shape: PipelineShape) -> list[list[str]]:
    """Return torch's rows; where it overlaps two passes, one after the other."""
    if kind.name == "1f1b":  # torch 2.13's class shows a wrong row for its last rank
        rows: Any = [_one_f_one_b(rank, shape) for rank in range(shape.num_devices)]
    else:
        made: Any = object.__new__(getattr(torch_schedules, kind.torch_class))
        made.pp_group_size = shape.num_devices
        made.num_stages = made._num_stages = shape.num_stages
        made.n_local_stages, made._stages = shape.loops, range(shape.loops)
        made._n_microbatches = shape.num_microbatches
        made.number_of_rounds = max(1, shape.num_microbatches // shape.num_devices)
        made.microbatches_per_round = shape.num_microbatches // made.number_of_rounds
        if kind.name == "gpipe":
            rows = list(made._get_pipeline_order().values())
        else:
            ranks = range(shape.num_devices)
            rows = [made._calculate_single_rank_operations(rank) for rank in ranks]
    return [[text for action in row if action for text in _texts(action)] for row in rows]


def _texts(action: _Action) -> list[str]:
    parts = action.sub_actions or (action,)
    computing = ("FORWARD", "FULL_BACKWARD", "BACKWARD_INPUT", "BACKWARD_WEIGHT")
    return [str(part) for part in parts if part.computation_type.name in computing]


def _one_f_one_b(rank: int, shape: PipelineShape) -> list[Any]:
    warmup = min(shape.num_stages - 1 - rank, shape.num_microbatches)
    steady = shape.num_microbatches - warmup
    return _get_1f1b_rank_ops(
        1, shape.num_stages, warmup, steady, warmup, rank, lambda _: rank, lambda _: rank
    )
