"""Choosing blocks: names, dotted prefixes, wildcards."""

from __future__ import annotations

from ipu_pipeline.ir.select import select, select_all, unmatched

NAMES = ("embed", "layer.1", "layer.1.attention", "layer.10", "layer.2.mlp", "wte#2", "wte", "loss")


def test_a_name_means_that_block_alone() -> None:
    assert select("layer.1", NAMES) == ("layer.1",)
    assert select("wte", NAMES) == ("wte",)


def test_a_prefix_ends_at_a_dot_or_a_call_number() -> None:
    assert select("layer", NAMES) == ("layer.1", "layer.1.attention", "layer.10", "layer.2.mlp")
    assert select("layer.2", NAMES) == ("layer.2.mlp",)
    assert select("wte", NAMES[:-2]) == ("wte#2",)
    assert select("lay", NAMES) == ()


def test_wildcards() -> None:
    assert select("*.attention", NAMES) == ("layer.1.attention",)
    assert select("layer.[12]*", NAMES) == (
        "layer.1",
        "layer.1.attention",
        "layer.10",
        "layer.2.mlp",
    )
    assert select("LOSS", NAMES) == ()


def test_several_patterns_keep_the_order_of_the_names() -> None:
    assert select_all(("loss", "layer.1*", "layer.10"), NAMES) == (
        "layer.1", "layer.1.attention", "layer.10", "loss",
    )  # fmt: skip
    assert unmatched(("loss", "x", "layer.3"), NAMES) == ("x", "layer.3")
