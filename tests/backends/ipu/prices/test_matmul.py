from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ipu_pipeline.backends.ipu.prices import chip_named
from ipu_pipeline.backends.ipu.prices.chip import Calibration
from ipu_pipeline.backends.ipu.prices.matmul import Product, access_waste, plan_matmul

CHIP = chip_named("ipu-gc200")
SIZES = st.integers(1, 3000)
PRODUCTS = st.builds(Product, st.integers(1, 200), SIZES, SIZES, SIZES)
FREE = Calibration(
    amp_block_cycles=10.0, launch_cycles=0.0, exchange_share=1.0, vector_bytes_per_cycle=1.0
)
ONE_TILE = replace(CHIP, tiles=1, calibration=FREE)


def _cycles(product, chip=CHIP, precision="16.16", proportion=0.6):
    return plan_matmul(product, chip, precision, proportion).cycles


def test_one_tile_by_hand() -> None:
    # [64,32] @ [32,16]: 2 x 1 blocks of 16x16; each streams 64 rows of 256 multiply-adds at 64 per
    # cycle (256 cycles) and costs 10 to load. Received: 64*32*2 + 32*16*2 = 5120 bytes at 4 per
    # cycle. Holding the other operand: 2 x 4 blocks streaming 16 rows: the same arithmetic,
    # 8 loads.
    plan = plan_matmul(Product(1, 64, 32, 16), ONE_TILE, "16.16", 0.6)
    assert plan.compute_cycles == 2 * (64 * 256 / 64 + 10)
    assert plan.exchange_cycles == 5120 / 4
    assert plan.cycles == plan.compute_cycles + plan.exchange_cycles
    assert plan.temporary_bytes == 5120 + 64 * 16 * 2
    assert plan.slices == 1


def test_the_inner_size_is_padded_to_blocks() -> None:
    def compute(k: int) -> float:
        product = Product(1, 64, k, 64)
        return plan_matmul(product, ONE_TILE, "16.16", 0.6).compute_cycles

    assert compute(20) == compute(32) == 2 * compute(16)


@pytest.mark.parametrize(("precision", "ratio"), [("16.32", 2.0), ("32.32", 4.0)])
def test_precision_sets_the_multiply_rate(precision: str, ratio: float) -> None:
    one_tile = replace(ONE_TILE, calibration=replace(FREE, amp_block_cycles=0.0))
    plan = plan_matmul(Product(1, 64, 64, 64), one_tile, precision, 0.6)
    half = plan_matmul(Product(1, 64, 64, 64), one_tile, "16.16", 0.6)
    assert plan.compute_cycles == ratio * half.compute_cycles


def test_a_small_memory_proportion_cuts_into_slices() -> None:
    product = Product(1, 1024, 1024, 4096)
    wide = plan_matmul(product, CHIP, "16.16", 0.6)
    narrow = plan_matmul(product, CHIP, "16.16", 0.02)
    assert wide.slices == 1
    assert narrow.temporary_bytes <= 0.02 * CHIP.tile_memory_bytes < wide.temporary_bytes
    assert narrow.cycles > wide.cycles


@pytest.mark.parametrize(
    ("elements", "size", "waste"), [(128, 2, 1), (30522, 2, 2), (197, 2, 4), (197, 4, 2), (2, 4, 1)]
)
def test_rows_off_the_access_grid_waste_accesses(elements: int, size: int, waste: float) -> None:
    assert access_waste(elements, size) == waste


@given(PRODUCTS, st.sampled_from([0.05, 0.2, 0.6]))
def test_never_faster_than_the_multipliers(product: Product, proportion: float) -> None:
    peak = CHIP.tiles * CHIP.macs_per_cycle_16
    assert _cycles(product, proportion=proportion) >= product.macs / peak


@given(PRODUCTS)
def test_more_memory_is_never_slower(product: Product) -> None:
    assert _cycles(product, proportion=0.6) <= _cycles(product, proportion=0.1) * (1 + 1e-12)


@given(st.builds(Product, st.integers(1, 200), *[st.integers(1, 700).map(lambda n: 4 * n)] * 3))
def test_more_precision_is_never_faster(product: Product) -> None:
    half, mixed = _cycles(product), _cycles(product, precision="16.32")
    assert half <= mixed * (1 + 1e-12)
    assert mixed <= _cycles(product, precision="32.32") * (1 + 1e-12)


@given(PRODUCTS, st.integers(1, 7))
def test_more_tiles_are_never_slower(product: Product, divisor: int) -> None:
    fewer = replace(CHIP, tiles=CHIP.tiles // divisor)
    assert _cycles(product) <= _cycles(product, chip=fewer) * (1 + 1e-12)
