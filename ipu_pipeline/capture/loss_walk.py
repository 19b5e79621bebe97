"""Finds the terms of a loss in the graph of a captured model, and multiplies them by factors.

The loss is followed from its end through sums, numbers and changes of shape to the terms that it
is made of (``loss_terms``).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from ipu_pipeline.capture.calls import RegionCall
from ipu_pipeline.capture.coarsen import LOSS
from ipu_pipeline.capture.glue import Path
from ipu_pipeline.capture.loss_terms import (
    MEANS_OVER_LABELS,
    LossTerms,
    Term,
    TermKind,
    factor_name,
    label_arguments,
)
from ipu_pipeline.capture.programs import prelude_program
from ipu_pipeline.capture.values import TensorMeta, computed_from, reached, reads_behind

if TYPE_CHECKING:
    from ipu_pipeline.capture.captured import CapturedModel

# Names of functions and methods that keep a sum of means what it is.
_LINEAR = frozenset(
    {
        "add", "iadd", "radd", "sub", "isub", "rsub", "subtract", "neg", "negative", "positive",
        "float", "double", "half", "bfloat16", "to", "type", "view", "reshape", "squeeze",
        "unsqueeze", "clone", "contiguous", "stack", "getitem",
    }
)  # fmt: skip
_QUOTIENTS = frozenset({"div", "idiv", "truediv", "itruediv", "true_divide", "divide"})
_PRODUCTS = frozenset({"mul", "imul", "rmul", "multiply"})
_DOT_PRODUCTS = frozenset({"dot", "matmul", "rmatmul", "mv", "inner", "vdot"})
_COUNTS = frozenset({"sum", "nansum", "count_nonzero", "mean", "nanmean", *_DOT_PRODUCTS})
_STACKS = frozenset({"stack", "hstack", "cat", "concat", "concatenate"})
# What mixes the samples of a tensor: along its first axis, and always.
_ALONG = frozenset({"sum", "mean", "max", "min", "amax", "amin", "any", "all", "cumsum", "softmax",
                    "count_nonzero", "norm", "prod"})  # fmt: skip
_MIXING = frozenset({"unique", "unique_consecutive", "sort", "argsort", "bincount", "histc"})
_OTHER_LOSSES = frozenset({"kl_div", "binary_cross_entropy", "binary_cross_entropy_with_logits"})


def loss_terms(captured: CapturedModel) -> LossTerms:
    """Return the terms of a captured model's loss; none of a model without a loss."""
    loss = captured._coarse.results.get(LOSS)
    if loss is None:
        return LossTerms()
    prelude = frozenset(captured._coarse.prelude)
    own = [node for block in captured._coarse.blocks if loss in block.nodes for node in block.nodes]
    dependent = _dependent(captured._trace.graph)
    walk = _Walk(captured._trace.attributes, prelude, dependent, frozenset(own))
    found = dict.fromkeys(walk.terms(loss, divided=False))
    read = _blocks_read(captured)
    terms = tuple(replace(term, reads=read.get(term.node, frozenset())) for term in found)
    named = (name for term in terms for name in (term.value, term.weight, term.ignored))
    wanted = [name for name in named if isinstance(name, str) and name]
    program = captured.prelude((), wanted) if wanted else None
    computed = {
        term.divisor: prelude_program(
            captured._coarse, captured._trace.attributes, [term.divisor], [term.value]
        )
        for term in terms if term.divisor and term.value
    }  # fmt: skip
    scaled = any(node.target is scaled_term for node in captured._trace.graph.nodes)
    functions = dict.fromkeys(name for node in own if (name := walk.called(node)[0]))
    late = any(call.is_late for call in captured.glue.calls)
    path = frozenset(walk.path)
    return LossTerms(terms, program, walk.constants, scaled, path, tuple(functions), late, computed)


def _blocks_read(captured: CapturedModel) -> dict[str, frozenset[int]]:
    """Return the blocks whose results the nodes of the loss are, or are computed from, by name."""
    blocks = captured._coarse.blocks
    home = {node: number for number, block in enumerate(blocks) for node in block.nodes}
    last = home.get(captured._coarse.results[LOSS])
    read = {node: frozenset([number]) for node, number in home.items() if number != last}
    for node in blocks[last].nodes if last is not None else ():
        read[node] = frozenset[int]().union(*(read.get(n, ()) for n in node.all_input_nodes))
    return {node.name: numbers for node, numbers in read.items()}


