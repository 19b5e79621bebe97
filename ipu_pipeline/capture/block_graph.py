"""From a captured model to the torch-free block graph that the planner reads."""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import nn
from transformers import PreTrainedModel

from ipu_pipeline.capture.captured import CapturedModel, model_identity
from ipu_pipeline.capture.operations import OperationCounter, Operations
from ipu_pipeline.capture.programs import Program
from ipu_pipeline.capture.recorder import BY_INPUTS, BY_OUTPUTS
from ipu_pipeline.ir.graph import Block, BlockGraph, ParameterSpec, TensorSpec

_NUMBER = re.compile(r"\.\d+(?=\.|$)")


def block_graph(captured: CapturedModel) -> BlockGraph:
    """Describe the blocks of ``captured``, with every operation counted."""
    model, programs = captured.model, captured.programs
    producer = {name: program.name for program in programs for name in program.outputs}
    parameters = parameter_specs(model, programs)
    on_meta = any(parameter.is_meta for parameter in model.parameters())
    counter = OperationCounter(
        captured.specs,
        captured.example_values,
        training=captured.training,
        on_meta=on_meta,
        styles=cut_styles(model),
    )
    counted = {program.name: counter.count(program) for program in programs}
    kept = {
        name
        for program in programs
        for name, keeps in zip(program.inputs, counted[program.name].keeps_inputs, strict=True)
        if keeps  # for its backward pass
    }
    blocks = [
        Block(
            name=program.name,
            kind=nodes.kind,
            module=nodes.module,
            parameters=tuple(one.fqn for one in parameters if program.name in one.blocks),
            inputs=tuple(name for name in program.inputs if name in producer),
            outputs=program.outputs,
            forward_ops=counted[program.name].forward,
            backward_ops=counted[program.name].backward,
            uses_random=_draws(counted[program.name]),
            **_memory(counted[program.name], [name in kept for name in program.outputs]),
        )
        for program, nodes in zip(programs, captured._coarse.blocks, strict=True)
    ]
    return BlockGraph(
        model_class=type(model).__name__,
        blocks=tuple(blocks),
        tensors=tuple(
            _tensor_spec(captured, name, block, name in kept) for name, block in producer.items()
        ),
        inputs=tuple(_tensor_spec(captured, name) for name in captured.inputs),
        parameters=parameters,
        results=tuple(captured.results.values()),
        training=captured.training,
        model_fingerprint=model_identity(model).fingerprint,
        notes=captured.notes,
        state=captured.state,
    )


def _draws(operations: Operations) -> bool:
    return any(op.kind == "random" or "_dropout" in op.name for op in operations.forward)


def _memory(operations: Operations, kept: Sequence[bool]) -> dict[str, int]:
    """Return the bytes that a block keeps and works with; some outputs are kept by later blocks."""
    pairs = zip(operations.output_bytes, kept, strict=True)
    kept_bytes = sum(num_bytes for num_bytes, is_kept in pairs if is_kept)
    workspace = max(0, operations.peak_bytes - operations.saved_bytes - kept_bytes)
    whole = operations.whole_peak_bytes - (operations.saved_bytes - operations.cut_bytes)
    return {
        "saved_bytes": operations.saved_bytes,
        "kept_bytes": kept_bytes,
        "workspace_bytes": workspace,
        "cut_bytes": operations.cut_bytes,
        "cut_workspace_bytes": min(workspace, max(0, workspace - whole + kept_bytes)),
    }


def _tensor_spec(
    captured: CapturedModel,
    name: str,
    producer: str | None = None,
    kept: bool = False,  # noqa: FBT001, FBT002
) -> TensorSpec:
    spec = captured.specs[name]
    readers = [] if producer is None else captured.programs
    consumers = tuple(program.name for program in readers if name in program.inputs)
    return TensorSpec(name, spec.shape, spec.dtype, spec.requires_grad, producer, consumers, kept)


def parameter_specs(model: nn.Module, programs: Sequence[Program]) -> tuple[ParameterSpec, ...]:
    """Describe every distinct parameter that some program uses, in the model's order.

    A parameter object with several names is listed once, under its first name.
    """
    names: dict[int, list[str]] = {}
    for fqn, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(fqn)
    users: dict[int, list[str]] = {}
    for program in programs:
        for parameter in program.module.parameters():
            users.setdefault(id(parameter), []).append(program.name)
    return tuple(
        ParameterSpec(
            fqn=names[id(parameter)][0],
            shape=tuple(parameter.shape),
            dtype=str(parameter.dtype).removeprefix("torch."),
            trainable=parameter.requires_grad,
            aliases=tuple(names[id(parameter)][1:]),
            blocks=tuple(users[id(parameter)]),
        )
        for parameter in model.parameters()
        if id(parameter) in users
    )


def expanded_plan(model: PreTrainedModel) -> dict[str, str]:
    """Return the style of every module and parameter that the model's ``tp_plan`` names.

    The plan has ``*`` for the numbers of layers, and a module stands for its parameters.
    """
    plan = dict(model.tp_plan or {})
    found: dict[str, str] = {}
    for path, module in model.named_modules():
        style = plan.get(_NUMBER.sub(".*", path))
        for name, _ in module.named_parameters(recurse=False):
            full = f"{path}.{name}".lstrip(".")
            own = plan.get(_NUMBER.sub(".*", full), style)
            if own is not None:
                found[full] = own
        if style is not None:
            found[path] = style
    return found


def cut_styles(model: nn.Module) -> dict[int, str]:
    """Return how ranks of tensor parallelism cut each parameter, by its id; others are whole."""
    found: dict[int, str] = {}
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            styles = expanded_plan(module)
            for name, parameter in module.named_parameters():
                style = styles.get(name, "")
                if style in BY_OUTPUTS | BY_INPUTS:
                    found.setdefault(id(parameter), style)
    return found
