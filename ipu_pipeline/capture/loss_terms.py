"""What the loss of a batch divides by: labels that count, a number of items, or its samples.

The loss is followed from its end through sums, numbers and changes of shape to the means that it
is made of. A mean over labels, or a quotient with a divisor that is computed from the inputs
alone, tells how much each microbatch counts in the loss of the whole batch.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor, fx
from torch.nn import functional

from ipu_pipeline.capture.calls import RegionCall
from ipu_pipeline.capture.coarsen import LOSS
from ipu_pipeline.capture.programs import Program

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

TermKind = Literal["labels", "quotient", "sum", "number", "mean"]


@dataclass(frozen=True)
class Term:
    """One term of a loss.

    Attributes:
        kind: A mean over ``labels``; a ``quotient`` with a tensor; a ``sum``; a sum that is
            divided by a ``number``, perhaps that of the samples; any other ``mean``.
        value: Name of the labels or of the divisor.
        weight: Name of the weights of the classes, if there are any.
        ignored: Labels of this value do not count.
    """

    kind: TermKind
    value: str = ""
    weight: str = ""
    ignored: int = IGNORED


@dataclass(frozen=True)
class LossTerms:
    """The terms of a loss, and the program that computes what they divide by.

    ``constants`` are weights of classes that the model holds, by name.
    """

    terms: tuple[Term, ...] = ()
    program: Program | None = None
    constants: Mapping[str, Tensor] = field(default_factory=dict)

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
        """Those with labels or a divisor."""
        return tuple(term for term in self.terms if term.kind in ("labels", "quotient"))

    @property
    def inputs(self) -> tuple[str, ...]:
        """Inputs of the model that the divisors are computed from."""
        return () if self.program is None else self.program.inputs


def _divisor(term: Term, values: Mapping[str, Any]) -> float:
    value = values[term.value]
    if term.kind == "quotient":
        return float(value)
    return float(labels_counted(value, values.get(term.weight), term.ignored))


def labels_counted(target: Tensor, weight: Tensor | None, ignored: int) -> Tensor:
    """Return what a mean over labels divides by: labels that count, each by its class's weight."""
    counts = target != ignored
    return counts.sum() if weight is None else weight[target[counts]].sum()


def label_arguments(
    function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[Any, Any, int] | None:
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


def loss_terms(captured: Any) -> LossTerms:
    """Return the terms of a captured model's loss; none of a model without a loss."""
    loss = captured._coarse.results.get(LOSS)
    if loss is None:
        return LossTerms()
    prelude = frozenset(captured._coarse.prelude)
    walk = _Walk(captured._trace.attributes, prelude)
    terms = tuple(dict.fromkeys(walk.terms(loss, divided=False)))
    wanted = [name for term in terms for name in (term.value, term.weight) if name]
    program = captured.prelude((), wanted) if wanted else None
    return LossTerms(terms, program, walk.constants)


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
            yield Term("number" if divided else "sum")
        elif name in _LINEAR:
            yield from self._of_linear(node, name, divided=divided)
        else:
            yield Term("mean")

    def _of_linear(self, node: fx.Node, name: str, *, divided: bool) -> Iterator[Term]:
        quotient = name in _QUOTIENTS
        divisor = node.args[1] if quotient and len(node.args) > 1 else None
        if isinstance(divisor, fx.Node):
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
            return Term(("number" if divided else "sum") if summed else "mean")
        target, weight, ignored = found
        known = target in self.prelude and not target.meta["spec"].dtype.startswith("float")
        if not known or not self._known(weight):
            return Term("mean")
        return Term("labels", target.name, "" if weight is None else weight.name, ignored)

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
