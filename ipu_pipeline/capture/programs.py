"""Turn blocks into programs: one small ``fx.GraphModule`` each, independent of any split.

A stage runs the programs of its blocks one after another on a dictionary of named values; what
it needs of the prelude it computes from the model inputs with :func:`prelude_program`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from ipu_pipeline.capture.calls import set_modes
from ipu_pipeline.capture.coarsen import Coarse, dependencies, is_attribute
from ipu_pipeline.capture.state import key_of
from ipu_pipeline.capture.values import TensorMeta, reached, storage_key


@dataclass(frozen=True)
class Program:
    """Executable code with named inputs and outputs.

    Attributes:
        name: The block's name, or ``prelude``.
        inputs: Names of the values it takes, in argument order.
        outputs: Names of the values it returns, as a tuple in this order.
        module: Runs it; its submodules and parameters are the model's own objects.
        prelude_order: Prelude values whose in-place writes must have happened before.
        reads: Names of the model's own tensors that it reads and some forward pass changes.
        writes: Names of those that it changes.
        changing: Both, by name.
        modes: The training flag that every module in it had when it was called.
        draws: Whether it draws from generators of Python or numpy, or from one that a module keeps.
    """

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    module: fx.GraphModule
    prelude_order: tuple[str, ...] = ()
    reads: frozenset[str] = frozenset()
    writes: frozenset[str] = frozenset()
    changing: Mapping[str, Tensor] = field(default_factory=dict)
    modes: tuple[tuple[nn.Module, bool], ...] = ()
    draws: bool = False

    def __call__(self, *inputs: Any) -> Any:
        """Return the outputs; every module is put into its mode before."""
        set_modes(self.modes)
        return self.module(*inputs)

    def run(self, values: dict[str, Any]) -> None:
        """Take the inputs from ``values`` and put the outputs there."""
        with self.saving_copies():
            outputs = self(*(values[name] for name in self.inputs))
        values.update(zip(self.outputs, outputs, strict=True))

    def saving_copies(self) -> AbstractContextManager[Any]:
        """Within it, autograd saves copies of the tensors that it reads and forward passes change.

        The next microbatch changes them before the backward pass of this one.
        """
        changing = {key_of(self.changing[name]) for name in self.reads}
        if not changing or not torch.is_grad_enabled():
            return nullcontext()

        def pack(tensor: Tensor) -> Tensor:
            return tensor.detach().clone() if key_of(tensor) in changing else tensor

        return torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)


def block_programs(coarse: Coarse, attributes: Mapping[str, Any]) -> tuple[Program, ...]:
    """Return one program per block, in execution order."""
    owner = {node: block.name for block in coarse.blocks for node in block.nodes}
    needed = {node for node in coarse.results.values() if node in owner}  # by others, or the caller
    for node, block_name in owner.items():
        needed |= {n for n in node.all_input_nodes if owner.get(n, block_name) != block_name}
    prelude, returned = set(coarse.prelude), frozenset(coarse.results.values())
    kept = frozenset(map(storage_key, coarse.changing.values()))
    made = []
    for block in coarse.blocks:
        given = (n for node in block.nodes for n in node.all_input_nodes if not is_attribute(n))
        inputs = dict.fromkeys(n for n in given if owner.get(n) != block.name)
        after = (n for node in block.nodes for n in node.meta.get("after", ()))
        outputs = [node for node in block.nodes if node in needed]
        program = _build(block.name, block.nodes, [*inputs], outputs, attributes, kept, returned)
        writes = _named(block.nodes, "state")
        reads = _named(block.nodes, "reads") & coarse.changing.keys()
        made.append(
            replace(
                program,
                prelude_order=tuple(dict.fromkeys(n.name for n in after if n in prelude)),
                reads=reads,
                writes=writes,
                changing={n: t for n, t in coarse.changing.items() if n in reads | writes},
            )
        )
    return tuple(made)


def _named(nodes: Iterable[fx.Node], key: str) -> frozenset[Any]:
    """Return what nodes note under ``key``, together."""
    return frozenset().union(*(node.meta.get(key, frozenset()) for node in nodes))


def prelude_program(
    coarse: Coarse, attributes: Mapping[str, Any], wanted: Iterable[str], given: Iterable[str] = ()
) -> Program:
    """Return the program that computes the prelude values ``wanted`` from the model inputs.

    Those that are ``given`` are inputs of it, too.
    """
    by_name = {node.name: node for node in coarse.prelude}
    outputs = tuple(dict.fromkeys(name for name in wanted if name in by_name))
    first = {by_name[name] for name in given}

    def needed(node: fx.Node) -> list[fx.Node]:
        return [] if node in first else [n for n in dependencies(node) if not is_attribute(n)]

    closure = set(reached([by_name[name] for name in outputs], needed))
    nodes = [node for node in coarse.prelude if node in closure]
    inputs = [node for node in nodes if node.op == "placeholder" or node in first]
    body = [node for node in nodes if node not in inputs]
    return _build("prelude", body, inputs, [by_name[name] for name in outputs], attributes)


def _build(
    name: str,
    body: Sequence[fx.Node],
    inputs: Sequence[fx.Node],
    outputs: Sequence[fx.Node],
    attributes: Mapping[str, Any],
    kept: frozenset[int] = frozenset(),
    returned: frozenset[fx.Node] = frozenset(),
) -> Program:
    """Build a program; ``kept`` is memory of the model's own that forward passes change."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in inputs:
        copies[node] = graph.placeholder(node.name)
    written = _named(body, "writes")
    for node in inputs:
        if node.meta.get("storage") in written - kept:
            # Values of other blocks and the caller's batch stay as they are: another stage may
            # hold the same memory.
            copies[node] = graph.call_method("clone", (copies[node],))
    held: dict[str, Any] = {}
    for node in body:
        for source in node.all_input_nodes:
            if is_attribute(source) and source not in copies:
                copies[source] = graph.get_attr(_tensor_name(source))
                held[_tensor_name(source)] = attributes[str(source.target)]
        copies[node] = graph.node_copy(node, copies.__getitem__)
        if node.op == "call_module":
            held[str(node.target)] = attributes[str(node.target)]
    for node in returned.intersection(outputs):
        if node.meta.get("storage") in kept:  # the next microbatch changes it
            copies[node] = graph.call_method("clone", (copies[node],))
    graph.output(tuple(copies[node] for node in outputs))
    class_name = "".join(part if part.isidentifier() else "_" for part in name.title()) or "Block"
    module = fx.GraphModule(held, graph, class_name)
    return Program(
        name,
        tuple(node.name for node in inputs),
        tuple(node.name for node in outputs),
        module,
        draws=any(node.meta.get("draws", False) for node in body),
        modes=tuple({part: mode for n in body for part, mode in n.meta.get("modes", ())}.items()),
    )


