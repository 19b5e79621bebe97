"""From a captured model to the torch-free block graph that the planner reads."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from ipu_pipeline.capture.captured import CapturedModel, model_identity
from ipu_pipeline.capture.operations import OperationCounter
from ipu_pipeline.capture.programs import Program
from ipu_pipeline.capture.ties import parameter_specs, parameters_of
from ipu_pipeline.ir.graph import Block, BlockGraph, TensorSpec


def block_graph(captured: CapturedModel) -> BlockGraph:
    """Describe the blocks of ``captured``, with every operation counted."""
    model, programs = captured.model, captured.programs
    producer = {name: program.name for program in programs for name in program.outputs}
    parameters = parameter_specs(model, programs)
    on_meta = any(parameter.is_meta for parameter in model.parameters())
    counter = OperationCounter(
        captured.specs, captured.example_values, training=captured.training, on_meta=on_meta
    )
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
