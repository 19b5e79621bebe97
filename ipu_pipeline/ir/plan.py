"""The plan: every decision and every predicted number, as one JSON file. Plain data, no torch.

The stage list may be edited by hand; :meth:`Plan.load` verifies it, and ``Plan.edited`` tells
that the predictions belong to another split.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ipu_pipeline.errors import PlanError
from ipu_pipeline.ir.graph import TensorSpec
from ipu_pipeline.ir.machine import Machine

PLAN_SCHEMA_VERSION = 1
# The block list comes from these two: a plan made under other versions is refused.
BINDING_LIBRARIES = ("ipu-pipeline", "transformers")
RECORDED_LIBRARIES = (*BINDING_LIBRARIES, "torch")


@dataclass(frozen=True)
class ModelIdentity:
    """Which model a plan is for.

    Attributes:
        model_class: Class name.
        parameters: ``shape dtype`` text by parameter name, such as ``384x384 float32``.
    """

    model_class: str
    parameters: Mapping[str, str] = field(hash=False)

    @cached_property
    def fingerprint(self) -> str:
        """Hex digest of class and parameters."""
        text = json.dumps(asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def differences(self, other: ModelIdentity) -> list[str]:
        """Return what differs in ``other``, one readable line each; empty when equal."""
        lines = []
        if self.model_class != other.model_class:
            lines.append(f"class: plan {self.model_class}, model {other.model_class}")
        for name in [*self.parameters, *(n for n in other.parameters if n not in self.parameters)]:
            mine, theirs = self.parameters.get(name), other.parameters.get(name)
            if mine != theirs:
                lines.append(f"{name}: plan {mine or 'absent'}, model {theirs or 'absent'}")
        return lines


@dataclass(frozen=True)
class PlannedTable:
    """The table of a block: what serialization cuts into slices.

    Attributes:
        parameter: First name of the parameter.
        rows: Its entries, such as the size of a vocabulary.
        width: Numbers in a row.
        use: ``lookup`` (an embedding) or ``projection`` (an output head).
        large: Whether it is a large table, whose block is serialized when none is named.
    """

    parameter: str
    rows: int
    width: int
    use: str
    large: bool


@dataclass(frozen=True)
class PlannedBlock:
    """One block with its price as the solver saw it. Times and bytes are for one microbatch.

    ``table`` is ``None`` where the block has none.
    """

    name: str
    kind: str
    num_parameters: int
    weight_bytes: int
    forward_flops: int
    forward_s: float
    backward_s: float
    stash_bytes: int
    table: PlannedTable | None = None


@dataclass(frozen=True)
class PlannedStage:
    """One stage: where it runs, what it holds, and what was predicted for it.

    Attributes:
        device: Position of its device in the machine.
        blocks: Block names in execution order.
        recompute: Those of its blocks whose forward pass runs again in the backward pass.
        serialize: Slices by block name, for blocks that run in more than one slice.
        table_slices: First slice and the one behind the last that this stage holds of the table
            of a block, where several consecutive stages hold it; the block itself is in the last.
        forward_s: Predicted seconds of one microbatch's forward pass.
        backward_s: Predicted seconds of one microbatch's backward pass, recompute included.
        transfer_s: Predicted seconds of one microbatch's transfers.
        memory_bytes: Predicted peak bytes on the device for this stage.
        in_flight: Most microbatches whose activations it holds at one time.
        weight_bytes: Part of ``memory_bytes`` that never changes; ``None`` in older files.
        stash_bytes: Part of ``memory_bytes`` for each microbatch in flight; ``None`` likewise.
    """

    device: int
    blocks: tuple[str, ...]
    recompute: tuple[str, ...] = ()
    serialize: Mapping[str, int] = field(default_factory=dict, hash=False)
    forward_s: float = 0.0
    backward_s: float = 0.0
    transfer_s: float = 0.0
    memory_bytes: int = 0
    in_flight: int = 0
    weight_bytes: int | None = None
    stash_bytes: int | None = None
    table_slices: Mapping[str, tuple[int, int]] = field(default_factory=dict, hash=False)

    @property
    def total_s(self) -> float:
        """Predicted seconds of one microbatch on this stage."""
        return self.forward_s + self.backward_s + self.transfer_s


@dataclass(frozen=True)
class Plan:
    """A complete, serialisable compilation plan.

    Attributes:
        model: Which model it is for.
        machine: The machine it was made for.
        stages: In pipeline order.
        blocks: Every block with its price, in execution order.
        tensors: Tensors that cross between blocks.
        inputs: Model inputs of one microbatch.
        num_microbatches: Microbatches per optimizer step (gradient accumulation).
        replicas: Copies of the pipeline that share the data.
        schedule: ``1f1b`` or ``gpipe``.
        granularity: Granularity of the blocks: ``layer``, ``sublayer`` or ``op``.
        cost_source: ``analytic`` or ``profiled``.
        objective_s: Predicted seconds of one optimizer step.
        lower_bound_s: Proven: no split within the constraints is predicted faster.
        binding: What limits the plan, readable.
        tied_groups: Blocks that share a parameter.
        versions: Library versions it was made with.
        decision_digest: Digest of the decisions that the predictions belong to.
    """

    model: ModelIdentity
    machine: Machine
    stages: tuple[PlannedStage, ...]
    blocks: tuple[PlannedBlock, ...]
    tensors: tuple[TensorSpec, ...]
    inputs: tuple[TensorSpec, ...]
    num_microbatches: int
    replicas: int = 1
    schedule: str = "1f1b"
    granularity: str = "layer"
    cost_source: str = "analytic"
    objective_s: float = 0.0
    lower_bound_s: float = 0.0
    binding: str = ""
    tied_groups: tuple[tuple[str, ...], ...] = ()
    versions: Mapping[str, str] = field(default_factory=lambda: library_versions(), hash=False)
    decision_digest: str = ""

    @property
    def num_stages(self) -> int:
        """Pipeline depth."""
        return len(self.stages)

    @property
    def objective(self) -> float:
        """Predicted seconds of one optimizer step."""
        return self.objective_s

    @property
    def lower_bound(self) -> float:
        """Proven lower bound of the objective, in seconds."""
        return self.lower_bound_s

    @property
    def gap(self) -> float:
        """Relative gap ``(objective - lower bound) / objective``; 0 means proven optimal."""
        if self.objective_s <= 0:
            return 0.0
        return max(0.0, (self.objective_s - self.lower_bound_s) / self.objective_s)

    @property
    def micro_batch_size(self) -> int:
        """Samples of one microbatch."""
        return next((spec.shape[0] for spec in self.inputs if spec.shape), 0)

    @property
    def total_batch_size(self) -> int:
        """Samples of one optimizer step: micro batch x microbatches x replicas."""
        return self.micro_batch_size * self.num_microbatches * self.replicas

    @cached_property
    def stage_of(self) -> Mapping[str, int]:
        """Stage index of every block."""
        return {name: index for index, stage in enumerate(self.stages) for name in stage.blocks}

    def digest(self) -> str:
        """Digest of the decisions: stages, devices, recompute, slices, schedule, microbatches."""
        decisions = [
            [stage.device, stage.blocks, sorted(stage.recompute), sorted(stage.serialize.items()),
             *([sorted(stage.table_slices.items())] if stage.table_slices else [])]
            for stage in self.stages
        ]  # fmt: skip
        text = json.dumps([decisions, self.schedule, self.num_microbatches, self.replicas])
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def edited(self) -> bool:
        """Whether the decisions were changed after the predictions were made."""
        return self.digest() != self.decision_digest

    def explain(self) -> str:
        """Return the plan as readable text: stages, prices, bound, and what limits it."""
        from ipu_pipeline.ir.text import explain_plan

        return explain_plan(self)

    def block_table(self) -> str:
        """Return the block list as a readable table."""
        from ipu_pipeline.ir.text import block_table

        return block_table(self.blocks)

    def check_model(self, other: ModelIdentity) -> None:
        """Refuse a model that the plan was not made for.

        Raises:
            PlanError: Class or parameters differ; the message lists the first differences.
        """
        lines = self.model.differences(other)
        if lines:
            shown = "\n  ".join(lines[:8])
            more = f"\n  ... and {len(lines) - 8} more" if len(lines) > 8 else ""
            raise PlanError(
                f"the plan was made for another model ({self.model.model_class}, fingerprint "
                f"{self.model.fingerprint}; this model has {other.fingerprint}):\n  {shown}{more}\n"
                "make a new plan for this model"
            )

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON, atomically."""
        path = Path(path)
        payload = {"schema_version": PLAN_SCHEMA_VERSION, **asdict(self)}
        partial = path.with_name(f".{path.name}.{os.getpid()}")
        partial.write_text(json.dumps(payload, indent=1) + "\n", encoding="utf-8")
        partial.replace(path)

    @classmethod
    def load(cls, path: str | Path, *, any_version: bool = False) -> Plan:
        """Read and verify a plan.

        Args:
            path: A file written by :meth:`save`, perhaps edited by hand.
            any_version: Accept a plan made with other versions of the binding libraries.

        Raises:
            PlanError: Unreadable, of another schema or library version, or an invalid stage list.
        """
        from ipu_pipeline.ir.verify import verify_plan

        try:
            raw = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise PlanError(f"cannot read the plan {path}: {error}") from error
        plan = plan_from_json(raw, str(path))
        if not any_version:
            check_versions(plan.versions, str(path))
        verify_plan(plan)
        return plan


