"""Stochastic rounding to bfloat16 and float16, with random numbers that only a key decides.

A value between two neighbours becomes the upper one with the probability that makes the mean
right; one that needs no rounding stays. The C++ kernel ``kernels/torch/simd/adamw.cpp`` draws
the same numbers and rounds the same way.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF
# Temporaries of the hash are eight times as large as the result, so it is made in pieces.
_PIECE = 1 << 20
_HALF_SMALLEST = 2.0**-14
_HALF_REBIAS = 112 << 10


def random_bits(key: int, first: int, count: int) -> Tensor:
    """Return 32 random bits for each of the elements ``first`` to ``first + count - 1``.

    Two rounds of an integer hash over the index, each with half of the key.

    Args:
        key: At least 0, below 2**63.
        first: Index of the first element.
        count: Number of elements.

    Returns:
        int64 of shape ``(count,)``, each in [0, 2**32).

    Source:
        C. Wellons, hash-prospector ("lowbias32" and its successor, public domain).
    """
    index = torch.arange(first, first + count)
    high_key = (key >> 32) + (index >> 32) * 0x9E3779B9
    x = (index + (key & _WORD)) & _WORD
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _WORD
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _WORD
    x = ((x ^ (x >> 16)) + high_key) & _WORD
    x = ((x ^ (x >> 16)) * 0x21F0AAAD) & _WORD
    x = ((x ^ (x >> 15)) * 0xD35A2D97) & _WORD
    return x ^ (x >> 15)


def stochastic_round(x: Tensor, dtype: torch.dtype, key: int) -> Tensor:
    """Round float32 to ``dtype`` at random, so that the mean of many roundings is the value.

    Beyond the largest number of ``dtype``, and for infinities and NaN, this is rounding to
    nearest: no finite value becomes infinite by chance.

    Args:
        x: float32, any shape.
        dtype: ``torch.bfloat16`` or ``torch.float16``.
        key: Decides, with an element's index, that element's random number; below 2**63.

    Returns:
        Of ``dtype`` and the shape of ``x``.

    Raises:
        ValueError: ``x`` is not float32, or ``dtype`` is another one.
    """
    rounding = {torch.bfloat16: _to_bfloat16, torch.float16: _to_float16}.get(dtype)
    if rounding is None or x.dtype != torch.float32:
        raise ValueError(
            f"stochastic_round goes from float32 to bfloat16 or float16, got {x.dtype} to {dtype}; "
            "use x.to(dtype)"
        )
    rounded = torch.empty(x.shape, dtype=dtype, device=x.device)
    target = rounded.view(-1)
    for first, piece in _pieces(x.reshape(-1)):
        noise = random_bits(key, first, piece.numel()).to(x.device)
        chosen = rounding(piece, noise)
        inside = piece.abs() < torch.finfo(dtype).max  # not for NaN
        target[first : first + piece.numel()] = torch.where(inside, chosen, piece.to(dtype))
    return rounded


def _pieces(flat: Tensor) -> Iterator[tuple[int, Tensor]]:
    for first in range(0, flat.numel(), _PIECE):
        yield first, flat[first : first + _PIECE]


def _to_bfloat16(x: Tensor, noise: Tensor) -> Tensor:
    """Add noise below the kept bits, and cut."""
    bits = x.view(torch.int32).to(torch.int64) & _WORD
    return ((bits + (noise >> 16)) >> 16).to(torch.int16).view(torch.bfloat16)


def _to_float16(x: Tensor, noise: Tensor) -> Tensor:
    """Do so for normal numbers; count the subnormal ones in their spacing, 2**-24."""
    bits = x.abs().view(torch.int32).to(torch.int64)
    normal = ((bits + (noise >> 19)) >> 13) - _HALF_REBIAS
    small = x.abs() < _HALF_SMALLEST
    count = torch.where(small, x.abs(), 0.0) * 2.0**24
    # An odd number of 2**-24ths, so that chances far below one half round to none.
    chance = ((noise >> 9) * 2 + 1).to(torch.float32) * 2.0**-24
    subnormal = count.to(torch.int64) + (chance < count - count.floor())
    magnitude = torch.where(small, subnormal, normal).to(torch.int16).view(torch.float16)
    return torch.copysign(magnitude, x)
