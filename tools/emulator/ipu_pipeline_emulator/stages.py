"""Stages, phases and execution strategies: which stage and which IPU a block runs in."""

from __future__ import annotations

from typing import Any, Union

from .enums import AutoStage, Liveness
from .options_base import require, require_type


class Stage:
    """Blocks that make one pipeline stage.

    Args:
        block_ids: Ids of the blocks, at least one.
    """

    def __init__(self, *block_ids: str | int) -> None:
        require(bool(block_ids), "A Stage needs at least one block id")
        for block_id in block_ids:
            require_type(block_id, (str, int), "a block id of Stage")
        self._blocks = list(block_ids)
        self._ipu: int | None = None
        self._stage_id = -1

    @property
    def blocks(self) -> list[str]:
        """Ids of the blocks."""
        return self._blocks

    def ipu(self, ipu_id: int) -> Stage:
        """Run the stage on this IPU."""
        require_type(ipu_id, int, "Stage.ipu")
        self._ipu = ipu_id
        return self


class Phase:
    """Stages that run at the same time on different IPUs.

    Args:
        stages: Stages, or block ids (each id a stage of its own).
    """

    def __init__(self, *stages: Stage | str | int) -> None:
        require(bool(stages), "A Phase needs at least one stage or block id")
        if all(isinstance(stage, (str, int)) for stage in stages):
            self.stages = [Stage(*stages)]  # type: ignore[arg-type]
        else:
            for stage in stages:
                require_type(stage, Stage, "a stage of Phase")
            self.stages = list(stages)  # type: ignore[arg-type]

    def stage(self, index: int) -> Stage:
        """Return a stage by its position."""
        return self.stages[index]

    def ipus(self, *ipus: int) -> Phase:
        """Give each stage its IPU."""
        require(
            len(ipus) == len(self.stages),
            f"Phase.ipus needs {len(self.stages)} IPUs, one for each stage, got {len(ipus)}",
        )
        for stage, ipu in zip(self.stages, ipus):
            stage.ipu(ipu)
        return self


class ExecutionStrategy:
    """Base of all strategies."""

    execution_mode = -1
    is_pipelined = False

    def __init__(self) -> None:
        self._block_map: dict[str, Stage] = {}

    def stage(self, block_id: str) -> Stage:
        """Return the stage of a block.

        Raises:
            AssertionError: The block is in no stage.
        """
        require(block_id in self._block_map, f"Unknown block {block_id!r}: it is in no Stage")
        return self._block_map[block_id]

    def locate(self, block_id: str, ipu_id: int | None) -> tuple[int, int]:
        """Return the stage and the IPU of a block that starts now."""
        stage = self.stage(block_id)
        return stage._stage_id, _ipu_of(stage, ipu_id)

    def _add(self, stage: Stage, stage_id: int) -> None:
        stage._stage_id = stage_id
        for block_id in stage.blocks:
            require(block_id not in self._block_map, f"Block {block_id!r} is in two stages")
            self._block_map[block_id] = stage


StageItem = Union[Stage, str, int, "list[str]"]


