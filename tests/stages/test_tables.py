"""Which parameter is a block's table, and what cannot be sliced."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import ipu_pipeline as ipp
from ipu_pipeline.errors import LoweringError
from ipu_pipeline.stages.tables import Table, TableUses, find_tables, fused_projections
from tests.stages.models import reader, serialized


def mean(logits: Tensor, labels: Tensor, model: Any) -> Tensor:
    return functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


def found(
    name: str, factors: dict[str, int]
) -> tuple[ipp.CapturedModel, dict[str, Table], nn.Module]:
    from tests.stages.models import built

    model, example, _, _ = built(name)
    uses = TableUses()
    with uses:
        captured = ipp.capture(model, example, self_check=False)
    return captured, find_tables(captured, uses, factors), model


def test_the_table_has_the_most_rows_of_all_that_are_read() -> None:
    factors = {"bert.embeddings": 2, "cls": 3, "bert.encoder.layer.0": 2}
    _, tables, model = found("bert-mlm (tied)", factors)
    words = model.get_parameter("bert.embeddings.word_embeddings.weight")
    assert tables["bert.embeddings"].parameter is words
    assert tables["cls"].parameter is words
    inner = model.get_parameter("bert.encoder.layer.0.intermediate.dense.weight")
    assert tables["bert.encoder.layer.0"].parameter is inner
    assert {name: table.factor for name, table in tables.items()} == factors


def test_only_a_projection_that_the_loss_alone_reads_is_fused() -> None:
    captured, tables, _ = found("gpt2 (tied)", {"transformer.wte": 2, "lm_head": 2})
    programs = captured.programs
    kept = captured.results.values()
    assert fused_projections(programs, programs, kept, tables) == {"lm_head"}
    assert fused_projections(programs[:-1], programs, kept, tables) == frozenset()
    logits = programs[-2].outputs
    assert fused_projections(programs, programs, logits, tables) == frozenset()


def test_blocks_without_a_table_are_refused() -> None:
    with pytest.raises(LoweringError, match=r"block 'loss' cannot be serialized: it has no table"):
        found("gpt2 (tied)", {"loss": 2})


def test_too_many_slices_are_refused() -> None:
    with pytest.raises(LoweringError, match=r"'lm_head'.*into 100 slices: .* has 99 rows"):
        found("gpt2 (tied)", {"lm_head": 100})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_norm": 1.0}, r"rescales rows in place \(max_norm=1.0\)"),
        ({"sparse": True}, r"asks for sparse gradients.*\(sparse=True\)"),
    ],
)
def test_lookups_that_cannot_be_sliced_are_refused(options: dict[str, Any], message: str) -> None:
    model, example, _ = reader(mean)
    plan = serialized(ipp.plan(model, example, num_stages=1, microbatches=1), {"embed": 2})
    for name, value in options.items():
        setattr(model.embed, name, value)
    with (
        ipp.compile(model, plan, self_check=False) as executable,
        pytest.raises(LoweringError, match=f"'embed' cannot be serialized: its lookup {message}"),
    ):
        executable.forward_backward(example)


def test_a_table_in_another_use_stays_whole() -> None:
    uses = TableUses()
    weight = nn.Parameter(torch.ones(4, 2))
    with uses:
        weight @ weight.T
        functional.linear(torch.ones(1, 2), torch.ones(3, 2))
    assert uses.refused == {}
