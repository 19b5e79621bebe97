"""The plan verifier: run on every loaded plan and between passes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from ipu_pipeline.errors import PlanError, listed, shown
from ipu_pipeline.ir.graph import SharedState
from ipu_pipeline.ir.limits import check_count
from ipu_pipeline.ir.plan import Plan

# Characters of the longest name.
MAX_NAME = 500


def verify_plan(plan: Plan) -> None:
    """Check every rule a plan must obey, whatever the target.

    Raises:
        PlanError: A rule is broken; the message names the stage, the blocks and the remedy.
    """
    _verify_names(plan)
    _verify_numbers(plan)
    _verify_placement(plan)
    _verify_order(plan)
    verify_state(plan.graph.state, plan.stage_of)
    _verify_annotations(plan)
    _verify_vocabulary(plan)


def verify_state(state: Iterable[SharedState], stage_of: Mapping[str, int]) -> None:
    """Check that blocks which share what forward passes change are in one stage.

    Raises:
        PlanError: They are not; the message names the blocks and what they share.
    """
    for item in state:
        last = item.writers[-1]
        apart = [n for n in item.blocks if stage_of.get(n, stage_of[last]) != stage_of[last]]
        if apart:
            raise PlanError(
                f"{item.between(apart[0])}, but blocks {apart[0]!r} and {last!r} are in stages "
                f"{stage_of[apart[0]]} and {stage_of[last]}, which run different microbatches at a "
                "time: its values would not be those without stages; keep both in one stage, or "
                "change it outside the model, after the step"
            )


def _verify_names(plan: Plan) -> None:
    """Names end in files that others run, on terminals and in pages: nothing may act there."""
    if not all(part.isidentifier() for part in plan.model.model_class.split(".")):
        raise PlanError(
            f"the plan's model_class is {shown(plan.model.model_class)}; it must be the name of a "
            "class, such as BertForQuestionAnswering"
        )
    names = [block.name for block in plan.blocks]
    names += [spec.name for spec in (*plan.graph.tensors, *plan.graph.inputs)]
    names += [*plan.model.parameters, plan.machine.name, plan.schedule, plan.machine.backend or "-"]
    names += [
        name
        for stage in plan.stages
        for name in (*stage.blocks, *stage.recompute, *stage.serialize, *stage.table_slices)
    ]
    for name in names:
        if not 0 < len(name) <= MAX_NAME or not name.isprintable():
            raise PlanError(
                f"the plan holds the name {shown(name)}; a name is 1 to {MAX_NAME} printable "
                "characters: rename what it stands for in the model"
            )


def _verify_numbers(plan: Plan) -> None:
    if not plan.stages:
        raise PlanError("the plan has no stage; give it at least one")
    check_count("num_stages", len(plan.stages), error=PlanError)
    for name in ("num_microbatches", "replicas"):
        check_count(name, getattr(plan, name), error=PlanError)
    num_devices = len(plan.machine.devices)
    for index, stage in enumerate(plan.stages):
        if not isinstance(stage.device, int) or not 0 <= stage.device < num_devices:
            raise PlanError(
                f"stage {index} is on device {stage.device!r}, but machine {plan.machine.name!r} "
                f"has devices 0 to {num_devices - 1}"
            )


def _verify_placement(plan: Plan) -> None:
    known = [block.name for block in plan.blocks]
    named = {t.producer for t in plan.tensors} | {n for t in plan.tensors for n in t.consumers}
    strange = sorted(named - {None, *known}, key=str)
    if strange:
        raise PlanError(
            f"the plan's tensors name blocks that its block list has not: "
            f"{listed(map(str, strange))}; make the plan again"
        )
    placed = Counter(name for stage in plan.stages for name in stage.blocks)
    unknown = sorted(set(placed) - set(known))
    if unknown:
        raise PlanError(f"the stages name blocks that the model has not: {listed(unknown)}")
    missing = [name for name in known if name not in placed]
    if missing:
        raise PlanError(f"these blocks are in no stage: {listed(missing)}; add each to one")
    repeated = [name for name, count in placed.items() if count > 1]
    if repeated:
        raise PlanError(f"these blocks are in several stages: {listed(repeated)}; keep one")
    empty = [str(index) for index, stage in enumerate(plan.stages) if not stage.blocks]
    if empty:
        raise PlanError(f"stage {listed(empty)} holds no block; remove it from the plan")


def _verify_order(plan: Plan) -> None:
    position = {block.name: index for index, block in enumerate(plan.blocks)}
    for index, stage in enumerate(plan.stages):
        order = [position[name] for name in stage.blocks]
        if order != sorted(order):
            raise PlanError(
                f"stage {index} lists its blocks out of execution order: {listed(stage.blocks)}"
            )
    for tensor in plan.tensors:
        if tensor.producer is None:
            continue
        for consumer in tensor.consumers:
            if position[tensor.producer] >= position[consumer]:
                raise PlanError(
                    f"tensor {tensor.name!r} goes from block {tensor.producer!r} to "
                    f"{consumer!r}, which does not run later; list the graph's blocks in execution "
                    "order"
                )
            source, sink = plan.stage_of[tensor.producer], plan.stage_of[consumer]
            if source > sink:
                raise PlanError(
                    f"block {consumer!r} in stage {sink} needs {tensor.name!r} of block "
                    f"{tensor.producer!r}, which is in the later stage {source}; move "
                    f"{consumer!r} to stage {source} or later"
                )


def _verify_annotations(plan: Plan) -> None:
    for index, stage in enumerate(plan.stages):
        named = (*stage.recompute, *stage.offload, *stage.serialize)
        foreign = [name for name in named if name not in stage.blocks]
        if foreign:
            raise PlanError(f"stage {index} annotates blocks it does not hold: {listed(foreign)}")
        for name, factor in stage.serialize.items():
            check_count(f"slices of block {name!r}", factor, "slices", error=PlanError)
    _verify_slices(plan)


def _verify_slices(plan: Plan) -> None:
    """Check tables that several stages hold: all slices once, in order, the block behind them."""
    held: dict[str, list[tuple[int, int, int]]] = {}
    for index, stage in enumerate(plan.stages):
        for name, (first, last) in stage.table_slices.items():
            if name not in plan.stage_of:
                raise PlanError(f"stage {index} holds slices of {name!r}, which no stage runs")
            held.setdefault(name, []).append((index, first, last))
    for name, parts in held.items():
        home = plan.stage_of[name]
        factor = plan.stages[home].serialize.get(name, 1)
        stages = [index for index, _, _ in parts]
        if stages != list(range(stages[0], home + 1)):
            raise PlanError(
                f"slices of {name!r} are in stages {stages}; they must be in consecutive stages of "
                f"which the last is {home}, where the block runs"
            )
        starts, ends = [0, *(last for _, _, last in parts)], [*(f for _, f, _ in parts), factor]
        if starts != ends or any(first >= last for _, first, last in parts):
            ranges = listed(f"{first} to {last}" for _, first, last in parts)
            raise PlanError(
                f"the stages hold slices {ranges} of {name!r}, which has {factor}; together they "
                "must hold each once, in order, and each stage at least one"
            )


def _verify_vocabulary(plan: Plan) -> None:
    """Check rows that are spread: all once, in order, and no stage has two shares."""
    if plan.vocabulary is None:
        return
    rows = plan.vocabulary.rows
    wrong = [str(stage) for stage, _, _ in rows if stage >= plan.num_stages]
    if wrong or not rows:
        raise PlanError(
            f"the vocabulary is spread over stages {listed(wrong) or 'none'}, but the plan has "
            f"stages 0 to {plan.num_stages - 1}; name these, or leave vocabulary out"
        )
    stages = [stage for stage, _, _ in rows]
    if len(set(stages)) < len(stages):
        raise PlanError(
            f"the vocabulary's rows are in stages {stages}; a stage may hold one share only"
        )
    starts, ends = [first for _, first, _ in rows], [0, *(end for _, _, end in rows[:-1])]
    if starts != ends or any(first >= end for _, first, end in rows):
        ranges = listed(f"{first} to {end}" for _, first, end in rows)
        raise PlanError(
            f"the stages hold rows {ranges} of the vocabulary; together they must hold each once, "
            "in order, from 0 on, and each stage at least one"
        )
