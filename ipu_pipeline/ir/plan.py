"""The plan: every decision and every predicted number, as one JSON file. Plain data, no torch.

It carries the captured model (``graph``), so that it can be priced again without the model. The
stage list may be edited by hand: :meth:`Plan.load` verifies it and prices it again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from ipu_pipeline.errors import PlanError, shown
from ipu_pipeline.ir.codec import Amount, Count, from_json, read_json, to_json, write_json
from ipu_pipeline.ir.files import of_file
from ipu_pipeline.ir.graph import Block, BlockGraph, TensorSpec
from ipu_pipeline.ir.machine import Machine

Granularity = Literal["layer", "sublayer", "op"]

PLAN_SCHEMA_VERSION = 2
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
        text = json.dumps(to_json(self), sort_keys=True)
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
class PlannedStage:
    """One stage: where it runs, what it holds, and what was predicted for it.

    Attributes:
        device: Position of its device in the machine.
        blocks: Block names in execution order.
        recompute: Those of its blocks whose forward pass runs again in the backward pass.
        offload: Those of its blocks whose activations wait in host memory for the backward pass.
        serialize: Slices by block name, for blocks that run in more than one slice.
        table_slices: First slice and the one behind the last that this stage holds of the table
            of a block, where several consecutive stages hold it; the block itself is in the last.
        forward_s: Predicted seconds of one microbatch's forward pass.
        backward_s: Predicted seconds of one microbatch's backward pass, recompute included.
        transfer_s: Predicted seconds of one microbatch's transfers.
        memory_bytes: Predicted peak bytes on the device for this stage.
        in_flight: Most microbatches whose activations it holds at one time.
        weight_bytes: Part of ``memory_bytes`` that never changes.
        stash_bytes: Part of ``memory_bytes`` for each microbatch in flight.
        vocabulary_s: Predicted seconds of one microbatch's part of a vocabulary that is spread.
    """

    device: int
    blocks: tuple[str, ...]
    recompute: tuple[str, ...] = ()
    serialize: Mapping[str, int] = field(default_factory=dict, hash=False)
    forward_s: Amount = 0.0
    backward_s: Amount = 0.0
    transfer_s: Amount = 0.0
    memory_bytes: Count = 0
    in_flight: Count = 0
    weight_bytes: Count = 0
    stash_bytes: Count = 0
    table_slices: Mapping[str, tuple[int, int]] = field(default_factory=dict, hash=False)
    offload: tuple[str, ...] = ()
    vocabulary_s: Amount = 0.0


@dataclass(frozen=True)
class VocabularyRows:
    """Which stage holds which rows of the vocabulary's tables.

    They are those of the output projection whose logits only the loss reads, and of every lookup
    in the same table or in one of as many rows.

    Attributes:
        rows: Stage, first row and the one behind the last of every share, in the order of the rows.
    """

    rows: tuple[tuple[Count, Count, Count], ...]

    @property
    def size(self) -> int:
        """Number of rows of a table."""
        return self.rows[-1][2]

    @property
    def by_stage(self) -> Mapping[int, tuple[int, int]]:
        """First row and the one behind the last of every stage that holds some."""
        return {stage: (first, end) for stage, first, end in self.rows}


@dataclass(frozen=True)
class Plan:
    """A complete, serialisable compilation plan.

    Attributes:
        model: Which model it is for.
        machine: The machine it was made for.
        stages: In pipeline order.
        graph: The captured model, for one microbatch.
        num_microbatches: Microbatches per optimizer step of one replica (gradient accumulation).
        replicas: Copies of the pipeline that share the data.
        schedule: Name of the schedule, such as ``1f1b``.
        granularity: Granularity of the blocks: ``layer``, ``sublayer`` or ``op``.
        cost_source: Where the prices of the blocks come from: ``analytic``, ``profiled``, ``ipu``.
        measured_s: Measured forward and backward seconds by block, where they are profiled.
        settings: The backend's own settings, as JSON data.
        batch_axes: Axis of samples by input, where the user has said it; ``None``: every
            microbatch gets that input whole.
        vocabulary: How output projection, loss and input embeddings are spread over stages;
            ``None``: blocks are whole.
        objective_s: Predicted seconds of one optimizer step.
        lower_bound_s: Proven: no split within the constraints is predicted faster; 0: not known.
        binding: What limits the plan, readable.
        misfits: One sentence for every device that the plan does not fit on.
        versions: Library versions it was made with.
        decision_digest: Digest of the decisions that were first predicted.
    """

    model: ModelIdentity
    machine: Machine
    stages: tuple[PlannedStage, ...]
    graph: BlockGraph
    num_microbatches: int
    replicas: int = 1
    schedule: str = "1f1b"
    granularity: Granularity = "layer"
    cost_source: str = "analytic"
    measured_s: Mapping[str, tuple[Amount, Amount]] = field(default_factory=dict, hash=False)
    settings: Mapping[str, Any] = field(default_factory=dict, hash=False)
    batch_axes: Mapping[str, int | None] = field(default_factory=dict, hash=False)
    objective_s: Amount = 0.0
    lower_bound_s: Amount = 0.0
    binding: str = ""
    misfits: tuple[str, ...] = ()
    versions: Mapping[str, str] = field(default_factory=lambda: library_versions(), hash=False)
    decision_digest: str = ""
    vocabulary: VocabularyRows | None = None

    @property
    def num_stages(self) -> int:
        """Pipeline depth."""
        return len(self.stages)

    @property
    def blocks(self) -> tuple[Block, ...]:
        """Every block, in execution order."""
        return self.graph.blocks

    @cached_property
    def tensors(self) -> tuple[TensorSpec, ...]:
        """Tensors that cross between blocks."""
        return tuple(spec for spec in self.graph.tensors if spec.consumers)

    @property
    def tied_groups(self) -> tuple[tuple[str, ...], ...]:
        """Blocks that share a parameter."""
        return self.graph.tied_groups

    @property
    def gap(self) -> float:
        """Relative gap ``(objective_s - lower_bound_s) / objective_s``; 0: proven optimal."""
        if self.objective_s <= 0:
            return 0.0
        return max(0.0, (self.objective_s - self.lower_bound_s) / self.objective_s)

    @property
    def micro_batch_size(self) -> int:
        """Samples of one microbatch."""
        return self.graph.micro_batch_size

    @property
    def total_batch_size(self) -> int:
        """Samples of one optimizer step: micro batch x microbatches x replicas."""
        return self.micro_batch_size * self.num_microbatches * self.replicas

    @cached_property
    def stage_of(self) -> Mapping[str, int]:
        """Stage index of every block."""
        return {name: index for index, stage in enumerate(self.stages) for name in stage.blocks}

    def digest(self) -> str:
        """Digest of the run (machine, settings, schedule, counts), a dash, and of the stages."""
        decisions: list[list[Any]] = [
            [stage.device, stage.blocks, sorted(stage.recompute), sorted(stage.serialize.items()),
             sorted(stage.table_slices.items()), *([sorted(stage.offload)] * bool(stage.offload))]
            for stage in self.stages
        ]  # fmt: skip
        if self.vocabulary is not None:
            decisions.append(["vocabulary", *self.vocabulary.rows])
        run = [self.machine.fingerprint(), to_json(self.settings), self.schedule, self.num_stages,
               self.num_microbatches, self.replicas]  # fmt: skip
        texts = (json.dumps(part, sort_keys=True) for part in (run, decisions))
        return "-".join(hashlib.sha256(text.encode()).hexdigest()[:12] for text in texts)

    @property
    def edited(self) -> bool:
        """Whether the decisions are not those that were first predicted."""
        return self.digest() != self.decision_digest

    @property
    def keeps_bound(self) -> bool:
        """Whether the lower bound was proven for this run: only the stages were edited."""
        return self.digest().split("-")[0] == self.decision_digest.split("-")[0]

    def explain(self) -> str:
        """Return the plan as readable text: stages, prices, bound, and what limits it."""
        from ipu_pipeline.ir.text import explain_plan

        return explain_plan(self)

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

    def to_json(self) -> dict[str, Any]:
        """Return the plan as JSON data, which :func:`plan_from_json` reads."""
        rest = to_json(replace(self, graph=replace(self.graph, blocks=())))
        del rest["graph"]
        return {"schema_version": PLAN_SCHEMA_VERSION, **rest, "graph": self.graph.to_json()}

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON: whole, or not at all."""
        write_json(path, self.to_json(), "graph")

    @classmethod
    def load(cls, path: str | Path, *, any_version: bool = False) -> Plan:
        """Read and verify a plan; one that was edited by hand is priced again.

        Args:
            path: A file written by :meth:`save`, perhaps edited by hand.
            any_version: Accept a plan made with other versions of the binding libraries.

        Raises:
            PlanError: Unreadable, of another schema or library version, an invalid stage list, or
                edited to what its machine cannot run; or what its price refuses.
        """
        from ipu_pipeline.ir.verify import verify_plan

        plan = plan_from_json(read_json(path, "the plan", PlanError, shown_texts=True), str(path))
        if not any_version:
            check_versions(plan.versions, str(path))
        with of_file(path):
            verify_plan(plan)
            if not plan.edited:
                return plan
            # The planner lies above this module: it is asked at run time, for edited plans only.
            from ipu_pipeline.planner.price import check_runs, priced

            check_runs(plan)
            return priced(plan)


def library_versions() -> dict[str, str]:
    """Return the installed versions of the libraries that a plan records."""
    return {name: _installed_version(name) for name in RECORDED_LIBRARIES}


@cache
def _installed_version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def check_versions(made_with: Mapping[str, str], source: str) -> None:
    """Refuse a plan made with other versions of the libraries that define the blocks.

    Raises:
        PlanError: A binding library's version differs.
    """
    installed = library_versions()
    lines = [
        f"{name}: plan {made_with.get(name, 'unknown'):.40}, installed {installed[name]}"
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
        PlanError: Wrong schema version, or a missing, unknown or wrong field.
    """
    if not isinstance(raw, dict) or "schema_version" not in raw:
        raise PlanError(f"{source} is not a plan: it has no schema_version")
    fields = dict(raw)
    found = fields.pop("schema_version")
    if found != PLAN_SCHEMA_VERSION:
        raise PlanError(
            f"{source}: plan schema version {shown(found)}, this library reads "
            f"{PLAN_SCHEMA_VERSION}; make the plan again"
        )
    if "graph" in fields:
        fields["graph"] = BlockGraph.from_json(fields["graph"], f"{source}, graph")
    return from_json(Plan, fields, source, PlanError)
