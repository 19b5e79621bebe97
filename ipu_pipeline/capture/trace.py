"""One recorded run of a model, and what is seen only when it has ended.

Buffers that the model has replaced, memory that it has written to unseen, reads that differ in
every run. Afterwards a value of the glue that differs in another run becomes an input of the graph,
or behind a value that Python reads in the run a node; a tensor that the glue keeps gets a node that
hands it over.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from ipu_pipeline.capture.calls import ModeCall, name_of
from ipu_pipeline.capture.compare import same_value
from ipu_pipeline.capture.fused import grouped_without_values
from ipu_pipeline.capture.glue import Glue, Path, member_at, placed
from ipu_pipeline.capture.leaves import Leaves
from ipu_pipeline.capture.patches import patched_calls, patched_methods, refused_seeds
from ipu_pipeline.capture.reads import HostValue, KeptTensor
from ipu_pipeline.capture.state import WriteBack
from ipu_pipeline.capture.tracer import Tracer
from ipu_pipeline.capture.values import (
    TensorMeta,
    computed_from,
    named_tensors,
    placeholder,
)
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


# ---- what is made of a recorded run afterwards -------------------------------------------------


def lift(trace: Trace, number: int, path: Path, value: Any, *, size: bool) -> None:
    """Make the argument at ``path`` of a recorded call, now ``value``, an input of the graph."""
    call, glue = trace.glue.calls[number], trace.glue
    if path in call.lifted:
        call.sized.discard(path)
        return
    if size:
        call.sized.add(path)
    assert call.node is not None
    name = call.lifted[path] = f"host_{len(glue.hosts)}"
    host = placeholder(trace.graph, name)
    kind, inside = path[0], path[1:]
    recorded = member_at((call.node.args, call.node.kwargs)[kind], inside)
    is_node = isinstance(recorded, fx.Node)
    glue.hosts[name] = trace.attributes[str(recorded.target)] if is_node else recorded
    for node in [call.node, *call.node.meta.get("copies", ())]:
        if kind == 0:
            node.args = placed(node.args, inside, host)
        else:
            node.kwargs = placed(node.kwargs, inside, host)
    if isinstance(value, Tensor):
        host.meta["spec"] = TensorMeta.of(value)


def settle_hosts(trace: Trace) -> None:
    """Let host values behind a value that Python reads in the run be nodes: they are known late."""
    inputs = {node.name: node for node in trace.graph.nodes if node.op == "placeholder"}
    read: fx.Node | None = None
    for call in trace.glue.calls:
        for name in dict.fromkeys(call.lifted.values()):
            if read is None or name not in inputs or call.node is None:
                continue
            target, given = f"_held.{name}", inputs.pop(name)
            recorded = trace.glue.hosts[name]
            trace.attributes[target] = HostValue(trace.glue.session, name, recorded)
            host = _held_node(trace, call.node, target, f"held_{name}")
            host.meta.update(given.meta, after=(read,), host=True)
            given.replace_all_uses_with(host)
            trace.graph.erase_node(given)
        read = call.node if call.is_late else read


def keep(trace: Trace, key: int) -> None:
    """Let the stage that computes what stands under ``key`` in the glue hand it over.

    Raises:
        CaptureError: It is computed from a term of a loss that is scaled.
    """
    node, glue = trace.glue.nodes[key], trace.glue
    if any(getattr(one.target, "__name__", "") == "scaled_term" for one in computed_from(node)):
        raise CaptureError(
            "the model's own code keeps a value that it computes from the loss, and that is a sum "
            "of means over different numbers of labels, so that each microbatch has its terms "
            "scaled; plan with microbatches=1, choose loss_weights, or keep the outputs instead"
        )
    target = f"_held.kept_{len(glue.kept)}"
    trace.attributes[target] = KeptTensor(glue.session, key)
    kept = _held_node(trace, node.next, target, target.rpartition(".")[2], (node,))
    kept.meta.update(after=(), effect=True)
    glue.kept.add(key)


def _held_node(
    trace: Trace, before: fx.Node, target: str, name: str, args: tuple[fx.Node, ...] = ()
) -> fx.Node:
    with trace.graph.inserting_before(before):
        node = trace.graph.create_node("call_module", target, args, name=name)
    node.meta["scope"] = before.meta.get("scope", "")
    return node


def settle_modes(glue: Glue, attributes: dict[str, Any]) -> None:
    """Note the modes of every leaf's call; where one leaf has several, let the call set them."""
    calls = [call for call in glue.calls if call.parts and call.node is not None]
    seen: dict[nn.Module, bool] = {}
    switched = set()
    for call in calls:
        for part, mode in zip(call.parts, call.modes, strict=True):
            if seen.setdefault(part, mode) is not mode:
                switched.add(part)
    for call in calls:
        assert call.node is not None
        call.node.meta["modes"] = tuple(zip(call.parts, call.modes, strict=True))
        if not switched.isdisjoint(call.parts):
            target = f"_held.modes_{len(attributes)}"
            function = attributes[str(call.node.target)]
            attributes[target] = ModeCall(function, call.parts, call.modes)
            call.node.target = target
