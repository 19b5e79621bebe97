"""Which programs do the same work: equal code on equal modules and equal shapes."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from torch import nn

from ipu_pipeline.capture.programs import Program
from ipu_pipeline.capture.trace import TensorMeta


def program_signature(program: Program, specs: Mapping[str, TensorMeta]) -> str:
    """Return a hex digest that is equal for programs that do the same work.

    Args:
        program: The program of a block.
        specs: Description of every value by name; only the program's inputs are read.
    """
    canonical: dict[str, int] = {}
    lines: list[Any] = []
    for node in program.module.graph.nodes:
        canonical[node.name] = len(canonical)
        arguments = [canonical[source.name] for source in node.all_input_nodes]
        if node.op in ("call_module", "get_attr"):
            lines.append((node.op, arguments, _target(program.module, str(node.target))))
        else:
            name = getattr(node.target, "__name__", str(node.target))
            plain = [a for a in (*node.args, *node.kwargs.items()) if not hasattr(a, "op")]
            shown = [] if node.op == "placeholder" else [name, repr(plain)]
            lines.append((node.op, arguments, shown))
    text = _renamed(repr(lines), canonical)
    inputs = [specs[name] for name in program.inputs]
    return hashlib.sha256(f"{text}{inputs}".encode()).hexdigest()[:24]


def _renamed(text: str, canonical: Mapping[str, int]) -> str:
    for name in sorted(canonical, key=len, reverse=True):
        text = text.replace(name, f"v{canonical[name]}")
    return text


def _target(root: nn.Module, fqn: str) -> Any:
    owner, _, last = fqn.rpartition(".")
    value = getattr(root.get_submodule(owner), last)
    if not isinstance(value, nn.Module):
        return tuple(value.shape), str(value.dtype)
    children = [(type(m).__qualname__, m.extra_repr(), m.training) for m in value.modules()]
    return children, [(tuple(p.shape), str(p.dtype), p.requires_grad) for p in value.parameters()]
