"""Stochastic rounding: the plain-torch form, and the kernel's inside adamw_step."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from ipu_pipeline.ops import extension
from ipu_pipeline.ops.adamw import AdamW
from ipu_pipeline.ops.adamw_step import AdamWSettings, AdamWTensors, adamw_step
from ipu_pipeline.ops.rounding import random_bits, stochastic_round

NEEDS_LIBRARY = pytest.mark.skipif(
    not extension.state().usable, reason="the kernels are not built or switched off"
)
LOW = [torch.bfloat16, torch.float16]
PATHS = [pytest.param("library", marks=NEEDS_LIBRARY), "plain"]
# 1 in 10^6 per comparison by chance, were the numbers not fixed by the keys.
Z_LIMIT = 5.0


def rounded(path: str, x: Tensor, dtype: torch.dtype, key: int) -> Tensor:
    """Round by the plain form; or by a step that turns the weight 0 into exactly ``x``."""
    if path == "plain":
        return stochastic_round(x, dtype, key)
    weight = torch.zeros(x.shape, dtype=dtype)
    zeros = torch.zeros(x.shape)
    lists = [weight], [zeros], [-x], [zeros.clone()], [torch.zeros(())]
    # m = -x / 2, divided by 1 - beta1 = 1/2; the denominator is eps = 1.
    settings = AdamWSettings(lr=1.0, beta1=0.5, beta2=0.5, weight_decay=0.0, eps=1.0)
    adamw_step(AdamWTensors(*lists, keys=[key]), settings)
    return weight


def neighbours(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The numbers of ``dtype`` next to |x|, towards and away from zero, as float64."""
    near = x.abs().to(dtype)
    bits = near.view(torch.int16)
    below = torch.where(near.double() > x.abs().double(), bits - 1, bits)
    return below.view(dtype).double(), (below + 1).view(dtype).double()


def some_values(seed: int = 0) -> Tensor:
    """Values of all magnitudes that float16 has, from its subnormal numbers on, both signs."""
    torch.manual_seed(seed)
    return torch.randn(200_000) * torch.exp2(torch.randint(-27, 14, (200_000,)).float())


@NEEDS_LIBRARY
@pytest.mark.parametrize("dtype", LOW)
def test_kernel_and_plain_torch_round_to_the_same_bits(dtype) -> None:
    torch.manual_seed(3)
    any_bits = torch.randint(-(2**31), 2**31, (200_000,)).to(torch.int32).view(torch.float32)
    # Larger and infinite ones do not pass through the step that rounds them.
    any_bits = any_bits[any_bits.abs() < 1e38]
    x = torch.cat([some_values(), any_bits])
    for key in (0, 1, 2**62 + 12345, 2**63 - 1):
        ours, plain = rounded("library", x, dtype, key), rounded("plain", x, dtype, key)
        assert torch.equal(ours.view(torch.int16) & 0x7FFF, plain.view(torch.int16) & 0x7FFF)
        assert torch.equal(ours, plain)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", LOW)
def test_the_result_is_a_neighbour_and_the_mean_is_right(path, dtype) -> None:
    x = some_values()
    if dtype == torch.bfloat16:
        x = x[x.abs() > 1e-9]
    low, high = neighbours(x, dtype)
    chance = (x.abs().double() - low) / (high - low)
    result = rounded(path, x, dtype, key=11).double()
    assert torch.all((result.abs() == low) | (result.abs() == high))
    assert torch.all((result == 0) | (result.sign() == x.sign()))
    # Error over spacing has mean 0 and variance p (1 - p), whatever the value.
    error = (result.abs() - x.abs().double()) / (high - low)
    deviation = (chance * (1 - chance)).sum().sqrt()
    assert abs(float(error.sum() / deviation)) < Z_LIMIT


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("dtype", "low", "spacing"),
    [
        (torch.bfloat16, 1.0, 2.0**-7),
        (torch.bfloat16, -3.0, -(2.0**-6)),
        (torch.float16, 1.0, 2.0**-10),
        (torch.float16, -1024.0, -1.0),
        (torch.float16, 2.0**-15, 2.0**-24),  # subnormal
        (torch.float16, 0.0, 2.0**-24),
    ],
)
@pytest.mark.parametrize("chance", [0.001, 0.25, 0.5, 0.9])
def test_the_chance_is_the_distance(path, dtype, low, spacing, chance) -> None:
    count = 400_000
    x = torch.full((count,), low + chance * spacing)
    exact_chance = (float(x[0]) - low) / spacing
    if abs(low) >= 1:  # 16 or 13 bits below the kept ones; float32 holds no more
        assert abs(exact_chance - chance) < 2.0**-13
    ups = int((rounded(path, x, dtype, key=5).double() == low + spacing).sum())
    deviation = math.sqrt(count * exact_chance * (1 - exact_chance))
    assert abs(ups - count * exact_chance) / deviation < Z_LIMIT


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", LOW)
def test_exact_values_stay_exact(path, dtype) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    every = every[every.isfinite() & (every.abs() < 1e38)]
    assert torch.equal(rounded(path, every.float(), dtype, key=9), every)


