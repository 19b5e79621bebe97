from __future__ import annotations

from dataclasses import replace
from math import ceil

import pytest

from ipu_pipeline.backends.ipu.prices import chip_named
from ipu_pipeline.backends.ipu.prices.chip import Calibration
from ipu_pipeline.backends.ipu.prices.matmul import Product
from ipu_pipeline.backends.ipu.prices.operations import (
    OperationPricer,
    lookup_size,
    products,
    result_bytes,
    sliced,
)
from ipu_pipeline.ir.attention import unfused
from ipu_pipeline.ir.graph import OpRecord
from tests.backends.ipu.prices.ipu_graphs import product, vector

CONSTANTS = Calibration(vector_bytes_per_cycle=2.0, launch_cycles=100.0, exchange_share=0.5)
PRICER = OperationPricer(replace(chip_named("ipu-gc200"), calibration=CONSTANTS), "16.16", 0.2)
TILES = 1472


def _op(name, kind, *shapes, flops=0, moved=0, dtype="float32") -> OpRecord:
    return OpRecord(f"aten.{name}", kind, dtype, shapes, flops, moved)


def test_elementwise_by_hand() -> None:
    # captured in float32 (3 x 4 bytes per element), run in float16: half the bytes
    op = vector(1472, 64)
    assert PRICER.cycles(op) == 100 + 3 * 2 * 64 / 2.0


def test_float32_moves_twice_the_bytes() -> None:
    wide = OperationPricer(PRICER.chip, "32.32", 0.2)
    op = vector(1472, 64)
    assert wide.cycles(op) - 100 == 2 * (PRICER.cycles(op) - 100)


@pytest.mark.parametrize("name", ["empty_like", "_unsafe_view", "ones_like", "div_"])
def test_what_does_not_exist_on_the_device_is_free(name: str) -> None:
    assert PRICER.cycles(vector(64, 64, name=f"aten.{name}")) == 0


def test_scalars_are_free() -> None:
    assert PRICER.cycles(_op("add", "vector", (), (), moved=12)) == 0


def test_a_softmax_takes_three_passes() -> None:
    softmax = _op("_safe_softmax", "softmax", (1472, 64), moved=2 * 4 * 1472 * 64)
    assert PRICER.cycles(softmax) == 3 * (100 + 2 * 2 * 64 / 2.0)


def test_odd_rows_cost_four_accesses() -> None:
    even = _op("_softmax", "softmax", (1472, 200), moved=8 * 1472 * 200)
    odd = _op("_softmax", "softmax", (1472, 197), moved=8 * 1472 * 197)
    assert (PRICER.cycles(odd) - 300) / 197 == pytest.approx(4 * (PRICER.cycles(even) - 300) / 200)


def test_a_copy_goes_over_the_exchange() -> None:
    clone = _op("clone", "copy", (1472, 64), moved=2 * 4 * 1472 * 64)
    assert PRICER.cycles(clone) == 100 + 2 * 64 / (4 * 0.5)


def test_products_of_the_captured_forms() -> None:
    addmm = _op("addmm", "matmul", (8,), (2, 4), (4, 8), flops=128)
    bmm = _op("bmm", "matmul", (3, 2, 4), (3, 4, 8), flops=384)
    assert products(addmm) == (Product(1, 2, 4, 8),)
    assert products(bmm) == (Product(3, 2, 4, 8),)
    assert products(addmm)[0].macs * 2 == 128


def test_a_convolution_is_a_product() -> None:
    # 8 images, 14 x 14 patches of 3 x 16 x 16 values, 768 filters
    flops = 2 * 8 * 196 * 768 * 768
    conv = _op("convolution", "matmul", (8, 3, 224, 224), (768, 3, 16, 16), flops=flops)
    assert products(conv) == (Product(1, 8 * 196, 768, 768),)


def test_a_depthwise_convolution_has_a_group_per_channel() -> None:
    flops = 2 * 4 * 28 * 28 * 96 * 49
    conv = _op("convolution", "matmul", (4, 96, 28, 28), (96, 1, 7, 7), flops=flops)
    assert products(conv) == (Product(96, 4 * 28 * 28, 49, 1),)


def test_fused_attention_is_two_products_forward_and_four_backward() -> None:
    heads = (2, 12, 128, 64)
    fused = _op("scaled_dot_product_attention", "matmul", heads, heads, heads, flops=1)
    scores, values = Product(24, 128, 64, 128), Product(24, 128, 128, 64)
    parts = [part for part in unfused((fused,)) if part.kind == "matmul"]
    assert [product for part in parts for product in products(part)] == [scores, values]
    back = _op("scaled_dot_product_attention_backward", "matmul", *[heads] * 4, flops=1)
    assert sum(part.kind == "matmul" for part in unfused((back,))) == 4


def test_unknown_products_keep_their_flops() -> None:
    (found,) = products(_op("odd", "matmul", (7,), flops=2 * 10**6))
    assert found == Product(1, 100, 100, 100)


def test_a_serialized_projection_runs_in_slices() -> None:
    whole = Product(1, 512, 256, 8192)
    assert sliced(whole, 8192, 4) == Product(1, 512, 256, 2048)
    assert sliced(whole, 0, 4) == sliced(whole, 8192, 1) == whole
    op = product(512, 256, 8192)
    assert PRICER.cycles(op, 8192, 4) == 4 * PRICER.plan(Product(1, 512, 256, 2048)).cycles
    assert result_bytes(op, 2, 8192, 4) == 512 * 2048 * 2


def test_a_lookup_by_hand() -> None:
    lookup = _op("embedding", "gather", (8192, 256), (4, 128), moved=10**6)
    assert lookup_size(lookup) == (512, 256)
    moved = 512 * 256 * 2 / (TILES * 4 * 0.5)
    assert PRICER.cycles(lookup) == 100 + 512 * 6 / 6 + moved + 100
    assert PRICER.cycles(lookup, 8192, 4) == 4 * (100 + 512) + moved + 100
    assert result_bytes(lookup, 2, 0, 1) == 512 * 256 * 2


def test_the_gradient_of_a_lookup_moves_the_same_rows() -> None:
    scatter = _op("embedding_dense_backward", "scatter", (4, 128, 256), (4, 128), moved=10**6)
    assert lookup_size(scatter) == (512, 256)


def test_a_gather_by_element_stays_in_its_row() -> None:
    gather = _op("gather", "gather", (1472, 64), (1472, 32), moved=10**6, dtype="float32")
    assert lookup_size(gather) == (1472 * 32, 1)
    assert PRICER.cycles(gather) == (32 + 100) + 32 * 8 / (4 * 0.5) + 100
    assert result_bytes(gather, 2, 0, 1) == 1472 * 32 * 2


def test_plans_use_the_tiles_they_need() -> None:
    assert PRICER.plan(Product(1, 16, 16, 16)).compute_cycles <= ceil(16 * 256 / 64) + 62.5
