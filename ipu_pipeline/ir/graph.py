"""The block graph: what a captured model looks like to the planner. Plain data, no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod
from typing import Any, Literal

from ipu_pipeline.errors import PlanError
from ipu_pipeline.ir.codec import Count, from_json, to_json

DTYPE_BYTES: Mapping[str, float] = {
    "float64": 8, "int64": 8, "complex64": 8, "complex128": 16, "uint64": 8,
    "float32": 4, "int32": 4, "uint32": 4,
    "float16": 2, "bfloat16": 2, "int16": 2, "uint16": 2,
    "int8": 1, "uint8": 1, "bool": 1,
    "float8_e4m3fn": 1, "float8_e5m2": 1, "float8_e4m3fnuz": 1, "float8_e5m2fnuz": 1,
}  # fmt: skip

BlockKind = Literal["embedding", "layer", "head", "loss", "other"]
OpKind = Literal["matmul", "vector", "gather", "scatter", "softmax", "norm", "copy", "random"]


def tensor_bytes(shape: tuple[int, ...], dtype: str) -> int:
    """Bytes of a dense tensor of ``shape`` and ``dtype`` (a torch dtype name without prefix).

    Raises:
        ValueError: The dtype is unknown.
    """
    if dtype not in DTYPE_BYTES:
        raise ValueError(f"unknown dtype {dtype!r}; known: {', '.join(sorted(DTYPE_BYTES))}")
    return int(prod(shape) * DTYPE_BYTES[dtype])


@dataclass(frozen=True)
class TensorSpec:
    """One tensor that travels between blocks or enters the model, for ONE microbatch.

    Attributes:
        name: Unique in its graph.
        shape: Sizes; axis 0 is the micro batch for model inputs.
        dtype: torch dtype name without ``torch.``, such as ``float32``.
        requires_grad: Whether a gradient of the same size flows back.
        producer: Block that computes it; ``None`` for a model input.
        consumers: Blocks that read it, in execution order, without repeats.
        kept: Whether a block that reads it keeps it for its backward pass.
    """

    name: str
    shape: tuple[Count, ...]
    dtype: str
    requires_grad: bool = False
    producer: str | None = None
    consumers: tuple[str, ...] = ()
    kept: bool = False

    @property
    def num_bytes(self) -> int:
        """Size in bytes."""
        return tensor_bytes(self.shape, self.dtype)


@dataclass(frozen=True)
class ParameterSpec:
    """One distinct parameter object, under its first name in the model.

    Attributes:
        fqn: First fully qualified name in ``named_parameters`` order.
        aliases: Its other names when the object is shared (tied weights).
        blocks: Blocks that use it, in execution order; two or more make it tied across blocks.
    """

    fqn: str
    shape: tuple[Count, ...]
    dtype: str
    trainable: bool = True
    aliases: tuple[str, ...] = ()
    blocks: tuple[str, ...] = ()

    @property
    def numel(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def num_bytes(self) -> int:
        """Size in bytes."""
        return tensor_bytes(self.shape, self.dtype)


@dataclass(frozen=True)
class SharedState:
    """A tensor of the model that forward passes change and that several blocks use.

    Only one stage can run them: others would read it before or after another microbatch.

    Attributes:
        fqn: Name of the buffer, of the parameter, or of the attribute that holds the tensor.
        readers: Blocks that read it, in execution order.
        writers: Blocks that change it, in execution order.
        backward: Backward passes change it: then a microbatch must end before the next begins,
            and all blocks are readers and writers.
    """

    fqn: str
    readers: tuple[str, ...]
    writers: tuple[str, ...]
    backward: bool = False

    def __post_init__(self) -> None:
        if not self.writers:
            raise ValueError(f"nothing changes the state {self.fqn!r}")

    @property
    def blocks(self) -> tuple[str, ...]:
        """All of them, each once."""
        return tuple(dict.fromkeys((*self.readers, *self.writers)))

    def between(self, block: str) -> str:
        """Say that ``block`` and the last writer share it."""
        if self.backward:
            return f"the backward pass changes {self.fqn!r}, which the next microbatch reads"
        return f"block {block!r} uses {self.fqn!r} and block {self.writers[-1]!r} changes it"

    def __str__(self) -> str:
        """Say which two blocks share it."""
        return self.between(next(iter(self.blocks)))


@dataclass(frozen=True)
class OpRecord:
    """``count`` equal tensor operations inside a block, for one microbatch.

    Attributes:
        name: ATen name, such as ``aten.addmm``.
        kind: Class of work, which a cost model prices differently.
        dtype: dtype of the (first) output.
        shapes: Shapes of the tensor arguments, in order.
        flops: Floating point operations of ONE occurrence (a multiply-add is 2).
        bytes_moved: Bytes read plus written by ONE occurrence (0 for views).
        count: How often it occurs.
    """

    name: str
    kind: OpKind
    dtype: str
    shapes: tuple[tuple[Count, ...], ...]
    flops: Count
    bytes_moved: Count
    count: Count = 1


@dataclass(frozen=True)
class Block:
    """The unit that may be placed on a device: a module call and the glue that follows it.

    Attributes:
        name: Unique name: the module's fqn (``fqn#2`` for its third call), or ``loss``.
        kind: Role in the model.
        module: fqn of the module whose call starts the block; ``None`` when it starts with glue.
        parameters: First names of the parameters it uses.
        inputs: Tensors it reads that other blocks produce.
        outputs: Tensors it produces that other blocks or the caller read.
        forward_ops: Operations of the forward pass, per microbatch.
        backward_ops: Operations of the backward pass, per microbatch.
        saved_bytes: Bytes kept from forward to backward without recomputation, per microbatch,
            without parameters and without the block's inputs.
        kept_bytes: Bytes of its outputs that later blocks keep for their backward pass and that
            are not in ``saved_bytes``.
        workspace_bytes: Most bytes alive at one time while it runs forward or backward, beyond
            ``saved_bytes``, ``kept_bytes``, parameters, their gradients, and its inputs.
        cut_bytes: Part of ``saved_bytes`` that ranks of tensor parallelism have slices of, by the
            model's own plan of what is cut; all else is whole on each of them.
        cut_workspace_bytes: The same of ``workspace_bytes``.
        uses_random: Whether it draws random numbers in training mode.
    """

    name: str
    kind: BlockKind = "other"
    module: str | None = None
    parameters: tuple[str, ...] = ()
    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    forward_ops: tuple[OpRecord, ...] = ()
    backward_ops: tuple[OpRecord, ...] = ()
    saved_bytes: Count = 0
    kept_bytes: Count = 0
    workspace_bytes: Count = 0
    uses_random: bool = False
    cut_bytes: Count = 0
    cut_workspace_bytes: Count = 0

    @property
    def forward_flops(self) -> int:
        """FLOPs of the forward pass of one microbatch."""
        return sum(op.flops * op.count for op in self.forward_ops)

    @property
    def backward_flops(self) -> int:
        """FLOPs of the backward pass of one microbatch, without recomputation."""
        return sum(op.flops * op.count for op in self.backward_ops)


@dataclass(frozen=True)
class BlockGraph:
    """A model as a graph of blocks, in execution order, for one microbatch.

    Values computed from model inputs and constants alone (attention masks, position ids) are
    no edges: every stage recomputes what it needs of them (DESIGN, decision 3).

    Attributes:
        model_class: Class name of the captured model.
        blocks: Blocks in the order in which the model executes them.
        tensors: Every tensor that crosses between blocks, and the results (``loss``).
        inputs: Model inputs of one microbatch.
        parameters: Every distinct parameter that some block uses.
        results: Names of the tensors returned to the caller.
        training: Whether it was captured in training mode.
        state: What ties blocks to one stage because forward passes change it.
    """

    model_class: str
    blocks: tuple[Block, ...]
    tensors: tuple[TensorSpec, ...] = ()
    inputs: tuple[TensorSpec, ...] = ()
    parameters: tuple[ParameterSpec, ...] = ()
    results: tuple[str, ...] = ()
    training: bool = True
    model_fingerprint: str = ""
    notes: tuple[str, ...] = field(default=())
    state: tuple[SharedState, ...] = ()

    @cached_property
    def block_index(self) -> Mapping[str, int]:
        """Position of every block in execution order."""
        return {block.name: position for position, block in enumerate(self.blocks)}

    @cached_property
    def tensor_by_name(self) -> Mapping[str, TensorSpec]:
        """Every crossing tensor by its name."""
        return {tensor.name: tensor for tensor in self.tensors}

    @cached_property
    def parameter_by_fqn(self) -> Mapping[str, ParameterSpec]:
        """Every parameter by its first name."""
        return {parameter.fqn: parameter for parameter in self.parameters}

    @cached_property
    def tied_groups(self) -> tuple[tuple[str, ...], ...]:
        """Groups of blocks that share at least one parameter, each in execution order."""
        groups = {parameter.blocks for parameter in self.parameters if len(parameter.blocks) > 1}
        return tuple(sorted(groups, key=lambda group: [self.block_index[name] for name in group]))

    @property
    def micro_batch_size(self) -> int:
        """Samples of one microbatch (axis 0 of the first input), 0 without inputs."""
        return next((spec.shape[0] for spec in self.inputs if spec.shape), 0)

    def __getitem__(self, name: str) -> Block:
        """Return the block called ``name``; ``KeyError`` names the blocks there are."""
        if name not in self.block_index:
            raise KeyError(f"no block {name!r}; blocks: {', '.join(self.block_index)}")
        return self.blocks[self.block_index[name]]

    def edges(self) -> Iterator[tuple[str, str, TensorSpec]]:
        """Yield ``(producer, consumer, tensor)`` for every tensor between two blocks."""
        for tensor in self.tensors:
            if tensor.producer is not None:
                for consumer in tensor.consumers:
                    yield tensor.producer, consumer, tensor

    def parameter_bytes(self, block: Block) -> int:
        """Bytes of the parameters that ``block`` uses, shared ones included."""
        return sum(self.parameter_by_fqn[fqn].num_bytes for fqn in block.parameters)

    def num_parameters(self, block: Block) -> int:
        """Elements of the parameters that ``block`` uses, shared ones included."""
        return sum(self.parameter_by_fqn[fqn].numel for fqn in block.parameters)

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON data; operations that several blocks share are written once."""
        numbers: dict[tuple[OpRecord, ...], int] = {}
        seen: dict[int, int] = {}  # long tuples are hashed once
        blocks = []
        for block in self.blocks:
            raw = to_json(replace(block, forward_ops=(), backward_ops=()))
            for key in ("forward_ops", "backward_ops"):
                ops = getattr(block, key)
                if id(ops) not in seen:
                    seen[id(ops)] = numbers.setdefault(ops, len(numbers))
                raw[key] = seen[id(ops)]
            blocks.append(raw)
        rest = to_json(replace(self, blocks=()))
        return {**rest, "blocks": blocks, "operations": [to_json(ops) for ops in numbers]}

    @classmethod
    def from_json(cls, raw: Any, source: str) -> BlockGraph:
        """Build a graph from :meth:`to_json`'s data.

        Raises:
            PlanError: A field is missing, unknown or of a wrong type.
        """
        if not isinstance(raw, Mapping):
            raise PlanError(f"{source}: expected an object with fields, got {type(raw).__name__}")
        given = dict(raw)
        operations = given.pop("operations", ())
        shared = from_json(
            tuple[tuple[OpRecord, ...], ...], operations, f"{source}, operations", PlanError
        )
        try:
            plain = [dict(block) for block in given["blocks"]]
            places = [(b.pop("forward_ops"), b.pop("backward_ops")) for b in plain]
            if wrong := next((place for pair in places for place in pair if place < 0), None):
                raise IndexError(f"{wrong} is no position in operations")
            ops = [(shared[forward], shared[backward]) for forward, backward in places]
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise PlanError(f"{source}: blocks and operations do not match: {error}") from error
        blocks = from_json(tuple[Block, ...], plain, f"{source}, blocks", PlanError)
        given["blocks"] = tuple(
            replace(block, forward_ops=forward, backward_ops=backward)
            for block, (forward, backward) in zip(blocks, ops, strict=True)
        )
        graph = from_json(cls, given, source, PlanError)
        _check_references(graph, source)
        return graph


