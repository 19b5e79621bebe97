from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ipu_pipeline.backends.ipu.prices import IPUMemory, IPUSettings, chip_named
from ipu_pipeline.backends.ipu.prices.layout import PlacedProgram, make_layout
from ipu_pipeline.backends.ipu.prices.memory import (
    CODE_BYTES_INFERENCE,
    CODE_BYTES_PER_PRODUCT,
    CODE_BYTES_TRAINING,
    FULLEST_TILE,
    code_bytes,
    ipu_memory,
    num_products,
    saved_bytes,
    stash_depth,
)
from ipu_pipeline.ir.graph import OpRecord
from tests.backends.ipu.prices.ipu_graphs import VOCAB, layered

CHIP = chip_named("ipu-gc200")
RUN = IPUSettings(num_ipus=3, layers_per_ipu=(0, 2, 2), accumulation=32, proportions=(0.2,) * 3)
GRAPH = layered(4)
ACTIVATION = 4 * 128 * 256 * 2


def _memory(run=RUN, graph=GRAPH) -> tuple[IPUMemory, ...]:
    return ipu_memory(PlacedProgram(graph, make_layout(graph, run), run, CHIP))


def _total(run=RUN, graph=GRAPH) -> int:
    return sum(memory.total_bytes for memory in _memory(run, graph))


def test_parameters_by_kind() -> None:
    first, second, _ = _memory()
    assert first.weights == first.gradients == VOCAB * 256 * 2
    assert first.optimizer == VOCAB * 256 * 8
    assert second.weights == 2 * 256 * 256 * 2


@pytest.mark.parametrize(
    ("change", "per_element"),
    [
        ({}, 8),
        ({"half_first_moment": True}, 6),
        ({"optimizer": "SGD"}, 0),
        ({"optimizer_offchip": True}, 0),
        ({"sharded": True, "replicas": 4}, 2),
        ({"replicas": 4}, 8),
    ],
)
def test_optimizer_state_per_parameter(change: dict[str, object], per_element: int) -> None:
    assert _memory(replace(RUN, **change))[1].optimizer == 2 * 256 * 256 * per_element


def test_stash_depths_are_poparts() -> None:
    assert [stash_depth(4, stage) for stage in range(4)] == [7, 5, 3, 1]


def test_stash_by_hand() -> None:
    # F = 4 (embedding, two layers, two layers, tied head): IPU 1 keeps 5 microbatches of the
    # stage's input and of its second layer's
    assert _memory()[1].stash == 5 * 2 * ACTIVATION
    assert _memory(replace(RUN, checkpoint_layers=False))[1].stash == 5 * ACTIVATION
    assert _memory(replace(RUN, checkpoint_bytes=1))[1].stash == 5 * ACTIVATION


def test_recomputing_layer_by_layer_keeps_one_layer() -> None:
    saved = 2 * ACTIVATION  # 8 bytes per element captured in float32
    assert _memory()[1].activations == saved
    assert _memory(replace(RUN, checkpoint_layers=False))[1].activations == 2 * saved


def test_without_recomputation_everything_saved_is_stashed() -> None:
    memory = _memory(replace(RUN, recompute=False))[1]
    assert memory.stash == 5 * 2 * (2 * ACTIVATION)
    assert memory.activations == 0


def test_dropout_masks_are_drawn_again() -> None:
    block = GRAPH["layer.0"]
    mask = OpRecord("aten.bernoulli_", "random", "float32", ((4, 128, 256),), 0, 1)
    random = replace(block, forward_ops=(*block.forward_ops, mask))
    assert saved_bytes(block, RUN) - saved_bytes(random, RUN) == ACTIVATION


def test_code_grows_with_the_products() -> None:
    assert num_products(GRAPH["layer.0"]) == 1
    assert code_bytes(3, training=False) == int(CODE_BYTES_INFERENCE + 3 * CODE_BYTES_PER_PRODUCT)
    assert code_bytes(0, training=True) == CODE_BYTES_TRAINING


def test_the_fullest_tile_decides() -> None:
    even = IPUMemory(weights=CHIP.memory_bytes)
    assert not even.fits(CHIP)
    assert IPUMemory(weights=int(CHIP.memory_bytes / FULLEST_TILE) - 1472).fits(CHIP)
    assert even.fullest_tile_bytes(CHIP) == int(CHIP.tile_memory_bytes * FULLEST_TILE)


def test_inference_keeps_no_training_state() -> None:
    graph = replace(layered(4), training=False)
    run = replace(RUN, training=False, accumulation=1, device_iterations=8)
    for memory in _memory(run, graph):
        assert (memory.gradients, memory.optimizer, memory.stash, memory.activations) == (0,) * 4


def test_serialization_shrinks_the_projection() -> None:
    whole, sliced = _memory()[0], _memory(replace(RUN, projection_factor=4))[0]
    assert sliced.temporaries < whole.temporaries


def test_an_ipu_without_blocks_is_empty() -> None:
    graph = layered(2)
    assert _memory(replace(RUN, layers_per_ipu=(0, 2, 0)), graph)[2] == IPUMemory()


@settings(max_examples=20, deadline=None)
@given(st.sampled_from([1, 2, 4]), st.integers(1, 3), st.booleans())
def test_more_samples_never_need_less(batch: int, factor: int, checkpoint: bool) -> None:
    run = replace(RUN, checkpoint_layers=checkpoint, projection_factor=factor)
    assert _total(run, layered(4, 2 * batch)) >= _total(run, layered(4, batch))


@given(st.integers(1, 16), st.booleans())
def test_off_chip_never_needs_more(replicas: int, sharded: bool) -> None:
    run = replace(RUN, replicas=replicas, sharded=sharded)
    assert _total(replace(run, optimizer_offchip=True)) <= _total(run)


@given(st.integers(2, 16))
def test_sharding_never_needs_more(replicas: int) -> None:
    run = replace(RUN, replicas=replicas)
    assert _total(replace(run, sharded=True)) < _total(run)


@given(st.sampled_from([0.05, 0.1, 0.2, 0.6]), st.sampled_from([0.05, 0.1, 0.2, 0.6]))
def test_the_proportion_bounds_the_operands(one: float, other: float) -> None:
    less, more = sorted((one, other))
    product_only = [
        memory.temporaries - _memory(replace(RUN, proportions=(1e-9,) * 3))[i].temporaries
        for i, memory in enumerate(_memory(replace(RUN, proportions=(less,) * 3)))
    ]
    assert max(product_only) <= less * CHIP.memory_bytes <= more * CHIP.memory_bytes
