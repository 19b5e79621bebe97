"""What one microbatch asks of every stage of a plan: seconds on its device, and bytes.

The plan's own predictions are used as they are. Three things are not written in a plan and are
derived from it: which part of ``transfer_s`` belongs to which boundary and direction (from the
tensors that cross it and the machine's links), in plans of older versions how ``memory_bytes``
divides into weights, stash and workspace (from the prices of the blocks), and the seconds that
the solver's price adds once per optimizer step (update, all-reduce: what is left of
``objective_s``).

In a plan edited by hand the predictions belong to another split. Then everything is added up
again from the prices of the blocks; effects of serialization and the once-per-step seconds are
not known and left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ipu_pipeline.ir.machine import Link
from ipu_pipeline.ir.plan import Plan, PlannedBlock, PlannedStage
from ipu_pipeline.planner.options.cost_models import device_speeds
from ipu_pipeline.planner.search.objective import SCHEDULES, make_objective
from ipu_pipeline.planner.search.stage_price import StagePrice

_ROUNDING = 1e-9


@dataclass(frozen=True)
class Copies:
    """Seconds that the transfers of one microbatch occupy a stage's device.

    Attributes:
        activation_in_s: Activations from the stage before.
        activation_out_s: Activations to the stage behind.
        gradient_in_s: Gradients from the stage behind.
        gradient_out_s: Gradients to the stage before.
    """

    activation_in_s: float = 0.0
    activation_out_s: float = 0.0
    gradient_in_s: float = 0.0
    gradient_out_s: float = 0.0

    @property
    def forward_s(self) -> float:
        """Seconds during the forward pass."""
        return self.activation_in_s + self.activation_out_s

    @property
    def backward_s(self) -> float:
        """Seconds during the backward pass."""
        return self.gradient_in_s + self.gradient_out_s

    def scaled_to(self, total_s: float) -> Copies:
        """Return the same shares of another total."""
        own = self.forward_s + self.backward_s
        if own <= 0 or abs(own - total_s) <= _ROUNDING * own:
            return self
        factor = total_s / own
        return Copies(*(value * factor for value in vars(self).values()))


@dataclass(frozen=True)
class StageLoad:
    """One stage. Seconds and ``stash_bytes`` are for one microbatch.

    Attributes:
        device: Position of its device in the machine.
        forward_s: Compute of the forward pass.
        backward_s: Compute of the backward pass, recomputation included; 0 in inference.
        copies: Transfers over its boundaries.
        weight_bytes: Held all the time: weights, gradients, optimizer state.
        stash_bytes: Kept from a microbatch's forward to its backward pass.
        workspace_bytes: Needed only while a pass runs.
    """

    device: int
    forward_s: float
    backward_s: float
    copies: Copies
    weight_bytes: int
    stash_bytes: int
    workspace_bytes: int

    @property
    def price(self) -> StagePrice:
        """The same in the solver's form, to put into its closed forms."""
        copies, held = self.copies, self.weight_bytes + self.stash_bytes + self.workspace_bytes
        return StagePrice(self.forward_s, self.backward_s, copies.forward_s, copies.backward_s,
                     0.0, held, ())  # fmt: skip


def stage_loads(plan: Plan) -> tuple[StageLoad, ...]:
    """Return the load of every stage (module docstring)."""
    load = _derived if plan.edited else _predicted
    return tuple(load(plan, index, copies) for index, copies in enumerate(boundary_copies(plan)))


def is_training(plan: Plan) -> bool:
    """Whether the plan has backward passes."""
    blocks = any(block.backward_s > 0 for block in plan.blocks)
    return blocks or any(stage.backward_s > 0 for stage in plan.stages)


def once_per_step_s(plan: Plan, closed: float | None) -> float:
    """Seconds per optimizer step besides the passes: update and all-reduce of the slowest device.

    This is what the plan's objective holds beyond ``closed``, the closed form of its schedule;
    0 for an edited plan, whose objective belongs to another split.
    """
    if closed is None or plan.edited or plan.objective_s <= closed * (1 + _ROUNDING):
        return 0.0
    return plan.objective_s - closed


def closed_form_s(plan: Plan, loads: Sequence[StageLoad]) -> float | None:
    """Seconds of the passes by the solver's closed form; ``None`` where it has none.

    Source: :mod:`ipu_pipeline.planner.search.objective`.
    """
    schedule = next((name for name in SCHEDULES if name == plan.schedule), None)
    if schedule is None:
        return None
    try:
        form = make_objective(
            schedule, plan.num_stages, plan.num_microbatches, training=is_training(plan)
        )
    except ValueError:  # an edited plan may have too few microbatches for PopART
        return None
    return form.seconds([load.device for load in loads], [load.price for load in loads])


