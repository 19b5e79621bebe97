"""What the loss of a batch divides by: labels that count, a number of items, or its samples.

The loss is followed from its end through sums, numbers and changes of shape to the means that it
is made of. A mean over labels, or a quotient with a divisor that is computed from the inputs
alone, tells how much each microbatch counts in the loss of the whole batch.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, fx
from torch.nn import functional

from ipu_pipeline.capture.calls import RegionCall
from ipu_pipeline.capture.coarsen import LOSS, coarsen
from ipu_pipeline.capture.programs import Program, block_programs
from ipu_pipeline.capture.values import TensorMeta

if TYPE_CHECKING:
    from ipu_pipeline.capture.captured import CapturedModel

IGNORED = -100
MEANS_OVER_LABELS = (functional.cross_entropy, functional.nll_loss)
# Names of functions and methods that keep a sum of means what it is.
_LINEAR = frozenset(
    {
        "add", "iadd", "radd", "sub", "isub", "rsub", "neg", "mul", "imul", "rmul", "div", "idiv",
        "truediv", "itruediv", "true_divide", "float", "double", "half", "bfloat16", "to", "type",
        "view", "reshape", "squeeze", "unsqueeze", "clone", "contiguous", "stack", "getitem",
    }
)  # fmt: skip
_QUOTIENTS = frozenset({"div", "idiv", "truediv", "itruediv", "true_divide"})

TermKind = Literal["labels", "selected", "quotient", "sum", "number", "mean"]


@dataclass(frozen=True)
class Term:
    """One term of a loss.

    Attributes:
        kind: A mean over ``labels`` or over ``selected`` elements; a ``quotient`` with a tensor; a
            ``sum``; a sum that is divided by a ``number``, perhaps that of the samples; any other
            ``mean``.
        value: Name of the labels, of what is or does the selection, or of the divisor.
        weight: Name of the weights of the classes, if there are any.
        ignored: Labels of this value do not count; the name of a host value if it is one.
        node: Name of the term.
    """

    kind: TermKind
    value: str = ""
    weight: str = ""
    ignored: int | str = IGNORED
    node: str = ""


@dataclass(frozen=True)
class LossTerms:
    """The terms of a loss, and the program that computes what they divide by.

    ``constants`` are weights of classes that the model holds, by name; ``factored``: every term
    with labels is multiplied by an input of its own, called :func:`factor_name`.
    """

    terms: tuple[Term, ...] = ()
    program: Program | None = None
    constants: Mapping[str, Tensor] = field(default_factory=dict)
    factored: bool = False

    def divisors(self, inputs: Mapping[str, Any]) -> list[float]:
        """Return what each term with labels or a divisor divides by, for a microbatch's inputs."""
        if self.program is None:
            return []
        values = {**self.constants, **{name: inputs[name] for name in self.program.inputs}}
        with torch.no_grad():
            self.program.run(values)
            return [_divisor(term, values) for term in self.counted]

    @property
    def counted(self) -> tuple[Term, ...]:
        """Those whose divisor depends on values."""
        return tuple(term for term in self.terms if term.value)

    @property
    def inputs(self) -> tuple[str, ...]:
        """Inputs of the model that the divisors are computed from."""
        return () if self.program is None else self.program.inputs


def _divisor(term: Term, values: Mapping[str, Any]) -> float:
    value = values[term.value]
    if term.kind == "quotient":
        return float(value)
    if term.kind == "selected":
        return float(value.sum() if value.dtype is torch.bool else value.numel())
    ignored = values[term.ignored] if isinstance(term.ignored, str) else term.ignored
    return float(labels_counted(value, values.get(term.weight), ignored))


def labels_counted(target: Tensor, weight: Tensor | None, ignored: int) -> Tensor:
    """Return what a mean over labels divides by: labels that count, each by its class's weight."""
    counts = target != ignored
    return counts.sum() if weight is None else weight[target[counts]].sum()