def library_versions() -> dict[str, str]:
    """Return the installed versions of the libraries that a plan records."""
    found = {}
    for name in RECORDED_LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def check_versions(made_with: Mapping[str, str], source: str) -> None:
    """Refuse a plan made with other versions of the libraries that define the blocks.

    Raises:
        PlanError: A binding library's version differs.
    """
    installed = library_versions()
    lines = [
        f"{name}: plan {made_with.get(name, 'unknown')}, installed {installed[name]}"
        for name in BINDING_LIBRARIES
        if made_with.get(name) != installed[name]
    ]
    if lines:
        raise PlanError(
            f"{source} was made with other library versions ({'; '.join(lines)}); make the plan "
            "again, or load it with any_version=True if you know that the blocks are the same"
        )


def plan_from_json(raw: Any, source: str) -> Plan:
    """Build a plan from parsed JSON.

    Raises:
        PlanError: Wrong schema version, or a missing or unknown field.
    """
    if not isinstance(raw, dict) or "schema_version" not in raw:
        raise PlanError(f"{source} is not a plan: it has no schema_version")
    fields = dict(raw)
    found = fields.pop("schema_version")
    if found != PLAN_SCHEMA_VERSION:
        raise PlanError(
            f"{source}: plan schema version {found!r}, this library reads {PLAN_SCHEMA_VERSION}; "
            "make the plan again"
        )
    try:
        fields["model"] = ModelIdentity(**fields["model"])
        fields["machine"] = Machine.from_json(fields["machine"])
        fields["blocks"] = tuple(_block_from_json(block) for block in fields["blocks"])
        fields["stages"] = tuple(_stage_from_json(stage) for stage in fields["stages"])
        for key in ("tensors", "inputs"):
            fields[key] = tuple(_tensor_from_json(spec) for spec in fields[key])
        fields["tied_groups"] = tuple(tuple(group) for group in fields.get("tied_groups", ()))
        return Plan(**fields)
    except (KeyError, TypeError, AttributeError) as error:
        raise PlanError(f"{source} is not a plan: {error}") from error


