"""Megatron's layout language: what is read, what is refused, and the blocks of a model."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ipu_pipeline.backends.cluster.layouts.megatron_layout import (
    LayerLayout,
    blocks_of,
    layout_of,
    letters_of,
    parse_layout,
)
from ipu_pipeline.errors import PlanError
from ipu_pipeline.ir.graph import Block, BlockGraph

ABSENT = "pip install --no-deps -r tests/backends/cluster/exchange.txt"
GRAPH = BlockGraph(
    "Llama",
    (
        Block("embed", "embedding"),
        *(Block(f"layers.{n}", "layer") for n in range(3)),
        Block("head", "head"),
        Block("loss", "loss"),
    ),
)


def test_a_published_layout_is_read_and_written_back() -> None:
    text = "Et*2|(t*2|)*34,t*3|(t*2|)*3,tL"
    layout = parse_layout(text)
    assert layout.stages == ("Ett", *["tt"] * 34, "ttt", *["tt"] * 3, "tL")
    assert (len(layout.stages), layout.num_layers, layout.num_extra_layers) == (40, 80, 0)
    assert str(layout) == text


@pytest.mark.parametrize(
    ("text", "stages"),
    [
        ("Ett|t, t|tmL", ("Ett", "tt", "tmL")),
        ("E|t*2||(t|t*2|)*2mL", ("E", "tt", "", "t", "tt", "t", "tt", "mL")),
        ("E(t|)*2,|*2,t*0L", ("Et", "t", "", "", "L")),
        ("", ("",)),
    ],
)
def test_commas_blanks_and_repeats(text: str, stages: tuple[str, ...]) -> None:
    assert parse_layout(text).stages == stages


@given(st.lists(st.text("EtmL", max_size=6), min_size=1, max_size=12))
def test_what_is_written_is_read_back(stages: list[str]) -> None:
    layout = LayerLayout(tuple(stages))
    assert parse_layout(str(layout)) == layout


@given(st.text("EtmL|()**23,0", max_size=12))
def test_megatron_reads_the_same(text: str) -> None:
    real = pytest.importorskip(
        "megatron.core.transformer.pipeline_parallel_layer_layout", reason=ABSENT
    )
    letters = {"embedding": "E", "decoder": "t", "mtp": "m", "loss": "L"}
    try:
        layout = parse_layout(text)
    except PlanError:
        return
    for written in (text, str(layout)):
        found = real.PipelineParallelLayerLayout.parse_str_to_list(written)
        assert layout.stages == tuple("".join(letters[x.name] for x in part) for part in found)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Et*2|x", r"'x' at position 6 cannot be read; use E, t, m, L"),
        ("E*2*3", r"'\*3' at position 4 cannot be read; put one letter or one group before it"),
        ("E(t", r"'\(t' at position 2 cannot be read; a group is written"),
        ("E(t)", r"at position 2 cannot be read; a group is written"),
        ("Et)*2", r"'\)\*2' at position 3 cannot be read; a group is written"),
        ("((t*9999)*9999)*9999", "at position 1 cannot be read; .* no group in a group"),
        ("(" * 100_000, r"\.\.\.' at position 1"),
        ("(t*9999)*9999", "more than 14096 layers and stages; lower its repeats"),
        ("t*" + "9" * 5000, "more than 14096 layers and stages"),
    ],
)
def test_what_is_no_layout_is_refused_at_once(text: str, message: str) -> None:
    begin = time.process_time()
    with pytest.raises(PlanError, match=message):
        parse_layout(text)
    assert time.process_time() - begin < 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("t|tL", r"has 0 times E \(embedding\); it must begin with the only one"),
        ("tE|tL", "has 1 times E"),
        ("Et|t", r"has 0 times L \(loss\); it must end with the only one"),
        ("Et|tLL", "has 2 times L"),
        ("Emt|L", r"decoder layer \(t\) behind a multi-token prediction layer"),
        ("Ett|L", r"the layout has 2 decoder layers \(t\), Llama has 3; write one t for each"),
        ("Ettt|mL", r"the layout has 1 multi-token prediction layers \(m\), the graph 0"),
    ],
)
def test_what_does_not_fit_the_model_is_refused(text: str, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        blocks_of(parse_layout(text), GRAPH)


def test_blocks_of_a_layout_and_back() -> None:
    layout = parse_layout("E||t*2|tL")
    stages = blocks_of(layout, GRAPH)
    assert stages == (("embed",), (), ("layers.0", "layers.1"), ("layers.2", "head", "loss"))
    assert layout_of(GRAPH, stages) == layout


def test_what_no_layout_says_is_refused() -> None:
    blocks = GRAPH.blocks
    with pytest.raises(PlanError, match=r"blocks head, loss \(head and loss\) are in stages 0 and"):
        layout_of(GRAPH, [["embed", "layers.0", "layers.1", "layers.2", "head"], ["loss"]])
    apart = BlockGraph("T5", (*blocks[:2], Block("decoder", "embedding"), *blocks[2:]))
    with pytest.raises(PlanError, match=r"block 'decoder' \(embedding\) is between the layers"):
        letters_of(apart)
    with pytest.raises(PlanError, match="Llama has no blocks of kind layer; make the plan with"):
        letters_of(BlockGraph("Llama", blocks[:1]))
