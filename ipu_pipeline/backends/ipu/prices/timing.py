"""Seconds of one optimizer step on IPUs: fill, main, flush and update.

Time is divided into cycles. In a cycle every active stage runs once, stages on one IPU one after
another, IPUs in parallel; then one copy phase moves everything between IPUs, and does not overlap
with compute. With F forward stages there are S = 2F-1 (in inference F) pipeline stages, and

    step = sum_(c<S-1) fill_c + (G-S+1) main + sum_(c<S-1) flush_c + outer

where fill cycle c has stages 0..c active and flush cycle c stages c+1..S-1. A backward stage
includes the recomputation of its forward stage; the last forward stage holds its own backward
pass and recomputes nothing.

Source: POPART_PIPELINE.md (PopART SDK 3.4, transforms/pipeline.cpp and popx/popprograms.cpp).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from ipu_pipeline.backends.ipu.prices.chip import Chip
from ipu_pipeline.backends.ipu.prices.layout import PlacedProgram
from ipu_pipeline.backends.ipu.prices.operations import block_time
from ipu_pipeline.backends.ipu.prices.settings import IPUSettings
from ipu_pipeline.ir.graph import DTYPE_BYTES, BlockGraph, TensorSpec


@dataclass(frozen=True)
class StageTime:
    """Seconds of one microbatch in one forward stage.

    Attributes:
        ipu: Its IPU.
        forward_s: Forward pass.
        backward_s: Backward pass without recomputation.
        recompute_s: Forward work repeated in the backward stage.
    """

    ipu: int
    forward_s: float
    backward_s: float
    recompute_s: float


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step (in inference: of one call of the device).

    Attributes:
        stages: Per forward stage.
        cycle_s: One main cycle: busiest IPU, copies and input.
        copy_s: Copies between IPUs in one cycle.
        input_s: Host to device in one cycle; with I/O tiles what compute does not hide of it.
        fill_s: All fill cycles.
        main_s: All main cycles.
        flush_s: All flush cycles.
        optimizer_s: Optimizer arithmetic, one parameter tensor after another.
        streaming_s: Optimizer state between the chip and streaming memory.
        all_reduce_s: Gradients summed over replicas.
        host_s: Return to the host, shared by the device iterations (0 in inference).
        num_cycles: fill, main and flush cycles.
    """

    stages: tuple[StageTime, ...]
    cycle_s: float
    copy_s: float
    input_s: float
    fill_s: float
    main_s: float
    flush_s: float
    optimizer_s: float
    streaming_s: float
    all_reduce_s: float
    host_s: float
    num_cycles: tuple[int, int, int]

    @property
    def once_s(self) -> dict[str, float]:
        """What comes once per step, by name."""
        return {
            "optimizer": self.optimizer_s,
            "state streaming": self.streaming_s,
            "all-reduce": self.all_reduce_s,
            "host": self.host_s,
        }

    @property
    def update_s(self) -> float:
        """Everything after the flush that the device does."""
        return self.optimizer_s + self.streaming_s + self.all_reduce_s

    @property
    def total_s(self) -> float:
        """The whole step."""
        return self.fill_s + self.main_s + self.flush_s + self.update_s + self.host_s


def step_time(run: PlacedProgram) -> StepTime:
    """Predict one optimizer step."""
    settings, stages, copy_s = run.settings, stage_times(run), copy_time(run)
    fill, main, flush = cycle_loads(stages, training=settings.training)
    if not settings.pipelined:
        fill, flush = (), ()
        main = sum(stage.forward_s + stage.backward_s for stage in stages)
    input_s = input_time(run.graph, settings, run.chip)
    input_s -= (1 - settings.exposed_inputs) * min(input_s, main)
    between = copy_s + input_s
    num_main = max(1, settings.num_microbatches - len(fill))
    update = update_times(run)
    # Inference queues its next call while this one runs; a training step waits for the host.
    host_s = run.chip.calibration.step_host_s / settings.device_iterations
    return StepTime(
        stages=stages,
        cycle_s=main + between,
        copy_s=copy_s,
        input_s=input_s,
        fill_s=sum(fill) + between * len(fill),
        main_s=num_main * (main + between),
        flush_s=sum(flush) + copy_s * len(flush),
        optimizer_s=update[0],
        streaming_s=update[1],
        all_reduce_s=update[2],
        host_s=host_s if settings.training else 0.0,
        num_cycles=(len(fill), num_main, len(flush)),
    )


def stage_times(run: PlacedProgram) -> tuple[StageTime, ...]:
    """Price every forward stage for one microbatch."""
    found = []
    settings, count = run.settings, len(run.layout.stages)
    for position, stage in enumerate(run.layout.stages):
        pricer = run.pricer(stage.ipu)
        forward = backward = 0.0
        for name in stage.blocks:
            forward_s, backward_s = block_time(run.graph, run.graph[name], pricer, settings)
            forward += forward_s
            backward += backward_s
        again = settings.training and settings.recompute and position < count - 1
        found.append(StageTime(stage.ipu, forward, backward, forward if again else 0.0))
    return tuple(found)


