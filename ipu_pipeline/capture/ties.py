"""Which parameters the blocks use, and which are shared."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import nn

from ipu_pipeline.capture.programs import Program
from ipu_pipeline.ir.graph import ParameterSpec


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


def parameters_of(name: str, specs: Iterable[ParameterSpec]) -> tuple[str, ...]:
    """Return the first names of the parameters that block ``name`` uses."""
    return tuple(spec.fqn for spec in specs if name in spec.blocks)