def _tensor_name(node: fx.Node) -> str:
    """Return where a program keeps a tensor of the model.

    Not under its own name: fx would register it anew in the user's module when that module is a
    part of the program, which makes a buffer persistent.
    """
    return f"_tensors.{str(node.target).replace('.', '_')}"


def program_signature(program: Program, specs: Mapping[str, TensorMeta]) -> str:
    """Return a hex digest that is equal for programs that do the same work on equal inputs."""
    position: dict[fx.Node, int] = {}
    lines: list[Any] = []
    for node in program.module.graph.nodes:
        position[node] = len(position)
        if node.op in ("call_module", "get_attr"):
            target = _object(program.module, str(node.target))
        elif node.op == "call_function":
            target = (
                getattr(node.target, "__module__", ""),
                getattr(node.target, "__qualname__", None) or repr(node.target),
            )
        else:  # a method has its name; how a value is called does not matter
            target = str(node.target) if node.op == "call_method" else None
        arguments = fx.map_arg((node.args, node.kwargs), lambda n: f"%{position[n]}")
        lines.append((node.op, target, arguments))
    inputs = [specs[name] for name in program.inputs]
    return hashlib.sha256(f"{lines}{inputs}".encode()).hexdigest()[:24]


def _object(root: nn.Module, fqn: str) -> Any:
    owner, _, last = fqn.rpartition(".")
    value = getattr(root.get_submodule(owner), last)
    if not isinstance(value, nn.Module):
        return tuple(value.shape), str(value.dtype)
    return _contents(value)


def module_signature(module: nn.Module) -> str:
    """Return a text that is equal for modules that do the same work on equal inputs."""
    return repr(_contents(module))


def _contents(module: nn.Module) -> Any:
    children = [(type(m).__qualname__, m.extra_repr(), _settings(m)) for m in module.modules()]
    return children, [(tuple(p.shape), str(p.dtype), p.requires_grad) for p in module.parameters()]


def _settings(module: nn.Module) -> list[tuple[str, Any]]:
    """Return the plain attributes of a module, without the one that only numbers the layers."""
    return sorted(
        (name, value)
        for name, value in vars(module).items()
        if type(value) in (bool, int, float, str)
        and not name.startswith("_")
        and not any(word in name for word in ("idx", "index", "layer_id", "layer_number"))
    )
