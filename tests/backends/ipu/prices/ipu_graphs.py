"""Small graphs for the IPU model, made by hand: sizes and costs are easy to follow."""

from __future__ import annotations

from ipu_pipeline.ir.graph import Block, BlockGraph, OpRecord, ParameterSpec, TensorSpec

VOCAB, ROWS_PER_TOKEN = 8192, 1


def product(m: int, k: int, n: int) -> OpRecord:
    moved = 4 * (m * k + k * n + m * n)
    return OpRecord("aten.mm", "matmul", "float32", ((m, k), (k, n)), 2 * m * k * n, moved)


def vector(*shape: int, name: str = "aten.add") -> OpRecord:
    size = 4
    for side in shape:
        size *= side
    return OpRecord(name, "vector", "float32", (shape, shape), 0, 3 * size)


def layered(
    num_layers: int = 4,
    batch: int = 4,
    seq: int = 128,
    hidden: int = 256,
    *,
    tied: bool = True,
    training: bool = True,
) -> BlockGraph:
    """An embedding, equal layers (one hidden x hidden product each), a projection and a loss."""
    rows = batch * seq
    lookup = OpRecord(
        "aten.embedding", "gather", "float32", ((VOCAB, hidden), (batch, seq)), 0, 4 * rows * hidden
    )
    scatter = OpRecord(
        "aten.embedding_dense_backward", "scatter", "float32",
        ((batch, seq, hidden), (batch, seq)), 0, 4 * rows * hidden,
    )  # fmt: skip
    activation = (batch, seq, hidden)
    names = [f"layer.{i}" for i in range(num_layers)]
    head_weight = "wte" if tied else "head.weight"
    blocks = [
        Block("wte", "embedding", "wte", ("wte",), (), ("h",), (lookup,), (scatter,)),
        *(
            Block(
                name, "layer", name, (f"{name}.weight",), ("h" if i == 0 else f"h{i - 1}",),
                (f"h{i}",), (product(rows, hidden, hidden), vector(*activation)),
                (product(rows, hidden, hidden), product(hidden, rows, hidden)),
                saved_bytes=8 * rows * hidden, workspace_bytes=4 * rows * hidden,
            )
            for i, name in enumerate(names)
        ),
        Block(
            "head", "head", "head", (head_weight,), (f"h{num_layers - 1}",), ("logits",),
            (product(rows, hidden, VOCAB),),
            (product(rows, VOCAB, hidden), product(VOCAB, rows, hidden)),
        ),
        Block("loss", "loss", None, (), ("logits",), ("loss",), (vector(rows, VOCAB),)),
    ]  # fmt: skip
    consumers = [*names, "head"]
    tensors = [
        TensorSpec(
            "h" if i == 0 else f"h{i - 1}", activation, "float32", True,
            "wte" if i == 0 else names[i - 1], (consumers[i],),
        )
        for i in range(num_layers + 1)
    ]  # fmt: skip
    tensors.append(TensorSpec("logits", (rows, VOCAB), "float32", True, "head", ("loss",)))
    shapes = {"wte": (VOCAB, hidden), **{f"{name}.weight": (hidden, hidden) for name in names}}
    users = {"wte": ("wte", "head") if tied else ("wte",)}
    if not tied:
        shapes["head.weight"] = (VOCAB, hidden)
    parameters = tuple(
        ParameterSpec(fqn, shape, "float32", blocks=users.get(fqn, (fqn.removesuffix(".weight"),)))
        for fqn, shape in shapes.items()
    )
    return BlockGraph(
        "Layered", tuple(blocks), tuple(tensors),
        (TensorSpec("input_ids", (batch, seq), "int64"),), parameters, ("loss",), training,
    )  # fmt: skip
