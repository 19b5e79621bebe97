"""A device that was measured in detail, by hand: 1e9 FLOP/s and 1e8 bytes/s at its peaks."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ipu_pipeline.ir.graph import OpRecord
from ipu_pipeline.ir.machine import Device, KernelRates, on_curve
from ipu_pipeline.planner.options.roofline import Roofline, moved_bytes, product_sides

PLAIN = Device("d", 1000, {"float32": 1e9, "bfloat16": 4e9}, 1e8)
DETAILED = replace(
    PLAIN,
    product_curve=((1e3, 1e8), (1e5, 1e9)),
    bytes_curve=((1e3, 4e8), (1e5, 1e8), (1e7, 5e7)),
    op_rates={"gelu": 1e7, "bmm": 5e8},
)


def vector(name: str, moved: int, *shapes: tuple[int, ...]) -> OpRecord:
    return OpRecord(f"aten.{name}", "vector", "float32", shapes, 0, moved)


def product(flops: int, name: str = "mm", dtype: str = "float32") -> OpRecord:
    return OpRecord(f"aten.{name}", "matmul", dtype, (), flops, 0)


def seconds(op: OpRecord, device: Device = DETAILED) -> float:
    return Roofline(device).seconds([op])


def test_a_small_product_does_not_reach_the_peak() -> None:
    assert seconds(product(1000)) == pytest.approx(1000 / 1e8)
    assert seconds(product(10_000)) == pytest.approx(10_000 / 5.5e8)  # half way, by logarithm
    assert seconds(product(10**8)) == pytest.approx(0.1)
    assert seconds(product(1000), PLAIN) == pytest.approx(1e-6)


def test_another_dtype_keeps_the_shape_of_the_curve() -> None:
    assert seconds(product(1000, dtype="bfloat16")) == pytest.approx(1000 / 4e8)


def test_a_product_with_a_rate_of_its_own() -> None:
    assert seconds(product(10**8, "bmm")) == pytest.approx(0.2)


def test_bandwidth_depends_on_size_and_on_new_memory() -> None:
    assert seconds(vector("add", 1000)) == pytest.approx(1000 / 4e8)
    assert seconds(vector("add", 10**7)) == pytest.approx(10**7 / 5e7)
    assert seconds(vector("add_", 10**7)) == pytest.approx(10**7 / 1e8)  # no new pages


def test_what_computes_takes_its_rate_and_what_a_cache_misses() -> None:
    assert seconds(vector("gelu", 1000, (10, 10))) == pytest.approx(100 / 1e7)
    large = vector("gelu", 10**7, (10, 10))
    assert seconds(large) == pytest.approx(10**7 / 4e8 + 10**7 / 5e7 - 10**7 / 4e8)


def test_every_operation_has_its_overhead_and_what_is_free_none() -> None:
    device = replace(DETAILED, op_overhead_s=0.5)
    assert seconds(vector("add", 1000), device) == pytest.approx(0.5, abs=1e-4)
    assert seconds(vector("_unsafe_view", 1000, (250,)), device) == 0.0
    assert seconds(vector("empty_like", 1000, (125,)), device) == 0.0


def test_a_lookup_reads_rows_not_the_table() -> None:
    shapes = ((1000, 4), (3,))
    lookup = OpRecord("aten.embedding", "gather", "float32", shapes, 0, 16_000 + 24 + 48)
    assert moved_bytes(lookup) == 2 * 48 + 24
    assert moved_bytes(vector("add", 77, (3,), (4,))) == 77


def test_accumulating_reads_two_gradients_and_writes_one() -> None:
    assert Roofline(PLAIN).accumulation_s(1000) == pytest.approx(3e-5)


def test_curve_is_flat_beyond_its_ends() -> None:
    curve = ((10.0, 1.0), (1000.0, 3.0))
    assert [on_curve(curve, size) for size in (1, 10, 100, 1000, 10**6)] == [1, 1, 2, 3, 3]
    assert on_curve(((5.0, 7.0),), 1) == 7


RATES = KernelRates("toy", {"bfloat16": 0.5}, 10.0, (0.4, 0.2), 0.8, 1.0)
GPU = replace(PLAIN, kernels=RATES)


def test_a_gpu_reaches_less_of_its_peak_with_thin_products() -> None:
    op = OpRecord("aten.mm", "matmul", "float32", ((10, 30), (30, 90)), 10**6, 0)
    share = 0.5 * (10 / 20) * (30 / 40) * (90 / 100)
    assert seconds(op, GPU) == pytest.approx(10**6 / (1e9 * share))
    assert seconds(replace(op, shapes=((10, 0), (0, 90))), GPU) == 0  # as an edited plan may say
    convolution = OpRecord("aten.convolution", "matmul", "float32", ((4, 3, 8, 8),), 10**6, 0)
    assert seconds(convolution, GPU) == pytest.approx(10**6 / (1e9 * 0.5))
    assert seconds(vector("add", 800), GPU) == pytest.approx(800 / 0.8e8)
    assert Roofline(GPU).accumulation_s(1000) == pytest.approx(3000 / 0.8e8)


def test_sides_of_one_expert_in_a_grouped_product() -> None:
    def sides(*shapes: tuple[int, ...], name: str = "_grouped_mm") -> tuple[float, ...]:
        return product_sides(OpRecord(f"aten.{name}", "matmul", "float32", shapes, 1, 0))

    assert sides((4, 64, 32), (100, 64)) == (25, 64, 32)
    assert sides((100, 64), (100, 32)) == (100, 64, 32)
    assert sides((7,), (10, 30), (30, 90), name="addmm") == (10, 30, 90)
    assert sides((10, 30), (31, 90), name="einsum") == ()


def test_attention_computes_no_masked_half() -> None:
    heads = ((1, 2, 8, 4),) * 3
    name = "aten.scaled_dot_product_attention"
    whole = OpRecord(name, "matmul", "float32", heads, 1000, 0)
    causal = replace(whole, shapes=(*heads, (8, 8)))
    assert seconds(whole, GPU) == pytest.approx(1000 / 0.4e9)
    assert seconds(causal, GPU) == pytest.approx(500 / 0.4e9)
    per_sample = replace(whole, shapes=(*heads, (1, 1, 8, 8)))
    assert seconds(per_sample, GPU) == pytest.approx(1000 / 0.4e9)
    backward = replace(whole, name=f"{name}_backward", shapes=(heads[0], *heads, (8, 8)))
    assert seconds(backward, GPU) == pytest.approx(500 / 0.2e9)


def test_a_loss_reads_one_logit_of_each_token_on_a_gpu() -> None:
    assert seconds(vector("nll_loss_forward", 1000), GPU) == 0.0
    assert seconds(vector("nll_loss_backward", 1000), GPU) == pytest.approx(500 / 0.8e8)
