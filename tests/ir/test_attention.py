"""The parts of an attention are those that torch runs where it has no kernel."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from ipu_pipeline.ir.attention import (
    attention_name,
    is_attention,
    unfused,
    unfused_saved_bytes,
    weights_bytes,
)
from ipu_pipeline.ir.graph import OpRecord

HEADS = (2, 4, 16, 8)
NAMES = {"bmm", "add", "_safe_softmax", "bernoulli_", "div_", "mul", "_softmax_backward_data"}


class Seen(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[tuple[str, tuple[int, ...]]] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = str(func.overloadpacket).removeprefix("aten.")
        if name in NAMES:
            self.counts[name, tuple(args[0].shape)] += 1
        return result


def op(*shapes: tuple[int, ...], dropout: bool = False, backward: bool = False) -> OpRecord:
    name = attention_name(bias=False, dropout=dropout, backward=backward)
    return OpRecord(f"aten.{name}", "matmul", "float32", shapes, 1, 1, 3)


@pytest.mark.parametrize("dropout", [False, True])
def test_parts_are_torchs(dropout: bool) -> None:
    q, k, v = (torch.empty(HEADS, device="meta", requires_grad=True) for _ in range(3))
    mask = torch.empty(2, 1, 16, 16, device="meta")
    with Seen() as forward:
        out = functional.scaled_dot_product_attention(q, k, v, mask, 0.1 if dropout else 0.0)
    with Seen() as backward:
        torch.autograd.backward(out, torch.empty_like(out))
    shapes = (HEADS, HEADS, HEADS, (2, 1, 16, 16))
    for seen, one in (
        (forward, op(*shapes, dropout=dropout)),
        (backward, op(HEADS, *shapes, dropout=dropout, backward=True)),
    ):
        parts = Counter[tuple[str, tuple[int, ...]]]()
        for part in unfused((one,)):
            assert part.count == 3
            name = part.name.removeprefix("aten.")
            if name in NAMES:
                parts[name, part.shapes[0]] += 1
        assert parts == seen.counts


def test_other_operations_stay() -> None:
    other = OpRecord("aten.gelu", "vector", "float32", (HEADS,), 0, 8)
    assert list(unfused((other,))) == [other]
    assert not is_attention(other)


def test_bytes_by_hand() -> None:
    weights, sums = 2 * 4 * 16 * 16 * 4, 2 * 4 * 16 * 4
    plain, dropped = op(HEADS, HEADS, HEADS), op(HEADS, HEADS, HEADS, dropout=True)
    assert weights_bytes(plain) == weights
    assert unfused_saved_bytes(()) == 0
    assert unfused_saved_bytes((plain,)) == 3 * (weights - sums)
    assert unfused_saved_bytes((dropped,)) == 3 * (3 * weights - sums)
    shared = op(HEADS, (2, 2, 16, 8), (2, 2, 16, 8))  # two heads of queries share keys and values
    repeated = 2 * (2 * 2 * 16 * 8 * 4)
    assert unfused_saved_bytes((shared,)) == 3 * (weights - sums + repeated)