def _check_references(graph: BlockGraph, source: str) -> None:
    """Refuse a graph that names what it does not hold, or holds one name twice.

    Raises:
        PlanError: It does; the message gives the place and the name.
    """
    blocks, tensors = graph.block_index, graph.tensor_by_name
    parameters = graph.parameter_by_fqn
    for kind, known, number in (
        ("block", blocks, len(graph.blocks)),
        ("tensor", tensors, len(graph.tensors)),
        ("parameter", parameters, len(graph.parameters)),
    ):
        if len(known) != number:
            raise PlanError(f"{source}: two {kind}s have one name; make the plan again")
    of_tensors = ((t.producer, *t.consumers) for t in graph.tensors if t.producer is not None)
    for what, held, names in (
        ("block", blocks, [name for group in of_tensors for name in group]),
        ("block", blocks, [name for p in graph.parameters for name in p.blocks]),
        ("block", blocks, [name for item in graph.state for name in item.blocks]),
        ("parameter", parameters, [name for block in graph.blocks for name in block.parameters]),
        ("tensor", tensors, [n for b in graph.blocks for n in (*b.inputs, *b.outputs)]),
        ("dtype", DTYPE_BYTES, [t.dtype for t in (*graph.tensors, *graph.inputs)]),
        ("dtype", DTYPE_BYTES, [p.dtype for p in graph.parameters]),
    ):
        strange = next((name for name in names if name not in held), None)
        if strange is not None:
            shown = strange if len(strange) <= 80 else f"{strange[:80]}..."
            raise PlanError(
                f"{source}: something names {what} {shown!r}, which is unknown; make the plan again"
            )
