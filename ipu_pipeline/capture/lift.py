"""What is made of a recorded run afterwards: inputs, late values and modes of its calls.

A value of the glue that differs in another run becomes an input of the graph, or behind a value
that Python reads in the run a node; a tensor that the glue keeps gets a node that hands it over.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, fx, nn

from ipu_pipeline.capture.calls import ModeCall
from ipu_pipeline.capture.glue import Glue, Path, member_at, placed
from ipu_pipeline.capture.reads import HostValue, KeptTensor
from ipu_pipeline.capture.values import TensorMeta, computed_from
from ipu_pipeline.errors import CaptureError

if TYPE_CHECKING:
    from ipu_pipeline.capture.trace import Trace


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


def placeholder(graph: fx.Graph, name: str) -> fx.Node:
    """Return a new input of a graph."""
    with graph.inserting_before(next(iter(graph.nodes))):
        node = graph.placeholder(name)
    node.meta["scope"] = ""
    return node


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
