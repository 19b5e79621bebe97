"""Time every block of a captured model, forward and backward, on this machine."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import quantiles
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from ipu_pipeline.backends.local.measure.cache import load_measurements, store_measurements
from ipu_pipeline.backends.local.measure.machine import on_threads
from ipu_pipeline.capture.captured import CapturedModel
from ipu_pipeline.capture.patches import fused_gelu, preserved_state
from ipu_pipeline.capture.programs import Program, program_signature
from ipu_pipeline.errors import CaptureError
from ipu_pipeline.ops.linear import adding_to_grad
from ipu_pipeline.ops.random import block_scope
from ipu_pipeline.ops.threads import threads_per_stage

# All blocks are visited so often: what slows the machine for a second then falls on one visit.
VISITS = 3
RUNS = 3  # of a block that count, per visit
OTHER_BYTES = 48 * 1024 * 1024  # more than a device's part of the caches
LONGEST_S = 0.7  # stop repeating a block in a visit after this time, once a run has counted

# Seconds of the forward and of the backward passes of one thread's runs.
Runs = tuple[list[float], list[float]]


def profile_blocks(
    captured: CapturedModel, batch: Mapping[str, Tensor], *, num_devices: int
) -> dict[str, tuple[float, float]]:
    """Measure the blocks; equal blocks are measured once, known ones are read from disk.

    Args:
        captured: A model with real weights.
        batch: The example batch that it was captured with; its values are used.
        num_devices: Stages that will run at the same time: so many copies of a block are timed
            together, each with its share of the cores.

    Returns:
        Forward and backward seconds of one microbatch by block name.

    Raises:
        CaptureError: The model lives on the meta device: there is nothing to run.
    """
    if any(parameter.is_meta for parameter in captured.model.parameters()):
        raise CaptureError(
            "a model on the meta device cannot be profiled; load its weights, or use "
            "costs='analytic'"
        )
    name = f"blocks-{num_devices}x{threads_per_stage(num_devices)}"
    known = load_measurements(name, dict[str, tuple[float, float]]) or {}
    signatures = {p.name: program_signature(p, captured.specs) for p in captured.programs}
    if any(signature not in known for signature in signatures.values()):
        with preserved_state(captured.model, captured._trace.changing.values()):
            _measure_missing(captured, batch, num_devices, signatures, known)
        store_measurements(name, known)
    return {block: known[signature] for block, signature in signatures.items()}


def _measure_missing(
    captured: CapturedModel,
    batch: Mapping[str, Tensor],
    num_devices: int,
    signatures: Mapping[str, str],
    known: dict[str, tuple[float, float]],
) -> None:
    values: dict[str, Any] = {name: batch[name] for name in captured.inputs}
    with torch.no_grad():
        captured.prelude(captured.programs).run(values)
        for program in captured.programs:
            with block_scope("profile", program.name):
                program.run(values)
    missing: dict[str, Program] = {}
    for program in captured.programs:
        if signatures[program.name] not in known:
            missing.setdefault(signatures[program.name], program)
    found: dict[str, list[Runs]] = {signature: [] for signature in missing}
    for _ in range(VISITS):
        for signature, program in missing.items():
            found[signature] += _measure(program, values, num_devices, captured)
    for signature, visits in found.items():
        forward_s, backward_s = (
            _undisturbed([s for runs in visits for s in runs[which]]) for which in (0, 1)
        )
        known[signature] = (forward_s, backward_s)


def _measure(
    program: Program, values: Mapping[str, Any], num_devices: int, captured: CapturedModel
) -> list[Runs]:
    """Visit a block: run it on as many threads as there are devices."""
    specs = captured.specs
    modules = _one_for_each(program.module, num_devices)

    def work() -> Runs:
        inputs = [
            values[n].detach().requires_grad_(specs[n].requires_grad)
            if isinstance(values[n], Tensor) and specs[n].requires_grad
            else values[n]
            for n in program.inputs
        ]
        own = replace(program, module=modules.pop())
        return _time_runs(own, inputs, training=captured.training)

    return on_threads(work, num_devices)


def _one_for_each(module: GraphModule, num_devices: int) -> list[GraphModule]:
    """Return copies of a block, because no two stages add to the gradients of the same weights."""
    try:
        return [module, *(copy.deepcopy(module) for _ in range(num_devices - 1))]
    except (TypeError, RuntimeError):  # it holds something that cannot be copied, such as a lock
        return [module] * num_devices


def _undisturbed(seconds: list[float]) -> float:
    """Return the lower quartile: other programs only ever make a run slower."""
    return quantiles(seconds, n=4)[0] if len(seconds) > 1 else seconds[0]


def _time_runs(program: Program, inputs: list[Any], *, training: bool) -> Runs:
    """Time each run but the first, as a block runs in a stage: nothing of it is in a cache."""
    forward, backward = [], []
    others = torch.zeros(OTHER_BYTES // 4)
    began = time.perf_counter()
    for run in range(1 + RUNS):
        others.add_(1)  # what the stage's other blocks do between two runs of this one
        started = time.perf_counter()
        grad = torch.enable_grad() if training else torch.no_grad()
        with grad, block_scope("profile", program.name), fused_gelu:
            outputs = program(*inputs)
        forward_s = time.perf_counter() - started
        backward_s = _backward_s(outputs, inputs, others) if training else 0.0
        if run > 0:
            forward.append(forward_s)
            backward.append(backward_s)
            if time.perf_counter() - began > LONGEST_S:
                break
    return forward, backward


def _backward_s(outputs: tuple[Any, ...], inputs: Sequence[Any], others: Tensor) -> float:
    roots = [t for t in outputs if isinstance(t, Tensor) and t.requires_grad]
    if not roots:
        return 0.0
    seeds = [torch.ones_like(root) for root in roots]
    others.add_(1)
    started = time.perf_counter()
    with adding_to_grad():
        torch.autograd.backward(roots, seeds)
    seconds = time.perf_counter() - started
    for value in inputs:
        if isinstance(value, Tensor):
            value.grad = None  # in a stage its producer takes it, nothing is added up
    return seconds