def label_arguments(
    function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[Any, Any, Any] | None:
    """Return target, class weights and ignored index of a mean over labels, else ``None``."""
    if function not in MEANS_OVER_LABELS:
        return None
    given = _signature(function).bind(*args, **kwargs).arguments
    averaged = given.get("reduction", "mean") == "mean" and given.get("size_average") is not False
    if not averaged or given.get("reduce") is False:
        return None
    return given["target"], given.get("weight"), given.get("ignore_index", IGNORED)


@cache
def _signature(function: Any) -> inspect.Signature:
    return inspect.signature(function)


def loss_terms(captured: CapturedModel) -> LossTerms:
    """Return the terms of a captured model's loss; none of a model without a loss."""
    loss = captured._coarse.results.get(LOSS)
    if loss is None:
        return LossTerms()
    prelude = frozenset(captured._coarse.prelude)
    walk = _Walk(captured._trace.attributes, prelude)
    terms = tuple(dict.fromkeys(walk.terms(loss, divided=False)))
    named = (name for term in terms for name in (term.value, term.weight, term.ignored))
    wanted = [name for name in named if isinstance(name, str) and name]
    program = captured.prelude((), wanted) if wanted else None
    scaled = any(node.target is scaled_term for node in captured._trace.graph.nodes)
    return LossTerms(terms, program, walk.constants, factored=scaled)


def _is_mask(node: fx.Node) -> bool:
    return "spec" in node.meta and node.meta["spec"].dtype == "bool"


def _is_number(node: fx.Node) -> bool:
    """Whether it is a number that Python gives, and that is an input of the graph: a host value."""
    return node.op == "placeholder" and "spec" not in node.meta


def factor_name(index: int | str) -> str:
    """Return the name of the input that multiplies the ``index``-th term with labels."""
    return f"loss_factor_{index}"


def scaled_term(term: Tensor, factor: Tensor) -> Tensor:
    """Return ``term * factor``; 0 where the factor is: a mean over no labels is no number."""
    scaled = term * factor.to(term.dtype)
    return torch.where(factor > 0, scaled, torch.zeros_like(scaled))


def factored(captured: CapturedModel) -> CapturedModel:
    """Multiply each mean over labels by an input, where one loss has means over different labels.

    Tokens that are masked and pairs of sentences, say: no weight of a microbatch's whole loss gives
    the loss of the batch then. The trace is changed; other losses stay as they are.
    """
    terms = loss_terms(captured)
    divisors = {(term.value, term.weight, term.ignored) for term in terms.counted}
    quotients = any(term.kind == "quotient" for term in terms.counted)
    if terms.factored or quotients or len(divisors) < 2:
        return captured
    nodes = {node.name: node for node in captured._trace.graph.nodes}
    graph, names = captured._trace.graph, []
    for index, term in enumerate(terms.counted):
        with graph.inserting_before(next(iter(graph.nodes))):
            factor = graph.placeholder(factor_name(index))
        factor.meta.update(scope="", spec=TensorMeta((), "float32", requires_grad=False))
        node = nodes[term.node]
        with graph.inserting_after(node):
            scaled = graph.call_function(scaled_term, (node, factor))
        scaled.meta.update(scope=node.meta["scope"], spec=node.meta["spec"])
        node.replace_all_uses_with(scaled, delete_user_cb=lambda user, own=scaled: user is not own)
        names.append(factor.name)
    trace = replace(captured._trace, inputs=(*captured._trace.inputs, *names))
    wanted = captured.results.keys()
    coarse = coarsen(trace, trace.glue.leaves, lambda name: name in wanted)
    return replace(
        captured,
        programs=block_programs(coarse, trace.attributes),
        results={name: node.name for name, node in coarse.results.items()},
        _trace=trace,
        _coarse=coarse,
    )


@dataclass(frozen=True)
class _Walk:
    """Follows a loss from its end."""

    attributes: Mapping[str, Any]
    prelude: frozenset[fx.Node]
    constants: dict[str, Tensor] = field(default_factory=dict)

    def terms(self, node: fx.Node, *, divided: bool) -> Iterator[Term]:
        """Yield the terms of ``node``; ``divided``: by a number, on the way from the end."""
        if node in self.prelude or node.op in ("get_attr", "placeholder"):
            return
        name, function = self._called(node)
        if function in MEANS_OVER_LABELS or name.endswith("_loss"):
            yield self._of_loss_function(node, function, divided=divided)
        elif name == "sum" and not node.meta["spec"].shape:
            stacked = self._stacked(node.all_input_nodes[0])
            if stacked is None:
                yield Term("number" if divided else "sum")
            for source in stacked or ():  # a sum over terms, not over samples
                yield from self.terms(source, divided=divided)
        elif function is scaled_term:
            yield from self.terms(node.all_input_nodes[0], divided=divided)
        elif name in _LINEAR:
            yield from self._of_linear(node, name, divided=divided)
        else:
            yield self._mean(node)

    def _stacked(self, node: fx.Node) -> list[fx.Node] | None:
        """Return the numbers that ``node`` holds; nothing of what depends on no input at all."""
        if self._called(node)[0] in ("stack", "hstack", "cat"):
            sources = node.all_input_nodes
            if all("spec" in one.meta and not one.meta["spec"].shape for one in sources):
                return sources
        pending, seen = [node], {node}
        while pending:
            one = pending.pop()
            if one.op == "placeholder" and not _is_number(one):
                return None
            pending += [source for source in one.all_input_nodes if source not in seen]
            seen.update(one.all_input_nodes)
        return []

    def _mean(self, node: fx.Node) -> Term:
        """Return a mean, over what a mask among the inputs selects if it is one."""
        pending, seen = list(node.all_input_nodes), set[fx.Node]()
        while pending:
            source = pending.pop()
            if source in seen or not source.meta.get("value_shape"):
                continue
            seen.add(source)
            masks = [n for n in source.all_input_nodes if _is_mask(n) and n in self.prelude]
            if source in self.prelude or masks:
                chosen = source if source in self.prelude else masks[0]
                return Term("selected", chosen.name, node=node.name)
            pending.extend(source.all_input_nodes)
        return Term("mean")

    def _of_linear(self, node: fx.Node, name: str, *, divided: bool) -> Iterator[Term]:
        quotient = name in _QUOTIENTS
        divisor = node.args[1] if quotient and len(node.args) > 1 else None
        if isinstance(divisor, fx.Node) and not _is_number(divisor):
            scalar = "spec" in divisor.meta and not divisor.meta["spec"].shape
            if divisor in self.prelude and scalar:
                yield Term("quotient", divisor.name)
                return
            if divisor.op != "get_attr":
                yield Term("mean")
                return
        for source in node.all_input_nodes:
            yield from self.terms(source, divided=divided or quotient)

    def _of_loss_function(self, node: fx.Node, function: Any, *, divided: bool) -> Term:
        found = label_arguments(function, node.args, node.kwargs)
        if found is None:
            summed = "sum" in (node.kwargs.get("reduction"), *node.args[2:])
            return Term("number" if divided else "sum") if summed else self._mean(node)
        target, weight, ignored = found
        known = target in self.prelude and not target.meta["spec"].dtype.startswith("float")
        if not known or not self._known(weight):
            return Term("mean")
        given = ignored.name if isinstance(ignored, fx.Node) else ignored
        return Term("labels", target.name, "" if weight is None else weight.name, given, node.name)

    def _known(self, weight: fx.Node | None) -> bool:
        """Whether the weights of the classes are there before the model runs."""
        if weight is not None and weight.op == "get_attr":
            self.constants[weight.name] = self.attributes[str(weight.target)]
            return True
        return weight is None or weight in self.prelude

    def _called(self, node: fx.Node) -> tuple[str, Any]:
        function: Any = node.target
        if node.op == "call_module":
            holder = self.attributes[str(node.target)]
            function = holder.function if isinstance(holder, RegionCall) else None
        name = function if isinstance(function, str) else getattr(function, "__name__", "")
        return name.strip("_"), function