def cycle_loads(
    stages: Sequence[StageTime], *, training: bool
) -> tuple[tuple[float, ...], float, tuple[float, ...]]:
    """Return seconds of every fill cycle, of a main cycle, and of every flush cycle."""
    loads = [(stage.ipu, stage.forward_s) for stage in stages]
    if training:
        last = stages[-1]
        loads[-1] = (last.ipu, last.forward_s + last.backward_s + last.recompute_s)
        loads += [(s.ipu, s.backward_s + s.recompute_s) for s in reversed(stages[:-1])]
    count = len(loads)
    fill = tuple(_busiest(loads[: cycle + 1]) for cycle in range(count - 1))
    flush = tuple(_busiest(loads[cycle + 1 :]) for cycle in range(count - 1))
    return fill, _busiest(loads), flush


def _busiest(loads: Sequence[tuple[int, float]]) -> float:
    total: Counter[int] = Counter()
    for ipu, seconds in loads:
        total[ipu] += seconds  # type: ignore[assignment]
    return max(total.values(), default=0.0)


def float_bytes(tensor: TensorSpec, element_bytes: float) -> float:
    """Bytes of ``tensor`` on the device: floats in the compute type, wide integers as int32."""
    elements = tensor.num_bytes / DTYPE_BYTES[tensor.dtype]
    if "float" in tensor.dtype:
        return elements * element_bytes
    return elements * min(4.0, DTYPE_BYTES[tensor.dtype])


def copy_time(run: PlacedProgram) -> float:
    """Seconds of the copy phase of one cycle: the busiest direction of the busiest link.

    A tensor used several stages later is passed on by every stage between (PopART chains it); a
    gradient takes the way back in the same phase.
    """
    traffic: Counter[tuple[int, int]] = Counter()
    settings, chip, stages = run.settings, run.chip, run.layout.stages
    for start, end, name in run.crossing:
        tensor = run.graph.tensor_by_name[name]
        size = float_bytes(tensor, settings.element_bytes)
        for stage in range(start, end):
            here, there = stages[stage].ipu, stages[stage + 1].ipu
            if here != there:
                traffic[here, there] += size  # type: ignore[assignment]
                if settings.training and tensor.requires_grad:
                    traffic[there, here] += size  # type: ignore[assignment]
    if not traffic:
        return 0.0
    return chip.link_latency_s + max(
        size / (chip.link_bytes_per_s(here, there) * chip.calibration.copy_share)
        for (here, there), size in traffic.items()
    )


def input_time(graph: BlockGraph, settings: IPUSettings, chip: Chip) -> float:
    """Seconds of one microbatch's inputs from the host; replicas on a board share its network."""
    size = sum(float_bytes(tensor, settings.element_bytes) for tensor in graph.inputs)
    sharing = min(settings.replicas, max(1, chip.ipus_per_board // settings.num_ipus))
    return size * sharing / chip.host_bytes_per_s


def update_times(run: PlacedProgram) -> tuple[float, float, float]:
    """Return seconds of optimizer arithmetic, streaming and all-reduce of one step."""
    graph, settings, chip = run.graph, run.settings, run.chip
    if not settings.training:
        return 0.0, 0.0, 0.0
    # A parameter used twice on an IPU counts once.
    elements = [
        sum(n for fqn, n in held.items() if graph.parameter_by_fqn[fqn].trainable)
        for held in run.held
    ]
    most = max(elements)
    tensors = sum(parameter.trainable for parameter in graph.parameters)
    boards: Counter[int] = Counter()
    for ipu, count in enumerate(elements):
        boards[ipu // chip.ipus_per_board] += count
    return (
        most * optimizer_s_per_element(settings, chip) + tensors * chip.calibration.tensor_update_s,
        max(boards.values()) * streaming_s_per_element(settings, chip),
        most * all_reduce_s_per_element(settings, chip),
    )


def optimizer_s_per_element(settings: IPUSettings, chip: Chip) -> float:
    """Seconds of optimizer arithmetic for each trained element of the fullest IPU."""
    num_bytes = settings.state_share * (3 * settings.element_bytes + 2 * settings.state_bytes)
    return num_bytes / (chip.tiles * chip.calibration.vector_bytes_per_cycle * chip.clock_hz)


def streaming_s_per_element(settings: IPUSettings, chip: Chip) -> float:
    """Seconds of moving the optimizer state of each trained element of the fullest board.

    Replicas on a board share its streaming memory; state on the chip moves nowhere.
    """
    if not (settings.training and settings.optimizer_offchip):
        return 0.0
    sharing = min(settings.replicas, max(1, chip.ipus_per_board // settings.num_ipus))
    moved = 2 * settings.state_bytes * settings.state_share * sharing
    return moved / chip.streaming_bytes_per_s


def all_reduce_s_per_element(settings: IPUSettings, chip: Chip) -> float:
    """Seconds of a ring all-reduce over the replicas for each trained element of an IPU.

    A ring moves 2 (R-1)/R of the gradients' bytes.
    """
    replicas = settings.replicas
    if replicas == 1:
        return 0.0
    racks = replicas * settings.num_ipus > chip.ipus_per_rack
    speed = chip.link_bytes_per_s(0, chip.ipus_per_rack if racks else chip.ipus_per_board)
    size = 2 * (replicas - 1) / replicas * settings.element_bytes
    return size / (speed * chip.calibration.copy_share)
