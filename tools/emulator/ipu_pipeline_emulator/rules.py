"""What the back end refuses when it compiles a program; each message cites the numbers."""

from __future__ import annotations

from .enums import OutputMode, ReductionType
from .errors import backend_error
from .graph import Slot, flat
from .options import Options
from .popart_keys import unknown_option
from .program import BlockRecord, Program
from .stages import ParallelPhasedExecution

MAX_IPUS = 64


def check_options(options: Options) -> None:
    """Check what needs no program.

    Raises:
        Error: The first rule that is broken.
    """
    _check_popart(options)
    _check_counts(options)


def check_program(program: Program, options: Options) -> None:
    """Check a recorded program against its options.

    Raises:
        Error: The first rule that is broken.
    """
    _check_overlap(program, options)
    if program.pipelined:
        _check_stage_order(program)
        _check_one_ipu_per_stage(program)
        _check_contiguous(program)
        _check_variables(program)
        _check_schedule(program, options)
    if isinstance(options.execution_strategy, ParallelPhasedExecution):
        _check_parallel_phases(program)
    program.num_ipus = _count_ipus(program, options)


def _check_popart(options: Options) -> None:
    wrong = unknown_option(options._Popart.options)
    if wrong:
        raise backend_error(wrong)
    if options.Training.meanAccumulationAndReplicationReductionStrategy.value > 1:
        raise backend_error(
            "MeanReductionStrategy.PostAndLoss (2) is unknown to PopART 3.4; use Post or Running"
        )
    if "ipu_version" in options._values and options._values.get("use_model"):
        raise backend_error("useOfflineIpuTarget cannot be used with useIpuModel")
    if "ipu_version" in options._values and "ipu_id" in options._values:
        raise backend_error("useOfflineIpuTarget cannot be used with useIpuId")
    if "ipu_version" in options._values and options.log_cycle_count:
        raise backend_error("useOfflineIpuTarget cannot be used with logCycleCount")


def _check_counts(options: Options) -> None:
    for name, value in (
        ("deviceIterations", options.device_iterations),
        ("replicationFactor", options.replication_factor),
        ("Training.gradientAccumulation", options.Training.gradient_accumulation),
    ):
        if value < 1:
            raise backend_error(f"{name} must be at least 1, got {value}")
    period = options.output_return_period
    if options.output_mode is OutputMode.EveryN and options.device_iterations % period:
        raise backend_error(
            f"deviceIterations ({options.device_iterations}) must be a multiple of the output "
            f"return period ({period})"
        )
    reduction = options.Training.accumulation_and_replication_reduction_type
    if options.Training.automaticLossScaling and reduction is not ReductionType.Mean:
        raise backend_error("Automatic loss scaling needs ReductionType.Mean")


def _check_overlap(program: Program, options: Options) -> None:
    _check_overlapped_tensors(program)
    if not program.overlapped:
        return
    if program.pipelined:
        raise backend_error("Overlapped input or output cannot be used with PipelinedExecution")
    if options.TensorLocations.toDict().get("numIOTiles", 0) < 32:
        raise backend_error(
            "Overlapped input or output needs TensorLocations.numIOTiles of at least 32"
        )
    if options.output_mode not in (OutputMode.All, OutputMode.Sum):
        raise backend_error("Overlapped input or output needs OutputMode.All or OutputMode.Sum")


def _check_overlapped_tensors(program: Program) -> None:
    graph = program.graph
    outputs = [value.index for value in graph.outputs if isinstance(value, Slot)]
    for what, slot in program.overlaps:
        if slot not in (graph.inputs if what == "input" else outputs):
            raise backend_error(
                f"poptorch.set_overlap_for_{what} applied on a node which is not a tensor {what} "
                f"{'to' if what == 'input' else 'of'} the model"
            )
        if what == "output" and outputs.count(slot) > 1:
            raise backend_error(
                "poptorch.set_overlap_for_output cannot be used with a tensor that is returned "
                "twice"
            )
        uses = [
            node
            for node in graph.nodes
            if any(isinstance(v, Slot) and v.index == slot for v in flat((node.args, node.kwargs)))
        ]
        if what == "input" and len(uses) > 1:
            raise backend_error(
                "poptorch.set_overlap_for_input must be the only op applied to an input: use the "
                "tensor that it returns"
            )


