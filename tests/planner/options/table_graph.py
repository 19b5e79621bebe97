"""A graph with a lookup, a layer, a head and a loss over one vocabulary; sizes easy to follow."""

from __future__ import annotations

from ipu_pipeline.ir.graph import Block, BlockGraph, OpRecord, ParameterSpec, TensorSpec
from ipu_pipeline.ir.machine import Device, Link, Machine

VOCAB, HIDDEN, TOKENS = 50_000, 64, 1024


def product(left: tuple[int, int], right: tuple[int, int]) -> OpRecord:
    (m, k), n = left, right[1]
    return OpRecord(
        "aten.mm", "matmul", "float32", (left, right), 2 * m * k * n, 4 * (m * k + k * n + m * n)
    )


def table_graph(*, vocab: int = VOCAB, tokens: int = TOKENS, saved: int = 0, training: bool = True):
    """``saved``: bytes that the head keeps besides its input (a transform before the product)."""
    hidden, logits, table = (tokens, HIDDEN), (tokens, vocab), (vocab, HIDDEN)
    size, wide, dense = 4 * tokens * HIDDEN, 4 * tokens * vocab, 4 * vocab * HIDDEN
    lookup = OpRecord("aten.embedding", "gather", "float32", (table, (tokens,)), 0, 2 * size)
    scatter = OpRecord(
        "aten.embedding_dense_backward", "scatter", "float32", (hidden, (tokens,)), 0, size + dense
    )
    softmax = OpRecord("aten._log_softmax", "softmax", "float32", (logits,), 0, 2 * wide)
    gradient = OpRecord(
        "aten._log_softmax_backward_data", "softmax", "float32", (logits, logits), 0, 3 * wide
    )
    square, view = (HIDDEN, HIDDEN), "aten._unsafe_view"
    blocks = (
        Block("wte", "embedding", "wte", ("wte.weight",), (), ("h0",), (lookup,), (scatter,),
              workspace_bytes=size + dense),
        Block("layer", "layer", "layer", ("layer.weight",), ("h0",), ("h1",),
              (product(hidden, square),), (product(hidden, square), product(square, hidden[::-1])),
              saved_bytes=4 * size, workspace_bytes=size),
        Block("head", "head", "head", ("head.weight",), ("h1",), ("logits",),
              (product(hidden, table[::-1]), OpRecord(view, "vector", "float32", (logits,), 0, 8)),
              (product(logits[::-1], hidden), product(logits, table)),
              saved_bytes=saved, workspace_bytes=wide + dense),
        Block("loss", "loss", None, (), ("logits",), ("loss",), (softmax,), (gradient,),
              saved_bytes=wide + 4, workspace_bytes=2 * wide),
    )  # fmt: skip
    names = ("wte", "layer", "head", "loss")
    tensors = (
        TensorSpec("h0", hidden, "float32", True, "wte", ("layer",)),
        TensorSpec("h1", hidden, "float32", True, "layer", ("head",)),
        TensorSpec("logits", logits, "float32", True, "head", ("loss",)),
        TensorSpec("loss", (), "float32", True, "loss"),
    )
    parameters = tuple(
        ParameterSpec(f"{n}.weight", square if n == "layer" else table, "float32", blocks=(n,))
        for n in names[:3]
    )
    return BlockGraph(
        "Tables", blocks, tensors, (TensorSpec("ids", (tokens,), "int64", consumers=("wte",)),),
        parameters, ("loss",), training,
    )  # fmt: skip


def machine(num_devices: int = 2, memory: int = 10**12) -> Machine:
    devices = tuple(Device(f"d{i}", memory, {"float32": 1e12}, 1e11) for i in range(num_devices))
    return Machine("tables", devices, Link(1e10))
