"""Which programs do the same work: equal code on equal modules and equal shapes."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from torch import fx, nn

from ipu_pipeline.capture.meta import TensorMeta
from ipu_pipeline.capture.programs import Program


def program_signature(program: Program, specs: Mapping[str, TensorMeta]) -> str:
    """Return a hex digest that is equal for programs that do the same work.

    Args:
        program: The program of a block.
        specs: Description of every value by name; only the program's inputs are read.
    """
    position: dict[fx.Node, int] = {}
    lines: list[Any] = []
    for node in program.module.graph.nodes:
        position[node] = len(position)
        if node.op in ("call_module", "get_attr"):
            target = _object(program.module, str(node.target))
        elif node.op == "call_function":
            target = (getattr(node.target, "__module__", ""), _name(node.target))
        else:  # a method has its name; how a value is called does not matter
            target = str(node.target) if node.op == "call_method" else None
        arguments = fx.map_arg((node.args, node.kwargs), lambda n: f"%{position[n]}")
        lines.append((node.op, target, arguments))
    inputs = [specs[name] for name in program.inputs]
    return hashlib.sha256(f"{lines}{inputs}".encode()).hexdigest()[:24]


def _name(function: Any) -> str:
    return getattr(function, "__qualname__", None) or repr(function)


def _object(root: nn.Module, fqn: str) -> Any:
    owner, _, last = fqn.rpartition(".")
    value = getattr(root.get_submodule(owner), last)
    if not isinstance(value, nn.Module):
        return tuple(value.shape), str(value.dtype)
    children = [(type(m).__qualname__, m.extra_repr(), _settings(m)) for m in value.modules()]
    return children, [(tuple(p.shape), str(p.dtype), p.requires_grad) for p in value.parameters()]


def _settings(module: nn.Module) -> list[tuple[str, Any]]:
    """Return the plain attributes of a module, without the one that only numbers the layers."""
    return sorted(
        (name, value)
        for name, value in vars(module).items()
        if type(value) in (bool, int, float, str)
        and not name.startswith("_")
        and not any(word in name for word in ("idx", "index", "layer_id", "layer_number"))
    )
