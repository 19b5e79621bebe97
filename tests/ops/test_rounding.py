"""Stochastic rounding: the plain-torch form, and the kernel's inside adamw_step."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ipu_pipeline.ops import extension
from ipu_pipeline.ops.adamw import adamw_step, random_bits, stochastic_round

NEEDS_LIBRARY = pytest.mark.skipif(
    not extension.state().usable, reason="the kernels are not built or switched off"
)
PATHS = [pytest.param("library", marks=NEEDS_LIBRARY), "plain"]
# 1 in 10^6 per comparison by chance, were the numbers not fixed by the keys.
Z_LIMIT = 5.0


def rounded(path: str, x: Tensor, key: int) -> Tensor:
    """Round by the plain form; or by a step that turns the weight 0 into exactly ``x``."""
    if path == "plain":
        return stochastic_round(x, key)
    weight = torch.zeros(x.shape, dtype=torch.bfloat16)
    zeros = torch.zeros(x.shape)
    # m = -x / 2, divided by 1 - beta1 = 1/2; the denominator is eps = 1.
    settings = {"lr": 1.0, "beta1": 0.5, "beta2": 0.5, "weight_decay": 0.0, "eps": 1.0}
    adamw_step(
        [weight], [zeros], [-x], [zeros.clone()], [torch.zeros(())],
        keys=[key], maximize=False, **settings,
    )  # fmt: skip
    return weight


def neighbours(x: Tensor) -> tuple[Tensor, Tensor]:
    """The bfloat16 numbers next to |x|, towards and away from zero, as float64."""
    near = x.abs().bfloat16()
    bits = near.view(torch.int16)
    below = torch.where(near.double() > x.abs().double(), bits - 1, bits)
    return below.view(torch.bfloat16).double(), (below + 1).view(torch.bfloat16).double()


def some_values(seed: int = 0) -> Tensor:
    """Values of many magnitudes, both signs."""
    torch.manual_seed(seed)
    return torch.randn(200_000) * torch.exp2(torch.randint(-27, 14, (200_000,)).float())


@NEEDS_LIBRARY
def test_kernel_and_plain_torch_round_to_the_same_bits() -> None:
    torch.manual_seed(3)
    any_bits = torch.randint(-(2**31), 2**31, (200_000,)).to(torch.int32).view(torch.float32)
    # Larger and infinite ones do not pass through the step that rounds them.
    any_bits = any_bits[any_bits.abs() < 1e38]
    x = torch.cat([some_values(), any_bits])
    for key in (0, 1, 2**62 + 12345, 2**63 - 1):
        ours, plain = rounded("library", x, key), rounded("plain", x, key)
        assert torch.equal(ours.view(torch.int16) & 0x7FFF, plain.view(torch.int16) & 0x7FFF)
        assert torch.equal(ours, plain)


@pytest.mark.parametrize("path", PATHS)
def test_the_result_is_a_neighbour_and_the_mean_is_right(path) -> None:
    x = some_values()
    x = x[x.abs() > 1e-9]
    low, high = neighbours(x)
    chance = (x.abs().double() - low) / (high - low)
    result = rounded(path, x, key=11).double()
    assert torch.all((result.abs() == low) | (result.abs() == high))
    assert torch.all((result == 0) | (result.sign() == x.sign()))
    # Error over spacing has mean 0 and variance p (1 - p), whatever the value.
    error = (result.abs() - x.abs().double()) / (high - low)
    deviation = (chance * (1 - chance)).sum().sqrt()
    assert abs(float(error.sum() / deviation)) < Z_LIMIT


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("low", "spacing"), [(1.0, 2.0**-7), (-3.0, -(2.0**-6))])
@pytest.mark.parametrize("chance", [0.001, 0.25, 0.5, 0.9])
def test_the_chance_is_the_distance(path, low, spacing, chance) -> None:
    count = 400_000
    x = torch.full((count,), low + chance * spacing)
    exact_chance = (float(x[0]) - low) / spacing
    assert abs(exact_chance - chance) < 2.0**-13  # 16 bits below the kept ones
    ups = int((rounded(path, x, key=5).double() == low + spacing).sum())
    deviation = math.sqrt(count * exact_chance * (1 - exact_chance))
    assert abs(ups - count * exact_chance) / deviation < Z_LIMIT


@pytest.mark.parametrize("path", PATHS)
def test_exact_values_stay_exact(path) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    every = every[every.isfinite() & (every.abs() < 1e38)]
    assert torch.equal(rounded(path, every.float(), key=9), every)


@pytest.mark.parametrize("path", PATHS)
def test_no_number_stays_none(path) -> None:
    assert rounded(path, torch.tensor([math.nan]), key=1).isnan().all()


def test_overflow_and_what_is_no_number() -> None:
    largest = torch.finfo(torch.bfloat16).max
    x = torch.tensor([largest * (1 + 2.0**-10)]).repeat(1000)
    assert torch.all(stochastic_round(x, 1) == largest)
    odd = torch.tensor([math.inf, -math.inf, 3.402e38])
    assert torch.equal(stochastic_round(odd, 1), odd.bfloat16())
    assert stochastic_round(torch.tensor([math.nan]), 1).isnan().all()


def test_shape_strides_and_pieces(monkeypatch) -> None:
    x = torch.randn(30, 20, generator=torch.Generator().manual_seed(0))
    whole = stochastic_round(x, 3)
    assert whole.shape == x.shape
    assert torch.equal(stochastic_round(x.t().contiguous().t(), 3), whole)
    monkeypatch.setattr("ipu_pipeline.ops.adamw._PIECE", 7)
    assert torch.equal(stochastic_round(x, 3), whole)
    assert stochastic_round(torch.zeros(0, 4), 3).shape == (0, 4)


# ------------------------------------------------------------------ the random numbers

COUNT = 1 << 18


@pytest.mark.parametrize("key", [0, 1, 2**32, 0x0123456789ABCDEF])
def test_bits_are_uniform_and_independent_of_their_neighbours(key) -> None:
    bits = random_bits(key, 0, COUNT)
    assert int(bits.min()) >= 0
    assert int(bits.max()) < 2**32
    for shift in (0, 8, 16, 24):  # chi-square of each byte
        counts = torch.bincount((bits >> shift) & 255, minlength=256).double()
        chi2 = float(((counts - COUNT / 256) ** 2 / (COUNT / 256)).sum())
        assert abs(chi2 - 255) / math.sqrt(2 * 255) < Z_LIMIT
    centred = bits.double() / 2**32 - 0.5
    for lag in (1, 2, 64, 768, 4096):
        correlation = float((centred[lag:] * centred[:-lag]).mean()) * 12
        assert abs(correlation) * math.sqrt(COUNT - lag) < Z_LIMIT


@pytest.mark.parametrize("bit", range(0, 63, 3))
def test_every_bit_of_the_key_changes_half_of_the_bits(bit) -> None:
    key = 0x3A5C_0F17_9B42_D6E1
    changed = random_bits(key, 0, 1 << 14) ^ random_bits(key ^ (1 << bit), 0, 1 << 14)
    for position in range(32):
        share = float(((changed >> position) & 1).double().mean())
        assert abs(share - 0.5) * 2 * math.sqrt(1 << 14) < 6


def test_indices_beyond_32_bits_have_numbers_of_their_own() -> None:
    low, high = random_bits(5, 0, 1000), random_bits(5, 2**32, 1000)
    assert int((low == high).sum()) < 3
    across = random_bits(5, 2**32 - 500, 1000)
    assert torch.equal(across[500:], high[:500])
