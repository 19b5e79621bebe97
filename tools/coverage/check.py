"""One model class: captured, planned for 2 and 4 stages, trained one step, compared with eager."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import set_seed

from ipu_pipeline.backends.local.executable import LocalExecutable
from ipu_pipeline.capture import CapturedModel, capture, model_identity
from ipu_pipeline.capture.patches import preserved_state
from ipu_pipeline.compiler import compile as compile_plan
from ipu_pipeline.ir.machine import Device, Link, Machine
from ipu_pipeline.ir.plan import Plan
from ipu_pipeline.ops.linear import torchs_products
from ipu_pipeline.planner.backend import Workload
from ipu_pipeline.planner.price import counted_costs, make_plan
from ipu_pipeline.planner.search import Constraints, solve
from ipu_pipeline.stages.executable import Executable
from tools.coverage.classes import ModelClass
from tools.coverage.eager import (
    MICROBATCHES,
    Batch,
    EagerError,
    Outcome,
    eager_step,
    model_and_batches,
    own_values,
    why_not_repeatable,
)
from tools.coverage.record import Record, Result, one_line
from tools.coverage.tiny_draft import ROWS

STAGES = (2, 4)
EXACT = 1e-6  # of the scale of a gradient
ALLOWED = 1e-4
LEARNING_RATE = 0.1
_SMALLEST_SCALE = 1e-3  # of the largest gradient of the model: below it, rounding is all there is
_MACHINE = Machine(
    "coverage",
    tuple(Device(f"cpu{n}", 8 * 10**9, {"float32": 5e10}, 1e10) for n in range(max(STAGES))),
    Link(bytes_per_s=1e10),
    shared_memory=True,
)
# Called with what the result is if the process does not come back from what follows.
Say = Callable[[Result], None]


class _Finding(Exception):
    """Ends a check with a result other than ``pass``."""

    def __init__(self, result: Result, reason: str) -> None:
        super().__init__(reason)
        self.result = result
        self.reason = reason


def recorded(
    check: Callable[[ModelClass, Say, dict[str, Any]], tuple[Result, str]],
    item: ModelClass,
    say: Say,
) -> Record:
    """Check one class, with one thread and without warnings of its model and config.

    Args:
        check: Returns the result and its reason, and fills in other fields of the record.
        item: The class.
        say: For ``check``.
    """
    start = time.perf_counter()
    torch.set_num_threads(1)
    facts: dict[str, Any] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result, reason = check(item, say, facts)
    seconds = round(time.perf_counter() - start, 2)
    return Record(item.name, item.architecture, item.task, result, reason, seconds=seconds, **facts)


def check_class(item: ModelClass, say: Say = lambda _: None) -> Record:
    """Check one class; nothing is raised."""
    with torchs_products():
        return recorded(_check, item, say)


def _check(item: ModelClass, say: Say, facts: dict[str, Any]) -> tuple[Result, str]:
    try:
        return _found(item, say, facts)
    except _Finding as finding:
        return finding.result, finding.reason


def _found(item: ModelClass, say: Say, facts: dict[str, Any]) -> tuple[Result, str]:
    """Fill in ``facts`` on the way; return the result and its reason."""
    say("eager-fails")
    model, parts, expected = _with_eager(item, facts)
    say("crash")
    captured = _captured(model, parts[0], facts)
    facts["stages"], facts["difference"] = (), 0.0
    depths = sorted({min(depth, facts["blocks"]) for depth in STAGES})
    for depth in depths:
        try:
            plan = planned(captured, depth)
        except Exception as error:
            raise _Finding("plan-refused", f"{depth} stages: {one_line(error)}") from error
        worst, where = _trained(model, plan, parts, expected)
        facts["difference"] = max(facts["difference"], worst)
        if not worst <= ALLOWED:
            raise _Finding("differs", f"{where} by {worst:.2g} of its scale with {depth} stages")
        facts["stages"] = (*facts["stages"], depth)
    return "pass", "; ".join(_notes(facts, parts))


def _notes(facts: Mapping[str, Any], parts: Sequence[Batch]) -> list[str]:
    notes = []
    if facts["blocks"] < max(STAGES):
        notes.append(f"{facts['blocks']} blocks, so at most {facts['blocks']} stages")
    if facts["difference"] > EXACT:
        notes.append(f"equal to eager to {facts['difference']:.1g} of the scale only")
    if not _splittable(parts):
        notes.append("microbatches passed one by one: axis 0 of its inputs is not the sample")
    return notes


def _with_eager(item: ModelClass, facts: dict[str, Any]) -> tuple[nn.Module, list[Batch], Outcome]:
    """Return the model, microbatches, and what eager training makes of them."""
    try:
        model, parts = model_and_batches(item)
    except EagerError as error:
        raise _Finding("eager-fails", str(error)) from error
    facts["inputs"] = tuple(parts[0])
    with torch.no_grad():  # some models change their own parts in their first pass, for good
        model(**own_values(parts[0]))
    expected = eager_step(model, parts)
    reason = why_not_repeatable(model, parts, expected)
    if reason is not None:
        raise _Finding("nondeterministic", reason)
    return model, parts, expected


def _captured(model: nn.Module, part: Batch, facts: dict[str, Any]) -> CapturedModel:
    try:
        # The comparison of the steps is stricter than the self-check.
        captured = capture(model, own_values(part), self_check=False)
        facts["blocks"] = len(captured.graph.blocks)
    except Exception as error:
        raise _Finding("capture-refused", one_line(error)) from error
    return captured


def planned(captured: CapturedModel, depth: int) -> Plan:
    """Return the plan of a class for ``depth`` stages."""
    limits = Constraints(num_stages=depth, num_microbatches=MICROBATCHES)
    work = Workload(captured.graph, _MACHINE, limits.schedule, limits.num_microbatches)
    partition = solve(captured.graph, counted_costs(work), _MACHINE, limits)
    return make_plan(model_identity(captured.model), work, partition)


def _trained(
    model: nn.Module, plan: Plan, parts: Sequence[Batch], expected: Outcome
) -> tuple[float, str]:
    """Train one step; return the largest difference from eager, and of what. Undo the step."""
    weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    gradients: dict[str, Tensor] = {}

    def keep(*_: Any) -> None:
        gradients.update(
            {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        )

    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    optimizer.register_step_pre_hook(keep)
    try:
        with (
            preserved_state(model),
            compile_plan(
                model, plan, optimizer=optimizer, self_check=False, loss_weights="samples"
            ) as executable,
        ):
            set_seed(0)
            loss = _step(executable, parts)
            buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
            stepped = {name: p.detach().clone() for name, p in model.named_parameters()}
    except Exception as error:
        reason = one_line(error.__cause__ or error)
        raise _Finding("step-fails", f"{plan.num_stages} stages: {reason}") from error
    finally:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(weights[name])
    found = Outcome(loss, gradients, buffers)
    return max(
        loss_difference(loss, expected.loss),
        _difference("gradient of", found.gradients, expected.gradients),
        _difference("buffer", found.buffers, expected.buffers),
        step_difference(stepped, expected.gradients, weights),
    )


def _step(executable: Executable, parts: Sequence[Batch]) -> float:
    """Run one optimizer step; return the loss."""
    if _splittable(parts):
        joined = {
            name: torch.cat([part[name] for part in parts]) if isinstance(value, Tensor) else value
            for name, value in parts[0].items()
        }
        return executable.train_step(joined).loss
    assert isinstance(executable, LocalExecutable)
    shares = [1 / len(parts)] * len(parts)
    losses = executable.forward_backward_parts([own_values(part) for part in parts], shares)
    assert executable.optimizer is not None
    executable.optimizer.step()
    executable.optimizer.zero_grad()
    return sum(losses) / len(losses)


def _splittable(parts: Sequence[Batch]) -> bool:
    """Whether axis 0 of every tensor is the sample."""
    tensors = [value for value in parts[0].values() if isinstance(value, Tensor)]
    return all(value.ndim > 0 and len(value) == ROWS for value in tensors)


def loss_difference(found: float, expected: float) -> tuple[float, str]:
    """Return the difference of a loss as a part of it, and of what it is."""
    return abs(found - expected) / max(abs(expected), _SMALLEST_SCALE), "loss differs"


def _difference(
    what: str, found: Mapping[str, Tensor], expected: Mapping[str, Tensor]
) -> tuple[float, str]:
    """Return the largest difference as a part of the scale; an absent gradient is 0."""
    floor = _SMALLEST_SCALE * max((_largest(t) for t in expected.values()), default=1.0)
    worst = (0.0, "")
    for name in {**found, **expected}:
        one, other = found.get(name), expected.get(name)
        if one is None or other is None:
            delta = _largest(one if other is None else other)
            scale = floor
        else:
            delta, scale = _largest(one.double() - other.double()), _largest(other)
        worst = max(worst, (delta / max(scale, floor, 1e-30), f"{what} {name} differs"))
    return worst


def step_difference(
    stepped: Mapping[str, Tensor], gradients: Mapping[str, Tensor], weights: Mapping[str, Tensor]
) -> tuple[float, str]:
    """Compare the weights after the step with what SGD makes of the eager gradients."""
    wanted = {
        name: weight.add(gradients[name], alpha=-LEARNING_RATE) if name in gradients else weight
        for name, weight in weights.items()
    }
    return _difference("after the step, weight", stepped, wanted)


def _largest(tensor: Tensor | None) -> float:
    """Return the largest absolute value; infinite when any is not a number."""
    if tensor is None or tensor.numel() == 0:
        return 0.0
    found = float(tensor.double().abs().max())
    return found if found == found else float("inf")