class ShardedExecution(ExecutionStrategy):
    """Every block on its IPU, one after another.

    Args:
        args: Nothing, an AutoStage, or the stages in order: Stage, block id or list of ids.
    """

    execution_mode = 1

    def __init__(self, *args: AutoStage | StageItem) -> None:
        super().__init__()
        self._auto: AutoStage | None = None
        if not args:
            self._auto = AutoStage.SameAsIpu
        elif isinstance(args[0], AutoStage):
            require(len(args) == 1, "Nothing may follow an AutoStage")
            self._auto = args[0]
        else:

            class ListedStages(dict):  # type: ignore[type-arg]
                """Local as in the front end: options with named stages cannot be pickled."""

            self._block_map = ListedStages()
            for index, item in enumerate(args):
                self._add(_as_stage(item), index)

    def locate(self, block_id: str, ipu_id: int | None) -> tuple[int, int]:
        """Return the stage and the IPU of a block that starts now."""
        if self._auto is None or block_id in self._block_map:
            return super().locate(block_id, ipu_id)
        if self._auto is AutoStage.SameAsIpu:
            require(
                ipu_id is not None,
                f"Block {block_id!r} has no ipu_id; AutoStage.SameAsIpu takes the stage from it",
            )
            assert ipu_id is not None
            return ipu_id, ipu_id
        # Stage 0 belongs to everything before the first block.
        self._add(Stage(block_id), len(self._block_map) + 1)
        return super().locate(block_id, ipu_id)

    def forget_automatic(self) -> None:
        """Drop the stages that a trace made up, so that the next trace starts from 1 again."""
        if self._auto is not None:
            self._block_map.clear()


class PipelinedExecution(ShardedExecution):
    """All IPUs at work on different micro-batches."""

    execution_mode = 0
    is_pipelined = True


class _PhasedExecution(ExecutionStrategy):
    execution_mode = 2

    def __init__(self, *phases: Any) -> None:
        super().__init__()
        require(bool(phases), f"{type(self).__name__} needs its phases")

        class ListedPhases(dict):  # type: ignore[type-arg]
            """Local as in the front end: options with named phases cannot be pickled."""

        self._block_map = ListedPhases()
        self._phases = [phase if isinstance(phase, Phase) else _as_phase(phase) for phase in phases]
        self._separate_backward = False
        for index, phase in enumerate(self._phases):
            for stage in phase.stages:
                self._add(stage, index)

    def phase(self, index: int) -> Phase:
        """Return a phase by its position."""
        return self._phases[index]

    def useSeparateBackwardPhase(self, enabled: bool = True) -> Any:
        """Run the backward pass in phases of its own."""
        require_type(enabled, bool, "useSeparateBackwardPhase")
        self._separate_backward = enabled
        return self

    def locate(self, block_id: str, ipu_id: int | None) -> tuple[int, int]:
        """Return the phase and the IPU of a block that starts now."""
        stage = self.stage(block_id)
        if stage._ipu is None and ipu_id is None:
            return stage._stage_id, self._default_ipu(stage._stage_id)
        return stage._stage_id, _ipu_of(stage, ipu_id)

    def _default_ipu(self, _phase: int) -> int:
        return 0


class SerialPhasedExecution(_PhasedExecution):
    """One phase after another on the same IPUs; activations leave the chip."""

    def setTensorsLiveness(self, liveness: Liveness) -> SerialPhasedExecution:
        """Choose when tensors leave the chip."""
        require_type(liveness, Liveness, "setTensorsLiveness")
        self._liveness = liveness
        return self


class ParallelPhasedExecution(_PhasedExecution):
    """Even phases on even IPUs, odd phases on odd IPUs."""

    def sendTensorsOffChipAfterFwd(self, off_chip: bool = True) -> ParallelPhasedExecution:
        """Choose whether tensors leave the chip after the forward pass."""
        require_type(off_chip, bool, "sendTensorsOffChipAfterFwd")
        self._off_chip = off_chip
        return self

    def _default_ipu(self, phase: int) -> int:
        return phase % 2


def _ipu_of(stage: Stage, ipu_id: int | None) -> int:
    if stage._ipu is not None:
        return stage._ipu
    return ipu_id if ipu_id is not None else stage._stage_id


def _as_stage(item: Any) -> Stage:
    if isinstance(item, Stage):
        return item
    if isinstance(item, (str, int)):
        return Stage(item)
    require_type(item, (list, tuple), "a stage of an execution strategy")
    return Stage(*item)


def _as_phase(item: Any) -> Phase:
    if isinstance(item, (str, int, Stage)):
        return Phase(item)
    require_type(item, (list, tuple), "a phase of an execution strategy")
    return Phase(*item)