def _active_blocks(program: Program) -> list[BlockRecord]:
    """Blocks that count: named ones always, the implicit one if it computes something."""
    return [block for block in program.blocks if block.id or block.num_ops]


def _check_stage_order(program: Program) -> None:
    blocks = _active_blocks(program)
    for before, after in zip(blocks, blocks[1:]):
        if after.stage < before.stage:
            raise backend_error(
                f"Block {after.id!r} of stage {after.stage} (IPU {after.ipu}) runs after block "
                f"{before.id!r} of stage {before.stage} (IPU {before.ipu}): stage ids must not "
                "decrease along the data flow; use AutoStage.AutoIncrement to return to an IPU"
            )


def _check_one_ipu_per_stage(program: Program) -> None:
    ipu_of: dict[int, BlockRecord] = {}
    for block in _active_blocks(program):
        first = ipu_of.setdefault(block.stage, block)
        if first.ipu != block.ipu:
            raise backend_error(
                f"Stage {block.stage} is on IPU {first.ipu} (block {first.id!r}) and on IPU "
                f"{block.ipu} (block {block.id!r}): all operations of a stage must be on one IPU"
            )


def _check_contiguous(program: Program) -> None:
    ipu_of = {block.stage: block.ipu for block in _active_blocks(program)}
    merged: list[int] = []
    removed = 0
    for stage in sorted(ipu_of):
        # Everything before the first block is stage 0 on IPU 0, even when it computes nothing.
        previous = ipu_of.get(stage - 1, 0 if stage == 1 else None)
        if previous == ipu_of[stage]:
            removed += 1
        if not merged or stage - removed != merged[-1]:
            merged.append(stage - removed)
    if merged != list(range(len(merged))):
        raise backend_error(
            f"Pipeline stages must be numbered 0 to N-1 without a gap, but the program has "
            f"stages {sorted(ipu_of)} on IPUs {[ipu_of[s] for s in sorted(ipu_of)]}"
        )


def _check_variables(program: Program) -> None:
    for name, ipus in program.ipus_of_variables().items():
        if len(ipus) > 1:
            raise backend_error(
                f"Can not copy variable tensor {name} between virtual graphs when pipelining: it "
                f"is used on IPUs {', '.join(map(str, ipus))}; consume it on one IPU only"
            )


def _check_schedule(program: Program, options: Options) -> None:
    stages, forward = program.num_stages, program.num_forward_stages
    if program.training:
        accumulation = options.Training.gradient_accumulation
        if accumulation < stages:
            raise backend_error(
                f"Training.gradientAccumulation is {accumulation}, but a pipeline of {forward} "
                f"forward stages has {stages} stages: gradientAccumulation must be at least "
                f"{stages} (2 x {forward} - 1)"
            )
    elif options.device_iterations < forward:
        raise backend_error(
            f"deviceIterations is {options.device_iterations}, but the pipeline has {forward} "
            f"stages: deviceIterations must be at least {forward}"
        )


def _check_parallel_phases(program: Program) -> None:
    for block in program.blocks:
        if block.id and block.stage % 2 != block.ipu % 2:
            raise backend_error(
                f"ParallelPhasedExecution runs even phases on even IPUs and odd phases on odd "
                f"ones, but block {block.id!r} of phase {block.stage} is on IPU {block.ipu}"
            )


def _count_ipus(program: Program, options: Options) -> int:
    used = program.used_ipus or [0]
    per_replica = max(len(used), used[-1] + 1)
    total = per_replica * options.replication_factor
    rounded = 1 << (total - 1).bit_length()
    exempt = "ipu_version" in options._values or bool(options._values.get("use_model"))
    if total != rounded and not options.auto_round_num_ipus and not exempt:
        raise backend_error(
            f"The program needs {total} IPUs ({per_replica} x {options.replication_factor} "
            f"replicas), which is not a power of 2: call autoRoundNumIPUs(True) to reserve "
            f"{rounded}"
        )
    reserved = rounded if options.auto_round_num_ipus and not exempt else total
    if reserved > MAX_IPUS:
        raise backend_error(
            f"The program needs {reserved} IPUs ({per_replica} x {options.replication_factor} "
            f"replicas), but one process can use at most {MAX_IPUS}"
        )
    return reserved
