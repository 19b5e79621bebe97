"""One recorded run of a model, and what is seen only when it has ended.

Buffers that the model has replaced, memory that it has written to unseen, reads that differ in
every run.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from ipu_pipeline.capture.calls import name_of
from ipu_pipeline.capture.experts import grouped_without_values
from ipu_pipeline.capture.glue import Glue
from ipu_pipeline.capture.leaves import Leaves
from ipu_pipeline.capture.lift import settle_modes
from ipu_pipeline.capture.patches import patched_calls, patched_methods, refused_seeds
from ipu_pipeline.capture.reads import same_value
from ipu_pipeline.capture.state import WriteBack
from ipu_pipeline.capture.tracer import Tracer
from ipu_pipeline.capture.values import named_tensors
from ipu_pipeline.errors import CaptureError


@dataclass(frozen=True)
class Trace:
    """A recorded run.

    Attributes:
        graph: The nodes in execution order; its output is a dict of the model's results.
        attributes: What ``call_module`` and ``get_attr`` targets stand for.
        inputs: Names of the batch's tensors, one placeholder each.
        changing: Those of the model's own tensors that the run changed, by name.
        glue: The calls of the glue, for its replay.
    """

    graph: fx.Graph
    attributes: dict[str, Any]
    inputs: tuple[str, ...]
    changing: Mapping[str, Tensor]
    glue: Glue

    @property
    def results(self) -> Mapping[str, fx.Node]:
        """The model's results by name."""
        named = self.graph.output_node().args[0]
        assert isinstance(named, Mapping)
        return named  # type: ignore[return-value]


def trace(model: nn.Module, batch: Mapping[str, Any], leaves: Leaves) -> Trace:
    """Run ``model(**batch)`` once and record its glue.

    Raises:
        CaptureError: Something happens in the glue that cannot be replayed faithfully.
    """
    tracer = Tracer(model, leaves, kept=batch.values())
    inputs = [name for name, value in batch.items() if isinstance(value, Tensor)]
    for name in inputs:
        tracer.values.bind(batch[name], tracer.new_node("placeholder", name, meta_of=batch[name]))
        tracer.recorder.input(name, batch[name])
    try:
        hooks = tracer.module_call, tracer.function_apply, tracer.vmapped_call
        methods = patched_methods(model, tracer.function_apply)
        with patched_calls(model, *hooks), methods, refused_seeds(), tracer:
            output = model(**batch)
        tracer.draws.finish()
        _record_replaced(tracer)
        _check_arrays(tracer)
        results = dict(named_tensors(output))
        end = tracer.graph.output({name: tracer.values.node_of(t) for name, t in results.items()})
        end.meta["after"] = tracer.storages.record(end, results.values(), [])
        tracer.side_outputs.finish()
        glue = tracer.recorder.finish(output, tracer.values.final)
    finally:
        tracer.values.release()
        tracer.side_outputs.release()
        tracer.use.put_back()
    changed = {name for node in tracer.graph.nodes for name in node.meta.get("state", ())}
    glue.unsteady = _unsteady_read(tracer, changed)
    changing = {name: tracer.use.tensors[name] for name in sorted(changed)}
    glue.changing = frozenset(map(id, changing.values()))
    settle_modes(glue, tracer.attributes)
    return Trace(tracer.graph, tracer.attributes, tuple(inputs), changing, glue)


class _BackwardInsideError(Exception):
    """The model itself runs a backward pass inside its forward pass."""


def trace_once(
    model: nn.Module, batch: Mapping[str, Any], leaves: Leaves, *, on_meta: bool
) -> Trace:
    """Trace without keeping anything for a backward pass, unless the model runs one itself."""

    def refuse(_: None) -> Tensor:
        raise _BackwardInsideError

    try:
        with grouped_without_values() if on_meta else contextlib.nullcontext():
            try:
                with torch.autograd.graph.saved_tensors_hooks(lambda _: None, refuse):
                    return trace(model, batch, leaves)
            except _BackwardInsideError:
                return trace(model, batch, leaves)
    except RuntimeError as error:
        if on_meta and "meta" in str(error).lower():
            raise CaptureError(
                f"{type(model).__name__} reads tensor values in Python between its blocks, which "
                f"a model on the meta device does not have ({error}); capture it with real "
                "weights and a real batch"
            ) from error
        raise


def _record_replaced(tracer: Tracer) -> None:
    """Record ``self.buffer = value`` in the glue as a write into the buffer that there was.

    Raises:
        CaptureError: Another shape or dtype; or a block does so itself and others read it.
    """
    read = {name for node in tracer.graph.nodes for name in node.meta.get("reads", ())}
    for fqn, was, now in tracer.use.replaced():
        if id(was) not in tracer.fqns and fqn not in read:
            continue  # an attribute that every pass makes anew
        if tracer.values.known(now) is None:
            _check_not_shared(tracer, fqn)
            continue
        if (now.shape, now.dtype) != (was.shape, was.dtype):
            raise CaptureError(
                f"{type(tracer.model).__name__} replaces {fqn!r} ({tuple(was.shape)} {was.dtype})"
                f" by a {tuple(now.shape)} {now.dtype} tensor between its blocks; keep the "
                "shape, or replace it inside a block"
            )
        tracer.recorder.glue.written_back.add(fqn)
        node = tracer.held_call(WriteBack(), (was, now), {}, "replaced")
        tracer.use.start()
        tracer.use.writes.add(fqn)
        tracer.finish(node, (was, now), {}, None, [])


def _check_not_shared(tracer: Tracer, fqn: str) -> None:
    owner = tracer.model.get_submodule(fqn.rpartition(".")[0])
    for node in tracer.graph.nodes:
        held = tracer.attributes.get(str(node.target))
        inside = isinstance(held, nn.Module) and any(m is owner for m in held.modules())
        if fqn in node.meta.get("reads", ()) and not inside:
            raise CaptureError(
                f"a block of {type(tracer.model).__name__} replaces {fqn!r} by another tensor, "
                f"and {node.meta['scope'] or 'the model itself'!r} reads it, too; write into "
                f"it instead: {fqn}.copy_(value)"
            )


def _unsteady_read(tracer: Tracer, changed: set[str]) -> str:
    """Say which number Python reads from what the run has changed: the next one differs."""
    for node in tracer.graph.nodes:
        read = sorted(changed.intersection(node.meta.get("reads", ())))
        if node.meta.get("guard") and read:
            guard = tracer.attributes[str(node.target)]
            return (
                f"{guard.origin} reads {read[0]!r} in Python ({name_of(guard.read)}), and the "
                "model changes it in every forward pass; run it with target='local', compute "
                "with the tensor itself (index with (position + torch.arange(n)) % size), or "
                "keep that code inside a block"
            )
    return ""


def _check_arrays(tracer: Tracer) -> None:
    """Refuse writes to tensors that torch does not see.

    Raises:
        CaptureError: There is one.
    """
    for guard, array, tensor, version in tracer.arrays:
        if tensor._version == version and not same_value(array, guard.expected):
            raise CaptureError(
                f"{guard.origin} writes into the memory of a tensor through a numpy array "
                f"({name_of(guard.read)}); write into the tensor itself, or into a copy of the "
                "array (.numpy().copy())"
            )
    tracer.arrays.clear()
