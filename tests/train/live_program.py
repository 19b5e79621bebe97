"""What training scripts with a loss of their own are made with, once for either trainer class.

A program takes a trainer class and returns a subclass; what it collects is in ``seen``. ``overlap``
says whether its microbatches may overlap in the pipeline.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch.nn import functional

PROGRAMS: dict[str, Program] = {}


@dataclass(frozen=True)
class Program:
    make: Callable[[type], type]
    overlap: bool


def program(*, overlap: bool = True) -> Callable[[Callable[[type], type]], Callable[[type], type]]:
    def add(make: Callable[[type], type]) -> Callable[[type], type]:
        PROGRAMS[make.__name__] = Program(make, overlap)
        return make

    return add


def loss_of(rest: Callable[..., Any], before: Any = None) -> Callable[..., Any]:
    """Return a compute_loss that calls the model once, with ``before`` and ``rest`` around it."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        given = before(self, model, inputs) if before else inputs
        out = model(**given)
        loss = rest(self, out, labels)
        return (loss, out) if return_outputs else loss

    return compute_loss


def cross_entropy(self, out, labels):
    return functional.cross_entropy(out.logits, labels)


def with_loss(base: type, rest: Callable[..., Any], before: Any = None, **members: Any) -> type:
    members = {"seen": (), **members, "compute_loss": loss_of(rest, before)}
    return type("Mine", (base,), members)


def collected(self, value: Any) -> None:
    self.seen = [*self.seen, value]
