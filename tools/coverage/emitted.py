"""One model class for IPUs: what is planned is emitted, and trains a step on the stand-in.

It is planned for 2, 4 and 8 stages. Every bundle is checked as its ``run.py`` does before it
compiles: every module is found, and the model, run once on the host, comes to the stages in their
order. The first of the plans runs.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import set_seed

from ipu_pipeline.backends.ipu.annotations import annotate
from ipu_pipeline.backends.ipu.backend import BACKEND
from ipu_pipeline.backends.ipu.bundle import emit
from ipu_pipeline.backends.ipu.runtime.checks import BundleError, check_blocks, check_order
from ipu_pipeline.backends.ipu.runtime.device import make_options
from ipu_pipeline.backends.ipu.runtime.files import read_files
from ipu_pipeline.backends.ipu.runtime.placement import Placement, find_modules
from ipu_pipeline.backends.ipu.runtime.static_graph import DeviceForward
from ipu_pipeline.backends.ipu.settings import settings_for
from ipu_pipeline.capture import CapturedModel, capture, model_identity
from ipu_pipeline.capture.patches import preserved_state
from ipu_pipeline.errors import PipelineError
from ipu_pipeline.ir.machines import machine_by_name
from ipu_pipeline.ir.plan import Plan
from ipu_pipeline.planner.backend import Workload
from ipu_pipeline.planner.price import best_split, make_plan
from ipu_pipeline.planner.search import Constraints
from ipu_pipeline_emulator import install
from tools.coverage.check import (
    ALLOWED,
    LEARNING_RATE,
    Say,
    loss_difference,
    recorded,
    step_difference,
)
from tools.coverage.classes import ModelClass
from tools.coverage.eager import (
    Batch,
    EagerError,
    differ,
    eager_step,
    model_and_batches,
    own_values,
)
from tools.coverage.record import Record, Result, one_line
from tools.coverage.tiny_draft import ROWS

STAGES = (2, 4, 8)


def check_emitted(item: ModelClass, say: Say = lambda _: None) -> Record:
    """Plan one class for a pod and emit every plan; nothing is raised."""
    return recorded(_check, item, say)


def _check(item: ModelClass, say: Say, facts: dict[str, Any]) -> tuple[Result, str]:
    """Fill in ``facts`` on the way; return the result and its reason."""
    facts["stages"] = ()
    say("eager-fails")
    try:
        model, (part, *_) = model_and_batches(item)
    except EagerError as error:
        return "eager-fails", str(error)
    facts["inputs"] = tuple(part)
    with torch.no_grad():  # some models change their own parts in their first pass, for good
        model(**own_values(part))
    say("crash")
    try:
        captured = capture(model, own_values(part), self_check=False)
    except PipelineError as error:
        return "capture-refused", one_line(error)
    facts["blocks"] = len(captured.graph.blocks)
    frozen = captured.glue.unsteady or captured.glue.frozen
    if frozen:  # as compiler.plan says it for a backend that does not replay the model's code
        return "capture-refused", frozen
    refused, first = "", None
    for depth in STAGES:
        try:
            plan = _planned(captured, depth)
        except PipelineError as error:
            refused = refused or f"{depth} stages: {one_line(error)}"
            continue
        try:
            with tempfile.TemporaryDirectory() as folder:
                _checked(Path(folder), plan, model, part)
        except Exception as error:
            return "emit-refused", f"{depth} stages: {one_line(error)}"
        facts["stages"] = (*facts["stages"], depth)
        first = first or plan
    if first is None:
        return "plan-refused", refused
    say("step-fails")
    found, reason = _ran(model, first, part)
    return found, "; ".join(filter(None, (reason, refused)))


def _checked(folder: Path, plan: Plan, model: nn.Module, part: Batch) -> None:
    """Emit a plan, and check the bundle as its run.py does before it compiles."""
    emit(plan, settings_for(plan), folder)
    _, settings, blocks = read_files(folder)
    check_blocks(blocks, settings["annotated_blocks"], settings)
    modules = find_modules(model, [b["module"] for b in blocks], plan.model.parameters)
    check_order(model, blocks, modules, own_values(part))


def _planned(captured: CapturedModel, depth: int) -> Plan:
    graph, pod = captured.graph, machine_by_name("pod16")
    limits = Constraints(num_stages=depth, num_microbatches=4 * depth, schedule="popart")
    settings = BACKEND.settings(graph, None, limits)
    work = Workload(graph, pod, "popart", limits.num_microbatches, 1, settings)
    return make_plan(model_identity(captured.model), work, best_split(work, limits))


def _ran(model: nn.Module, plan: Plan, part: Batch) -> tuple[Result, str]:
    """Train one step on the stand-in; compare it with the model alone."""
    tensors = [value for value in part.values() if isinstance(value, Tensor)]
    if any(value.ndim == 0 or len(value) != ROWS for value in tensors):
        return "pass", "not run: axis 0 of its inputs is not the sample"
    single = eager_step(model, [part])
    if differ(single, eager_step(model, [part])):
        return "nondeterministic", "two steps with the same seed differ"
    # As many as the device runs: each draws random numbers of its own.
    expected = eager_step(model, [part] * (plan.num_microbatches * plan.replicas))
    weights = {name: value.detach().clone() for name, value in model.named_parameters()}
    try:
        with preserved_state(model), install(force=True) as poptorch:
            loss, stepped = _step(model, plan, part, poptorch)
    except BundleError as error:
        return "program-refused", one_line(error)
    except Exception as error:
        return "step-fails", one_line(error)
    worst = max(
        loss_difference(loss, expected.loss),
        step_difference(stepped, expected.gradients, weights),
    )
    if not worst[0] <= ALLOWED:
        return "differs", f"{worst[1]} by {worst[0]:.2g} of its scale"
    return "pass", ""


def _step(
    model: nn.Module, plan: Plan, part: Batch, poptorch: Any
) -> tuple[float, dict[str, Tensor]]:
    """Return the loss and the weights after a step in which all microbatches are the same."""
    settings = {**settings_for(plan).to_json(), "output_mode": "all"}
    places = [item.to_json() for item in annotate(plan)]
    placement = Placement(model, places, plan.model.parameters, poptorch)
    forward = DeviceForward(model, poptorch, settings)
    copies = settings["gradient_accumulation_steps"] * settings["replication_factor"]
    batch = {n: torch.cat([v] * copies) if isinstance(v, Tensor) else v for n, v in part.items()}
    try:
        options = make_options(settings, poptorch)
        options.setExecutionStrategy(placement.strategy())
        optimizer = poptorch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
        executor = poptorch.trainingModel(model, options, optimizer)
        try:
            set_seed(0)  # the stand-in draws from torch's generator, as eager_step does
            given = forward.inputs(batch, ROWS, training=True, build=True)
            losses = executor(**given)
            executor.copyWeightsToHostIfNeeded()
        finally:
            executor.destroy()
        stepped = {name: value.data.clone() for name, value in model.named_parameters()}
        return float(losses.mean()), stepped
    finally:
        forward.restore()
        placement.undo()