def _dependent(graph: fx.Graph) -> frozenset[fx.Node]:
    """Return the nodes that depend on an input of the model."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        given = node.op == "placeholder" and not _is_number(node)
        if given or not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return frozenset(found)


def _shape(node: fx.Node) -> tuple[int, ...] | None:
    return tuple(node.meta["spec"].shape) if "spec" in node.meta else None


def _adds_up(node: fx.Node) -> bool:
    """Whether a number is the sum, or mean, of what it is for each of two microbatches."""
    if _is_number(node):
        return True  # Python has counted it
    name, sources = _name(node.target), node.all_input_nodes
    if name in ("add", "sub"):
        return len(sources) == 2 and all(map(_adds_up, sources))
    if name == "sum" and len(sources) == 1 and _name(sources[0].target) in _STACKS:
        sources = sources[0].all_input_nodes
        if all(_shape(one) == () for one in sources):
            return all(map(_adds_up, sources))
    return _shape(node) == () and name in _COUNTS and not any(map(_reduces, sources))


def _reduces(node: fx.Node) -> bool:
    """Whether a node is, or is computed from, a number that the entries of a tensor give."""
    return any(map(_mixes, computed_from(node)))


def _mixes(node: fx.Node) -> bool:
    if not any(map(_shape, node.all_input_nodes)):
        return False
    dim = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
    name = _name(node.target)
    return _shape(node) == () or (name in _ALONG and dim in (0, (0,), [0])) or name in _MIXING


def _name(function: Any) -> str:
    name = function if isinstance(function, str) else getattr(function, "__name__", "")
    return name.strip("_")


def _is_mask(node: fx.Node) -> bool:
    return "spec" in node.meta and node.meta["spec"].dtype == "bool"


def _is_number(node: fx.Node) -> bool:
    """Whether it is a number that Python gives, and that is an input of the graph: a host value."""
    return node.op == "placeholder" and "spec" not in node.meta


def scaled_term(term: Tensor, factor: Tensor) -> Tensor:
    """Return ``term * factor``; 0 where the factor is: a mean over no labels is no number."""
    scaled = term * factor.to(term.dtype)
    return torch.where(factor != 0, scaled, torch.zeros_like(scaled))


def factored(captured: CapturedModel) -> CapturedModel:
    """Multiply each term by an input, where the terms of one loss count in different ways.

    Tokens that are masked and pairs of sentences, say, or a sum beside a mean: no weight of a
    microbatch's whole loss gives the loss of the batch then. The trace is changed; other losses
    stay as they are.
    """
    terms = loss_terms(captured)
    if terms.factored or terms.alike or not _kept_unscaled(captured, terms):
        return captured
    nodes = {node.name: node for node in captured._trace.graph.nodes}
    graph, names = captured._trace.graph, []
    for index, term in enumerate(terms.varying):
        with graph.inserting_before(next(iter(graph.nodes))):
            factor = graph.placeholder(factor_name(index))
        factor.meta.update(scope="", spec=TensorMeta((), "float32", requires_grad=False))
        node = nodes[term.node]
        with graph.inserting_after(node):
            scaled = graph.call_function(scaled_term, (node, factor))
        scaled.meta.update(scope=node.meta["scope"], spec=node.meta["spec"])
        node.replace_all_uses_with(scaled, delete_user_cb=lambda user: user.name in terms.path)
        names.append(factor.name)
    trace = replace(captured._trace, inputs=(*captured._trace.inputs, *names))
    return captured.of(trace)


def with_counted(captured: CapturedModel) -> CapturedModel:
    """Make inputs of the numbers that a loss is divided by, where Python may have counted them.

    Microbatches are weighed by them, also if all those of the first batch are equal.
    """
    calls = captured.glue.calls
    if not any(call.reads_values and not call.is_late for call in calls):
        return captured
    path = loss_terms(captured).path
    divisions: dict[tuple[int, Path], Any] = {
        (number, (0, 1)): call.node.args[1]
        for number, call in enumerate(calls)
        if call.node is not None and call.node.name in path and len(call.node.args) > 1
        if _name(call.node.target) in _QUOTIENTS
    }
    counted = {k: v for k, v in divisions.items() if isinstance(v, int | float)}
    return captured.with_hosts(counted) if counted else captured


def _kept_unscaled(captured: CapturedModel, terms: LossTerms) -> bool:
    """Let what is no part of the loss, such as values that Python reads, use copies of its path.

    Returns whether it does: of nodes that write in place there is no copy.
    """
    graph, glue = captured._trace.graph, captured._trace.glue
    copies: dict[fx.Node, fx.Node] = {}
    for node in [node for node in graph.nodes if node.name in terms.path]:
        others = [n for n in node.users if n.name not in terms.path and n.op != "output"]
        if node.meta.get("writes"):
            if reads_behind(node):
                return False
            continue
        with graph.inserting_after(node):
            copies[node] = graph.node_copy(node, lambda one: copies.get(one, one))
        copies[node].meta = dict(node.meta)
        node.meta["copies"] = (copies[node],)  # which gets the same host values
        for user in others:
            user.replace_input_with(node, copies[node])
    glue.nodes.update({k: copies[n] for k, n in glue.nodes.items() if n in copies})
    return True


@dataclass(frozen=True)
class _Walk:
    """Follows a loss from its end."""

    attributes: Mapping[str, Any]
    prelude: frozenset[fx.Node]
    dependent: frozenset[fx.Node]
    loss_nodes: frozenset[fx.Node]
    constants: dict[str, Tensor] = field(default_factory=dict)
    path: set[str] = field(default_factory=set)

    def terms(self, node: fx.Node, *, divided: bool) -> Iterator[Term]:
        """Yield the terms of ``node``; ``divided``: by a number, on the way from the end."""
        if node in self.prelude or node not in self.dependent:
            yield Term("constant", node=node.name)
            return
        name, function = self.called(node)
        inner = self._linear_in(node, name)
        if function in MEANS_OVER_LABELS or name.endswith("_loss") or name in _OTHER_LOSSES:
            yield self._of_loss_function(node, function, divided=divided)
        elif inner:
            self.path.add(node.name)
            divided = divided or name in _QUOTIENTS
            terms = [t for one in inner for t in self.terms(one, divided=divided)]
            divisor = self._divisor(node, name)
            quotient = None if divisor is None else self._quotient(divisor)
            kinds = {"mean"} if quotient and quotient.averaged else {"sum", "number", "opaque"}
            kinds = set() if any(t.divisor and t.kind == "opaque" for t in terms) else kinds
            mixing = self._mixing_operand(node, name)
            if quotient and all(term.kind in kinds for term in terms):
                yield replace(quotient, node=node.name)
            elif mixing is not None:
                yield Term("opaque", node=node.name, divisor=mixing.name)
            else:
                yield from terms
        elif (mixing := self._mixing_input(node)) is not None:
            yield Term("opaque", node=node.name, divisor=mixing.name)
        elif name == "sum":
            yield Term("number" if divided else "sum", node=node.name)
        else:
            yield self._mean(node) if name == "mean" else Term("opaque", node=node.name)

    def _mixing_operand(self, node: fx.Node, name: str) -> fx.Node | None:
        """Return the operand of a product or quotient that several samples give, if one is."""
        if name not in _PRODUCTS | _QUOTIENTS | _DOT_PRODUCTS | {"lerp"}:
            return None
        operands = [n for n in node.all_input_nodes if n in self.dependent and n in self.prelude]
        return next(filter(_reduces, operands), None)

    def _mixing_input(self, node: fx.Node) -> fx.Node | None:
        """Return what several samples give, and a term of the loss is computed from, if any is."""

        def inside(one: fx.Node) -> list[fx.Node]:
            inputs = one.all_input_nodes
            return [n for n in inputs if n in self.loss_nodes and n not in self.prelude]

        sources = (n for one in reached([node], inside) for n in one.all_input_nodes)
        given = (n for n in sources if n in self.prelude and n in self.dependent)
        return next(filter(_reduces, given), None)

    def _linear_in(self, node: fx.Node, name: str) -> Sequence[fx.Node]:
        """Return what ``node`` is a sum of, each times numbers or constants; nothing if it isn't.

        A sum or mean over samples is none, one over terms is.
        """
        sources = [source for source in node.all_input_nodes if not _is_number(source)]
        if node.target is scaled_term:
            return sources[:1]
        operands = [o for o in (*node.args, *node.kwargs.values()) if isinstance(o, fx.Node)]
        varying = [o for o in operands if o in self.dependent and o not in self.prelude]
        if name in ("sum", "mean", *_DOT_PRODUCTS) and _shape(node) == ():
            return self._stacked(varying[0]) if len(varying) == 1 else ()
        if name in _PRODUCTS:
            return varying if len(varying) == 1 else ()
        if name in _QUOTIENTS:
            return varying if varying == operands[:1] == list(node.args[:1]) else ()
        if name == "lerp":
            weight = node.kwargs.get("weight", node.args[-1])
            return () if weight in varying else [o for o in operands if o is not weight]
        linear = name in _LINEAR and all(_shape(source) is not None for source in sources)
        return sources if linear else ()

    def _stacked(self, node: fx.Node) -> Sequence[fx.Node]:
        """Return the numbers that ``node`` is or holds."""
        name = self.called(node)[0]
        if _shape(node) == ():
            return [node]
        self.path.add(node.name)
        if name in _PRODUCTS or name in _QUOTIENTS:
            inner = self._linear_in(node, name)
            return self._stacked(inner[0]) if inner else ()
        sources = [source for source in node.all_input_nodes if not _is_number(source)]
        return sources if name in _STACKS and all(_shape(one) == () for one in sources) else ()

    def _divisor(self, node: fx.Node, name: str) -> fx.Node | None:
        """Return the divisor, if it is a host value or a tensor that the inputs alone give."""
        divisor = node.args[1] if name in _QUOTIENTS and len(node.args) > 1 else None
        known = isinstance(divisor, fx.Node) and (
            _is_number(divisor) or (divisor in self.prelude and _shape(divisor) == ())
        )
        return divisor if known else None  # type: ignore[return-value]

    def _quotient(self, divisor: fx.Node) -> Term:
        """Return a quotient by what is counted; an opaque term if more or less than one number is.

        The divisor ``count.clamp(min=1) + 1e-8``, say, is computed from the count.
        """

        def inputs(node: fx.Node) -> list[fx.Node]:
            known = [] if _adds_up(node) else node.all_input_nodes
            return [n for n in known if n in self.dependent or _is_number(n)]

        behind = list(reached([divisor], inputs))
        found = set(filter(_adds_up, behind))
        other = any(node.op == "placeholder" and node not in found for node in behind)
        if other or len(found) != 1:
            return self._opaque(divisor)
        count = found.pop()
        name = "" if count is divisor else divisor.name
        dtype = "" if _is_number(count) else count.meta["spec"].dtype
        averaged = "mean" in _name(count.target)
        return Term("quotient", count.name, divisor=name, dtype=dtype, averaged=averaged)

    def _opaque(self, divisor: fx.Node) -> Term:
        return Term("opaque", divisor=divisor.name if _reduces(divisor) else "")

    def _mean(self, node: fx.Node) -> Term:
        """Return a mean, over what a mask among the inputs selects if it is one."""

        def by_values(nodes: Iterable[fx.Node]) -> list[fx.Node]:
            return [source for source in nodes if source.meta.get("value_shape")]

        first = by_values(node.all_input_nodes)
        for source in reached(first, lambda one: by_values(one.all_input_nodes)):
            masks = [n for n in source.all_input_nodes if _is_mask(n) and n in self.prelude]
            if source in self.prelude or masks:
                chosen = source if source in self.prelude else masks[0]
                return Term("selected", chosen.name, node=node.name)
        return Term("mean", node=node.name)

    def _of_loss_function(self, node: fx.Node, function: Any, *, divided: bool) -> Term:
        found = label_arguments(function, node.args, node.kwargs)
        if found is None:
            summed = "sum" in (node.kwargs.get("reduction"), *node.args[2:])
            kind: TermKind = "number" if divided else "sum"
            return Term(kind, node=node.name) if summed else self._mean(node)
        target, weight, ignored = found
        known = target in self.prelude and not target.meta["spec"].dtype.startswith("float")
        if not known or not self._known(weight):
            return Term("opaque", node=node.name)
        given = ignored.name if isinstance(ignored, fx.Node) else ignored
        return Term("labels", target.name, "" if weight is None else weight.name, given, node.name)

    def _known(self, weight: fx.Node | None) -> bool:
        """Whether the weights of the classes are there before the model runs."""
        if weight is not None and weight.op == "get_attr":
            self.constants[weight.name] = self.attributes[str(weight.target)]
            return True
        return weight is None or weight in self.prelude

    def called(self, node: fx.Node) -> tuple[str, Any]:
        """Return name and object of the function that a node calls."""
        function: Any = node.target
        if node.op == "call_module":
            holder = self.attributes[str(node.target)]
            function = holder.function if isinstance(holder, RegionCall) else None
        return _name(function), function
