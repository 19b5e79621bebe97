"""What a plan says about each module, in the words of poptorch: plain data, no torch.

One :class:`Annotation` per block of the plan, in execution order. Both doors use it: the
worker and a bundle by hand read it from the code that is written down.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ipu_pipeline.backends.ipu.prices.layout import layout_of
from ipu_pipeline.backends.ipu.prices.memory import segments
from ipu_pipeline.backends.ipu.prices.predict import program_of
from ipu_pipeline.errors import LoweringError
from ipu_pipeline.ir.graph import Block
from ipu_pipeline.ir.plan import Plan
from ipu_pipeline.planner.backend import backend_of
from ipu_pipeline.planner.options.vocabulary_shares import share_of
from ipu_pipeline.planner.price import workload_of

CALL_MARK = "#"  # "shared#2" is the third call of the module "shared"


@dataclass(frozen=True)
class Annotation:
    """Where one block runs, and how.

    Attributes:
        block: Its name in the plan.
        module: Dotted path of the module whose call begins it; empty for glue that goes on in
            the block before it (the loss).
        kind: ``embedding``, ``layer``, ``head``, ``loss`` or ``other``.
        stage: Pipeline stage.
        ipu: IPU within one replica.
        again: It is a further call of a module that an earlier annotation names, in its stage.
        checkpoint: Its outputs are kept for the backward pass (a recomputation checkpoint).
        serialize: Slices of its table lookup or output projection; 1 is whole.
        rows: Rows of its module's table that it has, from the first to before the second; ``None``:
            the table is not spread.
        inference: Stage, IPU and slices in evaluation; ``None``: as in training.
        forward_ms: Predicted milliseconds of one microbatch's forward pass.
        backward_ms: Predicted milliseconds of its backward pass, without recomputation.
        weight_mb: Predicted megabytes (10^6 bytes) of weights, gradients and optimizer state.
    """

    block: str
    module: str
    kind: str
    stage: int
    ipu: int
    again: bool = False
    checkpoint: bool = False
    serialize: int = 1
    rows: tuple[int, int] | None = None
    inference: tuple[int, int, int] | None = None
    forward_ms: float = 0.0
    backward_ms: float = 0.0
    weight_mb: float = 0.0

    @property
    def begins(self) -> bool:
        """Whether a ``BeginBlock`` is emitted for it."""
        return bool(self.module) and not self.again

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        return asdict(self)


def annotate(
    plan: Plan, inference: Mapping[str, tuple[int, int, int]] | None = None
) -> tuple[Annotation, ...]:
    """Return the annotations of ``plan``.

    Args:
        plan: A plan for IPUs.
        inference: Stage, IPU and slices of every block in evaluation; ``None``: as planned.

    Raises:
        LoweringError: A stage begins with code that belongs to no module, or a module with weights
            is called on several IPUs.
    """
    costs = backend_of(plan.machine).costs(workload_of(plan)).blocks
    kept = _checkpoints(plan)
    places = {
        block.name: (plan.stage_of[block.name], plan.stages[plan.stage_of[block.name]].device)
        for block in plan.blocks
    }
    other = inference or {}
    in_turns = _in_turns(plan, places) | _in_turns(plan, {n: at[:2] for n, at in other.items()})
    found: list[Annotation] = []
    seen: set[str] = set()
    for block in plan.blocks:
        stage, ipu = places[block.name]
        module, part = module_of(block), share_of(block.name)
        again = module in seen and module not in in_turns and part is None
        seen |= {module} - {""}
        found.append(
            Annotation(
                block=block.name,
                module=module,
                kind=block.kind,
                stage=stage,
                ipu=ipu,
                again=again,
                checkpoint=block.name in kept,
                serialize=plan.stages[stage].serialize.get(block.name, 1),
                rows=part and part[1],
                inference=other.get(block.name),
                forward_ms=costs[block.name].plain.forward_s * 1e3,
                backward_ms=costs[block.name].plain.backward_s * 1e3,
                weight_mb=sum(costs[block.name].weight_bytes.values()) / 1e6,
            )
        )
    _check_stage_openers(found)
    return tuple(found)


def module_of(block: Block) -> str:
    """Return the path of the module that begins ``block``; empty for the loss."""
    name = (share_of(block.name) or (block.name,))[0]
    return "" if block.kind == "loss" else name.split(CALL_MARK)[0]


def _checkpoints(plan: Plan) -> frozenset[str]:
    """Return the blocks whose outputs are kept: what the price says layers are recomputed from.

    None is in the last stage, of which PopART would recompute what is before a checkpoint.
    """
    program = program_of(plan)
    if not (program.recompute and program.checkpoint_layers):
        return frozenset()
    layout = layout_of([(s.device, s.blocks) for s in plan.stages], program.num_ipus)
    return frozenset(
        segment[-1]
        for stage in layout.stages[:-1]
        for segment in segments(plan.graph, stage.blocks, program)
    )


def _in_turns(plan: Plan, places: Mapping[str, tuple[int, int]]) -> frozenset[str]:
    """Return the modules whose calls are in several stages: every call begins a block of its own.

    Args:
        plan: The plan.
        places: Stage and IPU by block; empty for no placement.

    Raises:
        LoweringError: Such a module has weights, and its calls are on several IPUs.
    """
    first: dict[str, tuple[int, int]] = {}
    found = set()
    for block in plan.blocks if places else ():
        module, (stage, ipu) = module_of(block), places[block.name]
        part = share_of(block.name)
        if not module or (part and part[1][0]):  # later shares begin within the call of the first
            continue
        home = first.setdefault(module, (stage, ipu))
        if home[0] != stage:
            found.add(module)
        if home[1] != ipu and block.parameters:
            raise LoweringError(
                f"module {module!r} is called on IPUs {home[1]} and {ipu}, but its weights are on "
                "one; put its blocks onto one IPU"
            )
    return frozenset(found)


def _check_stage_openers(annotations: list[Annotation]) -> None:
    for places in (
        [(a.stage, a) for a in annotations],
        [(a.inference[0], a) for a in annotations if a.inference],
    ):
        first: dict[int, Annotation] = {}
        for stage, annotation in places:
            opener = first.setdefault(stage, annotation)
            if opener is annotation and not annotation.module and stage > 0:
                raise LoweringError(
                    f"stage {stage} begins with {annotation.block!r}, which is no module's "
                    "call; BeginBlock needs one: put it into the stage of the block before it"
                )
