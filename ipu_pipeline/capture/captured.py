"""Capture: a model and an example batch become a block graph and executable programs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ipu_pipeline.capture.coarsen import LOSS, Coarse, coarsen
from ipu_pipeline.capture.leaves import Granularity, choose_leaves
from ipu_pipeline.capture.meta import TensorMeta
from ipu_pipeline.capture.operations import OperationCounter
from ipu_pipeline.capture.programs import Program, block_programs, prelude_program
from ipu_pipeline.capture.surroundings import capture_surroundings, preserved_state
from ipu_pipeline.capture.ties import parameter_specs, parameters_of
from ipu_pipeline.capture.trace import Trace, trace
from ipu_pipeline.errors import CaptureError
from ipu_pipeline.ir.graph import Block, BlockGraph, TensorSpec
from ipu_pipeline.ir.plan import ModelIdentity


@dataclass(frozen=True)
class CapturedModel:
    """A captured model: plain-data graph and executable programs over the model's own modules.

    Attributes:
        model: The user's model, unchanged.
        programs: One per block, in execution order.
        results: Value name by result name (``loss``, and in evaluation mode the outputs).
        training: Whether it was captured in training mode.
        granularity: Granularity of the blocks.
        notes: Things worth knowing, such as values that the capture is specialised to.
    """

    model: nn.Module
    programs: tuple[Program, ...]
    results: Mapping[str, str]
    training: bool
    granularity: Granularity
    notes: tuple[str, ...]
    _trace: Trace
    _coarse: Coarse

    @cached_property
    def specs(self) -> Mapping[str, TensorMeta]:
        """Description of every tensor value by its name."""
        return {n.name: n.meta["spec"] for n in self._trace.graph.nodes if "spec" in n.meta}

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the batch's tensors."""
        return self._trace.inputs

    def prelude(self, programs: Iterable[Program], results: Iterable[str] = ()) -> Program:
        """Return the program that computes what ``programs`` need from the model inputs alone."""
        wanted = [n for p in programs for n in (*p.inputs, *p.prelude_order)]
        return prelude_program(self._coarse, self._trace.attributes, [*wanted, *results])

    def run(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run all blocks in execution order, in one piece; return the results by name."""
        prelude = self.prelude(self.programs, self.results.values())
        values: dict[str, Any] = {name: batch[name] for name in self.inputs}
        prelude.run(values)
        for program in self.programs:
            program.run(values)
        return {name: values[value] for name, value in self.results.items()}

    @cached_property
    def graph(self) -> BlockGraph:
        """The torch-free block graph, with every operation counted."""
        return _block_graph(self)


def capture(
    model: nn.Module,
    example_batch: Mapping[str, Any],
    *,
    granularity: Granularity = "layer",
    self_check: bool = True,
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

    Raises:
        CaptureError: The model does something between its blocks that cannot be replayed, or the
            capture does not compute what the model computes.
    """
    _refuse_checkpointing(model)
    on_meta = any(parameter.is_meta for parameter in model.parameters())
    leaves = choose_leaves(model, granularity)
    with (
        torch.inference_mode(mode=False),
        capture_surroundings(model),
        preserved_state(model),
        torch.set_grad_enabled(model.training),
    ):
        batch = _own_batch(example_batch, meta=on_meta)
        recorded = _trace_once(model, batch, leaves, on_meta=on_meta)
    wanted = (lambda name: name == LOSS) if model.training else (lambda name: True)
    coarse = coarsen(recorded, leaves, wanted)
    if model.training and LOSS not in coarse.results:
        raise CaptureError(
            f"{type(model).__name__} returned no loss for the batch ({', '.join(batch)}); add the "
            "labels to the batch so that the loss is part of the graph, or call model.eval()"
        )
    captured = CapturedModel(
        model=model,
        programs=block_programs(coarse, recorded.attributes),
        results={name: node.name for name, node in coarse.results.items()},
        training=model.training,
        granularity=granularity,
        notes=(),
        _trace=recorded,
        _coarse=coarse,
    )
    if not self_check or on_meta:
        return captured
    from ipu_pipeline.capture.check import check_capture

    notes = check_capture(captured, batch)
    return CapturedModel(**{**_fields(captured), "notes": notes})


def model_identity(model: nn.Module) -> ModelIdentity:
    """Return what a plan remembers of ``model``: class, parameter names, shapes and dtypes."""
    parameters = {
        fqn: f"{'x'.join(map(str, p.shape)) or 'scalar'} {str(p.dtype).removeprefix('torch.')}"
        for fqn, p in model.named_parameters()
    }
    return ModelIdentity(type(model).__name__, parameters)


def _fields(captured: CapturedModel) -> dict[str, Any]:
    return {name: getattr(captured, name) for name in CapturedModel.__dataclass_fields__}


def _trace_once(model: nn.Module, batch: Mapping[str, Any], leaves: Any, *, on_meta: bool) -> Trace:
    try:
        return trace(model, batch, leaves)
    except RuntimeError as error:
        if on_meta and "meta" in str(error):
            raise CaptureError(
                f"{type(model).__name__} reads tensor values in Python between its blocks, which "
                f"a model on the meta device does not have ({error}); capture it with real "
                "weights and a real batch"
            ) from error
        raise


def _refuse_checkpointing(model: nn.Module) -> None:
    if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        raise CaptureError(
            "gradient checkpointing is on in the model; recomputation is decided by the plan: "
            "call model.gradient_checkpointing_disable()"
        )


def _own_batch(batch: Mapping[str, Any], *, meta: bool) -> dict[str, Any]:
    """Return copies: one tensor under two names (labels that are the input ids) must become two."""
    if not batch:
        raise CaptureError("the example batch is empty; pass the model's keyword arguments")
    for name, value in batch.items():
        if not isinstance(value, Tensor) and any(isinstance(t, Tensor) for t in tree_leaves(value)):
            raise CaptureError(
                f"{name!r} of the batch is a {type(value).__name__} that holds tensors; stages take "
                "tensors by name only: pass them one by one, or wrap the model in a module that "
                "builds the structure"
            )
    return {
        name: _copy(value, meta=meta) if isinstance(value, Tensor) else value
        for name, value in batch.items()
    }


def _copy(tensor: Tensor, *, meta: bool) -> Tensor:
    copy = tensor.detach().to("meta") if meta else tensor.detach().clone()
    return copy.requires_grad_(tensor.requires_grad)


def _block_graph(captured: CapturedModel) -> BlockGraph:
    model, programs = captured.model, captured.programs
    producer = {name: program.name for program in programs for name in program.outputs}
    parameters = parameter_specs(model, programs)
    on_meta = any(parameter.is_meta for parameter in model.parameters())
    counter = OperationCounter(captured.specs, training=captured.training, on_meta=on_meta)
    kinds = {block.name: block for block in captured._coarse.blocks}
    blocks = []
    for program in programs:
        operations = counter.count(program)
        nodes = kinds[program.name]
        blocks.append(
            Block(
                name=program.name,
                kind=nodes.kind,
                module=nodes.module,
                parameters=parameters_of(program.name, parameters),
                inputs=tuple(name for name in program.inputs if name in producer),
                outputs=program.outputs,
                forward_ops=operations.forward,
                backward_ops=operations.backward,
                saved_bytes=operations.saved_bytes,
                workspace_bytes=operations.workspace_bytes,
                uses_random=any(op.kind == "random" for op in operations.forward),
            )
        )
    return BlockGraph(
        model_class=type(model).__name__,
        blocks=tuple(blocks),
        tensors=tuple(_crossing(captured, producer)),
        inputs=tuple(_tensor_spec(captured, name) for name in captured.inputs),
        parameters=parameters,
        results=tuple(captured.results.values()),
        training=captured.training,
        model_fingerprint=model_identity(model).fingerprint,
        notes=captured.notes,
    )


def _crossing(captured: CapturedModel, producer: Mapping[str, str]) -> Iterable[TensorSpec]:
    for name, block in producer.items():
        consumers = _consumers(captured.programs, name)
        yield _tensor_spec(captured, name, producer=block, consumers=consumers)


def _consumers(programs: Sequence[Program], name: str) -> tuple[str, ...]:
    return tuple(program.name for program in programs if name in program.inputs)


def _tensor_spec(
    captured: CapturedModel,
    name: str,
    producer: str | None = None,
    consumers: tuple[str, ...] = (),
) -> TensorSpec:
    spec = captured.specs[name]
    return TensorSpec(name, spec.shape, spec.dtype, spec.requires_grad, producer, consumers)