def boundary_copies(plan: Plan) -> tuple[Copies, ...]:
    """Seconds of the transfers of every stage, from the tensors that cross its boundaries.

    A tensor that skips stages is relayed, so it crosses every boundary on its way. Each tensor
    is one message; between stages of one device, or of one memory, nothing is sent.
    """
    forward, backward, training = [0.0], [0.0], is_training(plan)
    for boundary in range(plan.num_stages - 1):
        link = _link(plan, boundary)
        crossing = [
            spec
            for spec in plan.tensors
            if spec.producer is not None
            and plan.stage_of[spec.producer] <= boundary
            and any(plan.stage_of[name] > boundary for name in spec.consumers)
        ]
        seconds = [0.0 if link is None else link.transfer_s(spec.num_bytes) for spec in crossing]
        forward.append(sum(seconds))
        backward.append(
            sum(s for s, t in zip(seconds, crossing, strict=True) if t.requires_grad and training)
        )
    forward.append(0.0)
    backward.append(0.0)
    return tuple(
        Copies(forward[stage], forward[stage + 1], backward[stage + 1], backward[stage])
        for stage in range(plan.num_stages)
    )


def _link(plan: Plan, boundary: int) -> Link | None:
    first, second = plan.stages[boundary].device, plan.stages[boundary + 1].device
    if plan.machine.shared_memory or first == second:
        return None
    return plan.machine.link_between(first, second)


def _predicted(plan: Plan, index: int, copies: Copies) -> StageLoad:
    stage = plan.stages[index]
    if copies.forward_s + copies.backward_s <= 0 < stage.transfer_s:
        copies = _even(plan, index)
    weights, stash, _ = block_bytes(plan, stage)
    if stage.weight_bytes is not None and stage.stash_bytes is not None:
        weights, stash = stage.weight_bytes, stage.stash_bytes
    depth = max(1, stage.in_flight)
    stash = min(stash, stage.memory_bytes // depth)
    fixed = stage.memory_bytes - stash * depth
    weights = min(weights, fixed)
    return StageLoad(
        stage.device,
        stage.forward_s,
        stage.backward_s,
        copies.scaled_to(stage.transfer_s),
        weights,
        stash,
        fixed - weights,
    )


def _even(plan: Plan, index: int) -> Copies:
    """Equal shares of the boundaries a stage has, for plans that name no crossing tensor."""
    before, behind = float(index > 0), float(index < plan.num_stages - 1)
    back = float(is_training(plan))
    return Copies(before, behind, behind * back, before * back)


def _derived(plan: Plan, index: int, copies: Copies) -> StageLoad:
    stage = plan.stages[index]
    blocks = _blocks(plan, stage)
    speed = device_speeds(plan.machine)[stage.device]
    again = sum(block.forward_s for block in blocks if block.name in stage.recompute)
    weights, stash, workspace = block_bytes(plan, stage)
    return StageLoad(
        stage.device,
        sum(block.forward_s for block in blocks) / speed,
        (sum(block.backward_s for block in blocks) + again) / speed,
        copies,
        weights,
        stash,
        workspace,
    )


def _blocks(plan: Plan, stage: PlannedStage) -> list[PlannedBlock]:
    return [block for block in plan.blocks if block.name in stage.blocks]


def block_bytes(plan: Plan, stage: PlannedStage) -> tuple[int, int, int]:
    """Bytes of weights, of the stash of one microbatch, and of a recomputed block's tensors.

    A tensor that is kept for a backward pass is part of the stash of the block that makes it. A
    recomputed block keeps the others that enter it, too; the stage also keeps what enters the
    stage, where that is no memory of the stage before.
    """
    blocks, inside = _blocks(plan, stage), set(stage.blocks)
    recompute = set(stage.recompute)
    stash = sum(block.stash_bytes for block in blocks if block.name not in recompute)
    for spec in plan.tensors:
        if spec.kept:
            stash += spec.num_bytes * (spec.producer in recompute)
        else:
            stash += spec.num_bytes * len(recompute.intersection(spec.consumers))
        if not (spec.kept and plan.machine.shared_memory):
            stash += spec.num_bytes * _enters(plan, spec.producer, spec.consumers, stage)
    stash += sum(spec.num_bytes for spec in plan.inputs if inside.intersection(spec.consumers))
    workspace = max((block.stash_bytes for block in blocks if block.name in recompute), default=0)
    return sum(block.weight_bytes for block in blocks), stash, workspace


def _enters(
    plan: Plan, producer: str | None, consumers: tuple[str, ...], stage: PlannedStage
) -> bool:
    """Whether a tensor comes into ``stage`` from an earlier one, to be used or passed on."""
    here = plan.stage_of[stage.blocks[0]]
    if producer is None or plan.stage_of[producer] >= here:
        return False
    return any(plan.stage_of[name] >= here for name in consumers)
