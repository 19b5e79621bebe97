"""Capture: a model and an example batch become a block graph and executable programs."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx, nn

from ipu_pipeline.capture import inputs
from ipu_pipeline.capture.coarsen import LOSS, Coarse, coarsen_reads
from ipu_pipeline.capture.glue import Call, Glue, Path
from ipu_pipeline.capture.leaves import Leaves, choose_leaves, has_parameters
from ipu_pipeline.capture.named_ids import naming_ids
from ipu_pipeline.capture.patches import not_compiled, preserved_state, tracing_patches
from ipu_pipeline.capture.programs import Program, block_programs, prelude_program
from ipu_pipeline.capture.python_state import PythonState
from ipu_pipeline.capture.replay import Followed, Replay
from ipu_pipeline.capture.sizes import Resize, Sized
from ipu_pipeline.capture.state import without_stand_ins
from ipu_pipeline.capture.trace import Trace, keep, lift, settle_hosts, trace_once
from ipu_pipeline.capture.values import TensorMeta
from ipu_pipeline.errors import CaptureError
from ipu_pipeline.ir.graph import BlockGraph, SharedState
from ipu_pipeline.ir.plan import Granularity, ModelIdentity

# The last capture of every model that lives, without the model itself.
_KEPT: weakref.WeakKeyDictionary[
    nn.Module, tuple[list[tuple[bool, torch.dtype, torch.Size]], CapturedModel]
] = weakref.WeakKeyDictionary()


_CAPTURING: ContextVar[bool] = ContextVar("capturing", default=False)


def capturing() -> bool:
    """Whether the calling thread is inside a capture, its self-check included."""
    return _CAPTURING.get()


@contextlib.contextmanager
def _while_capturing() -> Iterator[None]:
    token = _CAPTURING.set(True)
    try:
        yield
    finally:
        _CAPTURING.reset(token)


@dataclass(frozen=True)
class CapturedModel:
    """A captured model: plain-data graph and executable programs over the model's own modules.

    Attributes:
        model: The user's model, unchanged.
        programs: One per block, in execution order.
        results: Value name by result name (``loss``, and in evaluation mode the outputs).
        training: Whether it was captured for training: with gradients, and the loss is its result.
        granularity: Granularity of the blocks.
        notes: Things worth knowing, such as values that the capture is specialised to.
    """

    model: nn.Module
    programs: tuple[Program, ...]
    results: Mapping[str, str]
    training: bool
    granularity: Granularity
    notes: tuple[str, ...]
    _batch: Mapping[str, Any]
    _trace: Trace
    _coarse: Coarse
    _changed_backward: tuple[str, ...] = ()
    _sized: Mapping[str, TensorMeta] = field(default_factory=dict)
    _kinds: dict[nn.Module, str] = field(default_factory=dict)

    @cached_property
    def specs(self) -> Mapping[str, TensorMeta]:
        """Description of every tensor value by its name."""
        found = {n.name: n.meta["spec"] for n in self._trace.graph.nodes if "spec" in n.meta}
        return {**found, **self._sized}

    @cached_property
    def state(self) -> tuple[SharedState, ...]:
        """What several blocks use and forward passes change."""
        found = []
        names = [program.name for program in self.programs]
        for fqn in (*self._trace.changing, *self._changed_backward):
            readers = [p.name for p in self.programs if fqn in p.reads]
            writers = [p.name for p in self.programs if fqn in p.writes]
            backward = fqn in self._changed_backward
            if backward or (writers and len({*readers, *writers}) > 1):
                used = (
                    (tuple(names), tuple(names)) if backward else (tuple(readers), tuple(writers))
                )
                found.append(SharedState(fqn, *used, backward=backward))
        return tuple(dict.fromkeys(found))

    @property
    def in_order(self) -> bool:
        """Whether a microbatch has to end before the next one begins.

        Blocks draw from generators of Python, or the backward pass changes what they read.
        """
        return bool(self._changed_backward) or any(program.draws for program in self.programs)

    @cached_property
    def thread_locals(self) -> tuple[threading.local, ...]:
        """What the user's code reads that only the caller's thread sees."""
        return tuple(PythonState(self.model.modules()).thread_locals)

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the batch's tensors."""
        return self._trace.inputs

    @property
    def glue(self) -> Glue:
        """The calls between its blocks."""
        return self._trace.glue

    @property
    def changing(self) -> tuple[Tensor, ...]:
        """Those of the model's own tensors that a forward pass changes."""
        return tuple(self._trace.changing.values())

    def follow(
        self, batch: Mapping[str, Any], integers: frozenset[tuple[int, Path]] = frozenset()
    ) -> Followed:
        """Run the model's glue for ``batch`` without computing; return what it read in Python.

        Inside of ``tracing_patches``, in which it was captured.

        Args:
            batch: One microbatch of the captured shapes.
            integers: Places where a whole number that differs is no reason for another capture.

        Raises:
            Differs: It does something else than when it was captured.
        """

        def read(call: Call) -> Any:
            if call.is_late:
                return call.result  # the run compares it
            return self.read_early(call, {**batch, **replay.hosts})

        replay = Replay(self.glue, read, integers)
        with without_stand_ins(self._glue_modules), replay.patches(self.model):
            return replay.run(self.model, batch)

    def read_early(self, call: Call, values: Mapping[str, Any]) -> Any:
        """Return a value that Python reads from what is computed from inputs alone.

        Args:
            call: The read.
            values: The batch, and the host values so far.
        """
        assert call.node is not None
        if call.node not in self._early:
            wanted = [node.name for node in call.node.all_input_nodes]
            self._early[call.node] = prelude_program(self._coarse, self._trace.attributes, wanted)
        program = self._early[call.node]
        found = {name: values[name] for name in program.inputs}
        program.run(found)

        def value(node: fx.Node) -> Any:
            return self._trace.attributes[str(node.target)] if node.op == "get_attr" else (
                found[node.name]
            )  # fmt: skip

        args, kwargs = fx.map_arg((call.node.args, call.node.kwargs), value)
        return call.target(*args, **kwargs)

    @cached_property
    def _early(self) -> dict[fx.Node, Program]:
        return {}

    def sized(self, batch: Mapping[str, Any] | None = None) -> Sized:
        """Return what it is at the sizes of ``batch`` or, again, of its own; nothing is computed.

        Inside of ``tracing_patches``. The glue's code runs; the blocks stay as they are.

        Raises:
            Differs: It is another program then, or its shapes depend on values.
        """
        with _while_capturing(), without_stand_ins(self._glue_modules):
            return Resize(self._trace, self._kinds).sized(
                self.model, self._batch if batch is None else inputs.ready_batch(batch)
            )

    def at(self, sized: Sized) -> CapturedModel:
        """Return the same programs with the glue and the shapes of other sizes."""
        trace = replace(self._trace, glue=sized.glue)
        return replace(self, _trace=trace, _sized=sized.specs)

    @cached_property
    def _glue_modules(self) -> list[nn.Module]:
        return [m for m in self.model.modules() if id(m) in self.glue.leaves.glue]

    def with_hosts(
        self,
        changed: Mapping[tuple[int, Path], Any],
        kept: Iterable[int] = (),
        *,
        sizes: bool = False,
    ) -> CapturedModel:
        """Return the capture with values, by their places in its glue, as inputs.

        Its stages hand over the tensors ``kept``. ``sizes``: The values differ where sizes do, and
        only there.
        """
        for (number, path), value in changed.items():
            lift(self._trace, number, path, value, size=sizes)
        for key in kept:
            keep(self._trace, key)
        if self.glue.session.live:
            settle_hosts(self._trace)
        return self.of(self._trace)

    def of(self, trace: Trace) -> CapturedModel:
        """Return the capture of ``trace``: of this one's, in which something was changed."""
        return replace(self, _sized={}, **_parts(trace, training=self.training))

    def prelude(self, programs: Iterable[Program], results: Iterable[str] = ()) -> Program:
        """Return the program that computes what ``programs`` need from the model inputs alone."""
        wanted = [n for p in programs for n in (*p.inputs, *p.prelude_order)]
        return prelude_program(self._coarse, self._trace.attributes, [*wanted, *results])

    def run(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run all blocks in execution order, in one piece; return the results by name."""
        values = self._values(batch, self.results.values())
        return {name: values[value] for name, value in self.results.items()}

    def example_values(self) -> dict[str, Any]:
        """Run all blocks on the example batch; return every named value, detached."""
        changing = self._trace.changing.values()
        with preserved_state(self.model, changing), torch.set_grad_enabled(self.training):
            values = self._values({name: self._batch[name].clone() for name in self.inputs})
        return {n: v.detach() if isinstance(v, Tensor) else v for n, v in values.items()}

    def _values(self, batch: Mapping[str, Any], results: Iterable[str] = ()) -> dict[str, Any]:
        values: dict[str, Any] = {name: batch[name] for name in self.inputs}
        values.update(self.glue.hosts)
        for program in (self.prelude(self.programs, results), *self.programs):
            program.run(values)
        return values

    @cached_property
    def graph(self) -> BlockGraph:
        """The torch-free block graph, with every operation counted."""
        from ipu_pipeline.capture.block_graph import block_graph

        return block_graph(self)


@_while_capturing()
def capture(
    model: nn.Module,
    example_batch: Mapping[str, Any],
    *,
    granularity: Granularity = "layer",
    self_check: bool = True,
    training: bool | None = None,
) -> CapturedModel:
    """Capture ``model`` as blocks with the glue between them.

    The model's own modules stay the blocks; nothing of the model is changed, also after an error.

    Args:
        model: In training mode it must return a loss for ``example_batch``. It may live on the
            ``meta`` device: then nothing is computed and no weights are needed.
        example_batch: Keyword arguments of one microbatch, axis 0 the micro batch.
        granularity: ``layer``, ``sublayer`` or ``op``.
        self_check: Compare losses, outputs and gradients with the model on other data before
            trusting the capture (not possible on ``meta``).
        training: With gradients, and of the results only the loss; ``None``: if the model is in
            training mode. Every module is captured in the mode that it is in.

    Raises:
        CaptureError: The model does something between its blocks that cannot be replayed, or the
            capture does not compute what the model computes.
    """
    from ipu_pipeline.capture.check import check_arrays, check_capture

    _refuse_checkpointing(model)
    training = model.training if training is None else training
    on_meta = any(parameter.is_meta for parameter in model.parameters())
    leaves = choose_leaves(model, granularity)
    _refuse_backward_hooks(model, leaves)
    with (
        torch.inference_mode(mode=False),
        tracing_patches(model),
        preserved_state(model),
        torch.set_grad_enabled(training),
        naming_ids(model, CaptureError),
    ):
        batch = _own_batch(example_batch, meta=on_meta)
        if not on_meta:
            check_arrays(model, example_batch, batch)
        recorded = trace_once(model, batch, leaves, on_meta=on_meta)
        losses = _loss_modules(recorded)
        if losses:  # what they divide by is part of the glue, if it can be followed
            with contextlib.suppress(CaptureError):
                opened = replace(leaves, glue=leaves.glue | losses)
                recorded = trace_once(model, batch, opened, on_meta=on_meta)
    if training and LOSS not in recorded.results:
        raise CaptureError(
            f"{type(model).__name__} returned no loss for the batch ({', '.join(batch)}): forward "
            "has to return it as 'loss', alone, or first in a tuple; add the labels to the batch "
            "if it needs them, or call model.eval() for a plan of inference"
        )
    captured = CapturedModel(
        model=model,
        training=training,
        granularity=granularity,
        notes=(),
        _batch=batch,
        **_parts(recorded, training=training),
    )
    if not self_check or on_meta:
        return captured
    with not_compiled(model):
        found = check_capture(captured, batch)
    return replace(captured, notes=found.notes, _changed_backward=found.changed_backward)


def _parts(trace: Trace, *, training: bool) -> dict[str, Any]:
    """Return what a capture has of its trace."""
    coarse = coarsen_reads(trace, training=training)
    programs = block_programs(coarse, trace.attributes)
    results = {name: node.name for name, node in coarse.results.items()}
    return {"programs": programs, "results": results, "_trace": trace, "_coarse": coarse}


def keep_for_reuse(captured: CapturedModel) -> None:
    """Let the next executable of the model start from ``captured``; models on meta have none.

    Only the last capture of a model is kept, and not after the model itself is gone.
    """
    model = captured.model
    if not any(parameter.is_meta for parameter in model.parameters()):
        _KEPT[model] = _trained_parts(model), replace(captured, model=nn.Identity())


def take_kept(
    model: nn.Module, batch: Mapping[str, Any], granularity: str, *, training: bool
) -> CapturedModel | None:
    """Return the kept capture of ``model``, once, if it is one of such a batch."""
    parts, captured = _KEPT.pop(model, (None, None))
    if (
        captured is None
        or parts != _trained_parts(model)
        or (captured.granularity, captured.training) != (granularity, training)
        or inputs.described(captured._batch) != inputs.described(batch)
    ):
        return None
    return replace(captured, model=model)


def _trained_parts(model: nn.Module) -> list[tuple[bool, torch.dtype, torch.Size]]:
    """Return what a capture depends on of the parameters' objects; replays see the rest."""
    return [(p.requires_grad, p.dtype, p.shape) for p in model.parameters()]


def model_identity(model: nn.Module) -> ModelIdentity:
    """Return what a plan remembers of ``model``: class, parameter names, shapes and dtypes."""
    parameters = {
        fqn: f"{'x'.join(map(str, p.shape)) or 'scalar'} {str(p.dtype).removeprefix('torch.')}"
        for fqn, p in model.named_parameters()
    }
    return ModelIdentity(type(model).__name__, parameters)


def _loss_modules(recorded: Trace) -> frozenset[int]:
    """Return the ids of the model's modules without parameters that compute a loss or its parts."""
    found = set[int]()
    for node in recorded.graph.nodes:
        results = [node, *node.users] if node.op == "call_module" else []
        specs = [one.meta["spec"] for one in results if "spec" in one.meta]
        if any(spec.shape == () and "float" in spec.dtype for spec in specs):
            module = recorded.attributes[str(node.target)]
            live = getattr(module, "runs_live", False) or has_parameters(module)
            if id(module) in recorded.glue.leaves.names and not live:
                found.update(id(inner) for inner in module.modules())
    return frozenset(found)


def _refuse_checkpointing(model: nn.Module) -> None:
    if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        raise CaptureError(
            "gradient checkpointing is on in the model; recomputation is decided by the plan: "
            "call model.activation_checkpointing_disable() (in older transformers "
            "model.gradient_checkpointing_disable())"
        )


def _refuse_backward_hooks(model: nn.Module, leaves: Leaves) -> None:
    for fqn, module in model.named_modules():
        hooks = module._backward_hooks or module._backward_pre_hooks
        if model.training and hooks and not leaves.is_leaf(module) and id(module) in leaves.names:
            raise CaptureError(
                f"{fqn or type(model).__name__!r} has a hook on its backward pass "
                "(register_full_backward_hook), and its blocks are in several stages, none of "
                "which runs that backward pass; register the hook on its blocks, or on tensors"
            )


def _own_batch(batch: Mapping[str, Any], *, meta: bool) -> dict[str, Any]:
    """Return copies: one tensor under two names (labels that are the input ids) must become two."""
    own = inputs.ready_batch(batch)
    for name, value in own.items():
        if isinstance(value, Tensor):
            copy = value.detach().to("meta") if meta else value.detach().clone()
            own[name] = copy.requires_grad_(value.requires_grad)
    return own