def _block_from_json(raw: Mapping[str, Any]) -> PlannedBlock:
    fields = dict(raw)
    if fields.get("table") is not None:
        fields["table"] = PlannedTable(**fields["table"])
    return PlannedBlock(**fields)


def _stage_from_json(raw: Mapping[str, Any]) -> PlannedStage:
    fields = dict(raw)
    for key in ("blocks", "recompute"):
        value = fields.get(key, ())
        if not isinstance(value, list | tuple):
            raise TypeError(f"stage field {key!r} must be a list of block names, got {value!r}")
        fields[key] = tuple(value)
    fields["table_slices"] = {
        name: _slice_range(name, value) for name, value in fields.get("table_slices", {}).items()
    }
    return PlannedStage(**fields)


def _slice_range(name: str, value: Any) -> tuple[int, int]:
    if not isinstance(value, list | tuple) or [type(item) for item in value] != [int, int]:
        raise TypeError(f"table_slices of {name!r} must be two whole numbers, got {value!r}")
    return (value[0], value[1])


def _tensor_from_json(raw: Mapping[str, Any]) -> TensorSpec:
    fields = dict(raw)
    fields["shape"] = tuple(fields["shape"])
    fields["consumers"] = tuple(fields["consumers"])
    return TensorSpec(**fields)
