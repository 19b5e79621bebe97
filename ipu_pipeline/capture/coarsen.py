"""Coarsen the nodes of a trace into blocks.

- A node computed from model inputs and constants alone belongs to the *prelude*: every stage
  that needs it computes it again.
- A leaf that starts a block opens one; every other node joins the latest block that it depends
  on, by value or by the order of in-place writes.
- Nodes that nothing needs are dropped; guards, writes to buffers and hooks on gradients are kept.
- Loss functions, ``logsumexp`` and what follows them in the last block form the block ``loss``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, fx, nn
from torch.nn import functional
from torch.nn.modules.loss import _Loss

from ipu_pipeline.capture.leaves import Leaves, has_parameters
from ipu_pipeline.capture.trace import Trace
from ipu_pipeline.capture.values import reached
from ipu_pipeline.errors import CaptureError
from ipu_pipeline.ir.graph import BlockKind

LOSS = "loss"
_LOSS_FUNCTIONS = frozenset(
    function
    for name, function in vars(functional).items()
    if callable(function) and (name.endswith("_loss") or "cross_entropy" in name)
)


@dataclass(frozen=True)
class BlockNodes:
    """One block: its nodes in execution order, and the module whose call opens it."""

    name: str
    kind: BlockKind
    module: str | None
    nodes: tuple[fx.Node, ...]


@dataclass(frozen=True)
class Coarse:
    """A trace cut into blocks.

    Attributes:
        blocks: In execution order.
        prelude: Nodes computed from inputs and constants alone, in execution order.
        results: Result nodes by name.
        changing: Those of the model's own tensors that a forward pass changes, by name.
    """

    blocks: tuple[BlockNodes, ...]
    prelude: tuple[fx.Node, ...]
    results: dict[str, fx.Node]
    changing: Mapping[str, Tensor]


def dependencies(node: fx.Node) -> Iterable[fx.Node]:
    """Return all nodes that must run before ``node``."""
    yield from node.all_input_nodes
    yield from node.meta.get("after", ())


def is_attribute(node: fx.Node) -> bool:
    """Whether ``node`` reads a parameter, buffer or constant; such nodes belong to no block."""
    return node.op == "get_attr"


def coarsen(trace: Trace, *, training: bool) -> Coarse:
    """Assign every node that the results need, in training the loss, to a block or the prelude.

    Raises:
        CaptureError: No block was found.
    """
    results = {name: node for name, node in trace.results.items() if name == LOSS or not training}
    live = _live(trace, results.values(), trace.graph.output_node().meta.get("after", ()))
    prelude = _prelude(trace, live)
    assigned = _assign(trace, live, prelude)
    names: dict[str, fx.Node | None] = {
        node.meta["starts"]: node for node in assigned if "starts" in node.meta
    }
    if not names:
        raise CaptureError("the model calls no module with parameters; there is nothing to place")
    _split_off_loss(trace, assigned, names)
    for node in assigned:
        if node.meta.get("host"):  # numbers do not cross from stage to stage
            assigned[node] = assigned[next(iter(node.users))]
    kinds = _kinds(assigned, names, trace.glue.leaves)
    blocks = []
    for name, opener in names.items():
        nodes = tuple(n for n in trace.graph.nodes if assigned.get(n) == name)
        module = opener.meta.get("module") if opener is not None else None
        blocks.append(BlockNodes(name, kinds[name], module, nodes))
    first = tuple(n for n in trace.graph.nodes if n in prelude)
    return Coarse(tuple(blocks), first, results, trace.changing)


def coarsen_reads(trace: Trace, *, training: bool) -> Coarse:
    """Assign nodes to blocks as :func:`coarsen` does, values that Python reads in their order.

    A value that is computed from inputs alone can be read before the blocks run.
    """
    coarse = coarsen(trace, training=training)
    early = set(coarse.prelude)
    late: list[fx.Node] = []
    for call in trace.glue.calls:
        if not call.reads_values or call.node is None:
            continue
        node = call.node
        call.is_late = not trace.changing.keys().isdisjoint(node.meta["reads"]) or any(
            _holds_parameters(n, trace) if is_attribute(n) else n not in early
            for n in node.all_input_nodes
        )
        trace.attributes[str(node.target)].early = not call.is_late
        late += [node] if call.is_late else []
    for before, node in pairwise(late):
        node.meta["after"] = tuple(dict.fromkeys((*node.meta["after"], before)))
    return coarsen(trace, training=training) if len(late) > 1 else coarse


def _live(trace: Trace, results: Iterable[fx.Node], after: Iterable[fx.Node]) -> set[fx.Node]:
    kept = ("guard", "state", "effect")
    effects = (n for n in trace.graph.nodes if any(n.meta.get(key) for key in kept))
    return set(reached([*results, *after, *effects], dependencies))


def _prelude(trace: Trace, live: set[fx.Node]) -> dict[fx.Node, None]:
    found: dict[fx.Node, None] = {}
    for node in trace.graph.nodes:
        if node not in live or is_attribute(node) or node.op == "output":
            continue
        if node.op == "placeholder" or (
            not _must_be_placed(node, trace)
            and all(
                n in found or (is_attribute(n) and not _holds_parameters(n, trace))
                for n in dependencies(node)
            )
        ):
            found[node] = None
    return found


def _must_be_placed(node: fx.Node, trace: Trace) -> bool:
    """Whether computing ``node`` again on another stage would be wrong or wasteful."""
    if any(node.meta.get(key) for key in ("random", "guard", "state", "effect", "starts", "host")):
        return True
    if not trace.changing.keys().isdisjoint(node.meta.get("reads", ())):
        return True  # another stage would read it at another time
    target = trace.attributes.get(str(node.target)) if node.op == "call_module" else None
    if not isinstance(target, nn.Module):
        return False
    training = any(mode for _, mode in node.meta.get("modes", ()))
    updates_buffers = training and any(True for _ in target.buffers())
    return has_parameters(target) or updates_buffers


def _holds_parameters(node: fx.Node, trace: Trace) -> bool:
    found = trace.attributes.get(str(node.target))
    return isinstance(found, nn.Parameter) or (
        isinstance(found, nn.Module) and has_parameters(found)
    )


def _assign(trace: Trace, live: set[fx.Node], prelude: dict[fx.Node, None]) -> dict[fx.Node, str]:
    """Return the block name of every live node outside the prelude."""
    assigned: dict[fx.Node, str] = {}
    rank: dict[str, int] = {}
    waiting: list[fx.Node] = []  # parameter-only nodes before the first block
    latest = ""
    for node in trace.graph.nodes:
        if node not in live or node in prelude or is_attribute(node) or node.op == "output":
            continue
        if "starts" in node.meta:
            latest = node.meta["starts"]
            rank[latest] = len(rank)
            assigned[node] = latest
            assigned.update(dict.fromkeys(waiting, latest))
            waiting.clear()
            continue
        blocks = [assigned[n] for n in dependencies(node) if n in assigned]
        if blocks:
            assigned[node] = max(blocks, key=rank.__getitem__)
        elif latest:
            assigned[node] = latest
        else:
            waiting.append(node)
    return assigned


def _is_loss(node: fx.Node, trace: Trace) -> bool:
    if node.op == "call_module":
        return isinstance(trace.attributes[str(node.target)], _Loss)
    if node.target in ("logsumexp", torch.logsumexp):  # a z-loss reads the logits as a loss does
        return True
    return node.op == "call_function" and node.target in _LOSS_FUNCTIONS


def _split_off_loss(
    trace: Trace, assigned: dict[fx.Node, str], names: dict[str, fx.Node | None]
) -> None:
    """Move loss functions of the last block, and all that follows them, to a block ``loss``."""
    last = next(reversed(names))
    moved: set[fx.Node] = set()
    for node, block in assigned.items():
        if block != last or names[last] is node:
            continue
        if _is_loss(node, trace) or any(n in moved for n in dependencies(node)):
            moved.add(node)
    if moved and LOSS not in names:
        names[LOSS] = None
        assigned.update(dict.fromkeys(moved, LOSS))


def _kinds(
    assigned: dict[fx.Node, str], names: dict[str, fx.Node | None], leaves: Leaves
) -> dict[str, BlockKind]:
    """Tell embeddings (no layer before them), layers, and heads (behind the last layer) apart."""
    kinds: dict[str, BlockKind] = {}
    last_layer = ""
    behind_layer: dict[fx.Node, bool] = {}
    for node, block in assigned.items():
        is_layer = leaves.in_layer(str(node.meta.get("module") or node.meta.get("scope", "")))
        before = any(behind_layer.get(n, False) for n in dependencies(node))
        if node is names.get(block):
            kinds[block] = "layer" if is_layer else "head" if before else "embedding"
            last_layer = block if is_layer else last_layer
        behind_layer[node] = before or (is_layer and "starts" in node.meta)
    order = list(names)
    for name in order[: order.index(last_layer)] if last_layer else order:
        kinds[name] = "other" if kinds.get(name) == "head" else kinds.get(name, "other")
    if LOSS in names and names[LOSS] is None:
        kinds[LOSS] = "loss"
    return kinds