@pytest.mark.parametrize("path", PATHS)
def test_overflow_is_that_of_rounding_to_nearest(path) -> None:
    x = torch.tensor([65504.0, 65519.0, -65519.0]).repeat(1000)
    expected = torch.tensor([65504.0, 65504.0, -65504.0], dtype=torch.float16).repeat(1000)
    assert torch.equal(rounded(path, x, torch.float16, key=1), expected)
    x = torch.tensor([65520.0, -1e30])
    assert torch.equal(rounded(path, x, torch.float16, key=1).isinf(), torch.tensor([True, True]))
    assert rounded(path, torch.tensor([math.nan]), torch.float16, key=1).isnan().all()


def test_overflow_of_bfloat16_and_what_is_no_number() -> None:
    largest = torch.finfo(torch.bfloat16).max
    x = torch.tensor([largest * (1 + 2.0**-10)]).repeat(1000)
    assert torch.all(stochastic_round(x, torch.bfloat16, 1) == largest)
    odd = torch.tensor([math.inf, -math.inf, 3.402e38])
    assert torch.equal(stochastic_round(odd, torch.bfloat16, 1), odd.to(torch.bfloat16))
    assert stochastic_round(torch.tensor([math.nan]), torch.bfloat16, 1).isnan().all()


def test_other_types_are_refused() -> None:
    with pytest.raises(ValueError, match=r"got torch.float64 to torch.bfloat16; use x.to"):
        stochastic_round(torch.zeros(2, dtype=torch.float64), torch.bfloat16, 0)
    with pytest.raises(ValueError, match=r"got torch.float32 to torch.int8"):
        stochastic_round(torch.zeros(2), torch.int8, 0)


def test_shape_strides_and_pieces(monkeypatch) -> None:
    x = torch.randn(30, 20, generator=torch.Generator().manual_seed(0))
    whole = stochastic_round(x, torch.bfloat16, 3)
    assert whole.shape == x.shape
    assert torch.equal(stochastic_round(x.t().contiguous().t(), torch.bfloat16, 3), whole)
    monkeypatch.setattr("ipu_pipeline.ops.rounding._PIECE", 7)
    assert torch.equal(stochastic_round(x, torch.bfloat16, 3), whole)
    assert stochastic_round(torch.zeros(0, 4), torch.float16, 3).shape == (0, 4)


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


# ------------------------------------------------------------------ in the optimizer


def trained(*, seed: int = 0, order: tuple[int, ...] = (0, 1), steps: int = 1) -> list[Tensor]:
    torch.manual_seed(0)
    held = [nn.Parameter(torch.randn(3000).bfloat16()) for _ in range(2)]
    optimizer = AdamW([held[i] for i in order], lr=1e-4, stochastic_rounding=True, seed=seed)
    for _ in range(steps):
        for p in held:
            p.grad = torch.ones_like(p)
        optimizer.step()
    return [p.detach() for p in held]


@pytest.mark.parametrize("path", PATHS)
def test_seed_and_position_decide(path, monkeypatch) -> None:
    monkeypatch.setattr(extension, "available", lambda: path == "library")
    first = trained()
    assert all(torch.equal(a, b) for a, b in zip(first, trained(), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, trained(seed=1), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, trained(order=(1, 0)), strict=True))


@NEEDS_LIBRARY
def test_kernel_and_plain_torch_train_alike(monkeypatch) -> None:
    results = []
    for usable in (True, False):
        monkeypatch.setattr(extension, "available", lambda usable=usable: usable)
        results.append(torch.cat(trained(steps=5)))
    # A float32 ulp of the update decides differently once in some thousand roundings.
    assert (results[0] == results[1]).float().mean() > 0.995
    torch.testing.assert_close(*results, rtol=2**-6, atol=0)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", LOW)
def test_small_updates_add_up_where_rounding_to_nearest_loses_them(
    path, dtype, monkeypatch
) -> None:
    monkeypatch.setattr(extension, "available", lambda: path == "library")
    held = [nn.Parameter(torch.ones(20_000, dtype=dtype)) for _ in range(2)]
    groups = [{"params": held[:1], "stochastic_rounding": True}, {"params": held[1:]}]
    optimizer = AdamW(groups, lr=1e-4, weight_decay=0.0)
    for _ in range(50):
        for p in held:
            p.grad = torch.ones_like(p)
        optimizer.step()
    # 50 steps of 1e-4 each, below half of the spacing beneath 1.0.
    random, nearest = (float(p.detach().double().mean()) for p in held)
    assert nearest == 1.0
    assert random == pytest.approx(1 - 50 * 1e-4, abs=1e-4)
