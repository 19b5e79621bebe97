"""The self-check: a capture is compared with the model on other data before it is trusted.

First the model runs, then the capture, with the same dropout masks. Of the gradients of the first
only hashes are kept, so that a check needs no more memory than a step: those of the second are
almost always the same bits. Where some are not, the model runs once more, and they are compared.
Where something is kept from batch to batch, both run on, for one more forward pass.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from ipu_pipeline.capture.captured import CapturedModel
from ipu_pipeline.capture.coarsen import LOSS
from ipu_pipeline.capture.compare import DEFAULT_TOLERANCE, TOLERANCE, compared, difference
from ipu_pipeline.capture.leaves import Leaves
from ipu_pipeline.capture.patches import (
    patched_module_calls,
    preserved_state,
    tracing_patches,
    without_gradient_hooks,
)
from ipu_pipeline.capture.python_state import PythonState, seed_torch
from ipu_pipeline.capture.replay import Differs
from ipu_pipeline.capture.state import PlainState
from ipu_pipeline.capture.values import named_tensors
from ipu_pipeline.errors import CaptureError, GuardError
from ipu_pipeline.ops.linear import casts_of_one_step
from ipu_pipeline.ops.random import block_scope

SEED = 1234
Outcome = dict[str, Tensor]
_SET_BY_GLUE = (
    "blocks run after the code between them, also that of later microbatches: if they read in "
    "Python what it sets (an attribute, a config, a global, a context variable), pass it to them "
    "as an argument; if not, try another granularity, and please report the model class"
)


class Checked(NamedTuple):
    """What the self-check found.

    Attributes:
        notes: For the user: values read in Python that the capture is specialised to.
        changed_backward: Buffers that blocks read and that the backward pass changes.
    """

    notes: tuple[str, ...]
    changed_backward: tuple[str, ...]


def check_capture(captured: CapturedModel, batch: Mapping[str, Any]) -> Checked:
    """Compare results and every gradient with the model's own on altered data.

    Buffers, gradients, plain attributes of modules and the random state are put back.

    Raises:
        CaptureError: The capture computes something else than the model.
    """
    leaves = captured.glue.leaves
    compare = partial(_compare, captured, leaves)
    try:
        return Checked((), compare(altered(batch)))
    except GuardError as error:
        found = compare(batch, once=True)
        note = f"checked on the example batch only: {error}"
        return Checked((note,), found)
    except _RefusedByModel as error:
        found = compare(batch)
        note = f"checked on the example batch only: the model refuses altered data ({error})"
        return Checked((note,), found)


def check_arrays(model: nn.Module, given: Mapping[str, Any], ready: Mapping[str, Any]) -> None:
    """Refuse a model that does something else with tensors than with the batch's numpy arrays.

    Raises:
        CaptureError: It does; the inputs are named.
    """
    arrays = [name for name, value in given.items() if isinstance(value, np.ndarray)]
    found: list[Outcome] = []
    for batch in (given, ready) if arrays else ():
        try:
            with preserved_state(model), block_scope(SEED, "arrays"):
                seed_torch(SEED)
                outputs = model(**{n: deepcopy(v) for n, v in batch.items()})
                found.append({n: t.detach() for n, t in named_tensors(outputs)})
        except Exception as error:
            if not found:  # it does not take arrays anyway
                return
            problem = f"fails ({type(error).__name__}: {error})"
            break
    else:
        if not found or all(difference(found[1].get(n), t) <= DEFAULT_TOLERANCE
                            for n, t in found[0].items()):  # fmt: skip
            return
        problem = "computes something else"
    raise CaptureError(
        f"{', '.join(map(repr, arrays))} of the batch is a numpy array; stages take tensors, and "
        f"{type(model).__name__} {problem} with a tensor in its place: let its code work with "
        "tensors, and put tensors into the batch"
    )


class _RefusedByModel(Exception):
    """The model itself fails on the altered batch."""


def altered(batch: Mapping[str, Any]) -> dict[str, Any]:
    """Return other data of the same shapes: samples reversed, and some tokens masked."""
    return {name: _altered(name, value) for name, value in batch.items()}


def _altered(name: str, value: Any) -> Any:
    if not isinstance(value, Tensor) or value.ndim == 0:
        return value
    changed = value.flip(0) if value.shape[0] > 1 else value.clone()
    if name.endswith("attention_mask") and value.ndim == 2 and value.shape[1] >= 4:
        changed[0, -(value.shape[1] // 4) :] = 0
    elif value.shape[0] == 1 and value.ndim > 1 and "position" not in name:
        changed = changed.flip(1)
    return changed


@dataclass
class _Run:
    """What one run leaves: results, gradients, and what the next batch starts from.

    Attributes:
        outcome: Tensors by what they are.
        first: The model's, which the capture's is compared with.
        ours: Gradients of the capture that differ, in the model's second run.
        hashes: Of its gradients by name, if it is the first.
        unlike: Gradients with another hash than those of the first.
        kept: What is kept from batch to batch.
        changed_backward: Buffers that the backward pass changed.
        once: No second batch follows: Python would read other values in it.
    """

    captured: CapturedModel
    leaves: Leaves
    once: bool = False
    first: _Run | None = None
    ours: dict[str, Tensor | None] | None = None
    hashes: dict[str, bytes] = field(default_factory=dict)
    unlike: Outcome = field(default_factory=dict)
    outcome: Outcome = field(default_factory=dict)
    kept: list[str] = field(default_factory=list)
    changed_backward: tuple[str, ...] = ()

    def of(self, run: Callable[[], Outcome], *, again: bool) -> _Run:
        """Run it; twice if something is kept or ``again``."""
        captured, model = self.captured, self.captured.model
        changing = captured._trace.changing
        with (
            preserved_state(model, changing.values()),
            without_gradient_hooks(model),
            _same_masks(model, self.leaves),
            casts_of_one_step(),
            torch.set_grad_enabled(captured.training),
        ):
            seed_torch(SEED)
            plain, python = PlainState(model.modules()), PythonState(model.modules())
            glue = captured.glue.leaves.glue  # what it keeps, its replays keep
            own = PlainState([m for m in model.modules() if id(m) in glue], buffers=False)
            outcome = run()
            for name, value in outcome.items():
                if self.first is not None:
                    _require_equal(model, name, compared(value), self.first.outcome.get(name))
            if captured.training and outcome[LOSS].requires_grad:
                outcome = {LOSS: self._backward(outcome[LOSS])}
            self.outcome.update((name, compared(value)) for name, value in outcome.items())
            self.kept = [*changing, *plain.new_tensors(), *self.changed_backward]
            if self.kept or again:
                self.outcome.update((f"{n} afterwards", _now(model, n, t).detach().clone())
                                    for n, t in changing.items())  # fmt: skip
            if (self.kept or again) and not self.once:
                python.restore(tensors=False)
                plain.put_back(tensors=False)
                own.put_back(but=changing.values())
                self.outcome.update((f"{n} of the next batch", compared(t))
                                    for n, t in run().items())  # fmt: skip
        return self

    def _backward(self, loss: Tensor) -> Tensor:
        model = self.captured.model
        versions = [(name, buffer, buffer._version) for name, buffer in model.named_buffers()]
        # Hooks of the graph's nodes, which die with it: a parameter that ever had a hook of its own
        # is known to have one, and its gradients are no longer added within the product.
        nodes = [
            (get_gradient_edge(p).node, partial(self._take, f"gradient of {n}", p))
            for n, p in model.named_parameters() if p.requires_grad
        ]  # fmt: skip
        hooks = [node.register_hook(take) for node, take in nodes]
        try:
            loss.backward()
        except RuntimeError as error:
            if self.first is not None:
                raise
            raise CaptureError(
                f"{type(model).__name__} itself fails in its backward pass: {error}"
            ) from error
        finally:
            for hook in hooks:
                hook.remove()
        read = {name for n in self.captured._trace.graph.nodes for name in n.meta.get("reads", ())}
        self.changed_backward = tuple(
            name for name, buffer, version in versions
            if buffer._version != version and name in read
        )  # fmt: skip
        return loss.detach()

    def _take(self, name: str, parameter: Tensor, *_: object) -> None:
        gradient, parameter.grad = parameter.grad, None
        assert gradient is not None
        gradient = gradient.to_dense()
        if self.ours is not None:
            if name in self.ours:
                _require_equal(self.captured.model, name, self.ours.pop(name), gradient)
        elif self.first is None:
            self.hashes[name] = _hash(gradient)
        elif self.first.hashes.pop(name, None) != _hash(gradient):
            self.unlike[name] = gradient


def _compare(
    captured: CapturedModel, leaves: Leaves, batch: Mapping[str, Any], *, once: bool = False
) -> tuple[str, ...]:
    """Compare the capture with the model; return the buffers that a backward pass changes."""
    model = captured.model
    eager = partial(_eager, model, batch, captured.results)
    expected = _Run(captured, leaves, once).of(eager, again=False)
    _run_ahead(captured, batch)
    ours = _Run(captured, leaves, once, expected)
    found = ours.of(partial(_blocks, captured, batch), again=bool(expected.kept)).outcome
    differing = {**dict.fromkeys(expected.hashes), **ours.unlike}
    if differing:
        _Run(captured, leaves, once=True, ours=differing).of(eager, again=False)
        for name, gradient in differing.items():  # the model has none
            if gradient is not None:
                _require_equal(model, name, gradient, None)
    for name in {**expected.outcome, **found}:
        _require_equal(model, name, found.get(name), expected.outcome.get(name), expected.kept)
    return expected.changed_backward


def _run_ahead(captured: CapturedModel, batch: Mapping[str, Any]) -> None:
    """Run the glue twice, as it runs before the blocks of earlier microbatches: they see it."""
    model, changing = captured.model, captured._trace.changing.values()
    with (
        tracing_patches(model),
        preserved_state(model, changing),
        torch.set_grad_enabled(captured.training),
        suppress(Differs),
    ):
        for _ in range(2):
            captured.follow(batch)


def _blocks(captured: CapturedModel, batch: Mapping[str, Any]) -> Outcome:
    try:
        return captured.run(_copied(batch))
    except (AttributeError, LookupError, TypeError) as error:
        raise CaptureError(
            f"a block of {type(captured.model).__name__} fails where the model itself does not "
            f"({type(error).__name__}: {error}); {_SET_BY_GLUE}"
        ) from error


def _require_equal(
    model: nn.Module,
    name: str,
    found: Tensor | None,
    expected: Tensor | None,
    kept: list[str] | None = None,
) -> None:
    if expected is None:
        assert found is not None
        expected = torch.zeros_like(found)
    distance = difference(found, expected)
    allowed = TOLERANCE.get(expected.dtype, DEFAULT_TOLERANCE)
    if distance <= allowed:
        return
    why = _SET_BY_GLUE
    iterators = [
        f"{fqn}.{attribute}".lstrip(".")
        for fqn, module in model.named_modules()
        for attribute, value in vars(module).items()
        if isinstance(value, Iterator)
    ]
    if iterators:
        why = (
            f"it keeps an iterator ({iterators[0]}), which cannot be put back after the model was "
            "tried: keep a number instead, and count"
        )
    if name.endswith(("afterwards", "of the next batch")):
        why = (
            f"what it keeps from batch to batch ({', '.join(kept or ())}) is not kept as without "
            "stages: make it a buffer, and write into it in place"
        )
    raise CaptureError(
        f"the captured {type(model).__name__} differs from the model on other data: {name} by "
        f"{distance:.3g} of its scale (allowed {allowed:g}); {why}"
    )


def _hash(gradient: Tensor) -> bytes:
    values = gradient.detach().reshape(-1).contiguous().view(torch.uint8).numpy()
    return hashlib.blake2b(values.data, digest_size=16).digest() + str(gradient.shape).encode()


def _eager(model: nn.Module, batch: Mapping[str, Any], results: Mapping[str, str]) -> Outcome:
    try:
        output = model(**_copied(batch))
    except Exception as error:
        raise _RefusedByModel(f"{type(error).__name__}: {error}") from error
    return {name: t for name, t in named_tensors(output) if name in results}


def _now(model: nn.Module, fqn: str, tensor: Tensor) -> Tensor:
    """Return what the model has under the name of ``tensor``, which it may have replaced."""
    owner, _, name = fqn.rpartition(".")
    try:
        found = getattr(model.get_submodule(owner), name)
    except AttributeError:  # in a list or map
        found = tensor
    return found if isinstance(found, Tensor) else tensor


def _copied(batch: Mapping[str, Any]) -> dict[str, Any]:
    """Return a batch that the model may write to."""
    return {n: v.clone() if isinstance(v, Tensor) else v for n, v in batch.items()}


@contextmanager
def _same_masks(model: nn.Module, leaves: Leaves) -> Iterator[None]:
    """Key random numbers by the call of a leaf, so that blocks may draw in any order.

    Those of the glue come one after the other: it is assumed that what several of its blocks
    draw is drawn in one order.
    """
    calls: Counter[str] = Counter()
    inside: list[str] = []

    def made(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if inside or not leaves.is_leaf(module):
                return original(module, *args, **kwargs)
            fqn = leaves.names[id(module)]
            calls[fqn] += 1
            inside.append(fqn)
            try:
                with block_scope(SEED, fqn, calls[fqn]):
                    return original(module, *args, **kwargs)
            finally:
                inside.pop()

        return call

    with patched_module_calls(model, made), block_scope(SEED, "glue"):
        yield
