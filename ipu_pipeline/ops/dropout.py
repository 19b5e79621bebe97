"""Dropout that stores no mask: the mask is a function of a key, and computed where it is needed.

An element is kept when the random word of (seed, stream, offset + its logical index) is below
``keep probability x 2^32``. Words are those of Philox4x32-10, so the mask does not depend on
strides, threads, or how a tensor is cut, and the C++ kernel and plain torch give the same bits.

Source:
    Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ipu_pipeline.ops import extension

FLOATS = frozenset({torch.float32, torch.float64, torch.bfloat16, torch.float16})

# Elements come in groups that share blocks of four words, see kernels/torch/simd.
_BLOCKS = 16
_GROUP = 4 * _BLOCKS
# Plain torch works on pieces: their 64-bit temporaries are ten times their size. Below 2^15
# elements torch uses one thread, so its two hundred small operations do not wait for others.
_PIECE = 480 * _GROUP
_LOW = 0xFFFFFFFF
_ROUNDS = 10
_FACTORS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)


class _Draw(NamedTuple):
    """How many of the 2^32 words are kept, and the key of the words."""

    threshold: int
    seed: int
    stream: int
    offset: int


def dropout_counter(x: Tensor, p: float, seed: int, stream: int, offset: int = 0) -> Tensor:
    """Drop elements of ``x`` with probability ``p`` and scale the others by ``1 / (1 - p)``.

    The backward pass keeps nothing: it draws the same mask again.

    Args:
        x: Floating-point tensor of any shape and strides, which the result has too.
        p: Probability to drop an element, to the nearest multiple of 2^-32.
        seed: Key of the words, 0 to 2^63 - 1; so are the next two.
        stream: Which sequence of words; one for each mask of a key.
        offset: Index of the first element of ``x`` in the sequence, for a part of a tensor.

    Raises:
        ValueError: An argument is out of its range.
        TypeError: ``x`` is not floating-point.
    """
    if x.dtype not in FLOATS:
        raise TypeError(f"dropout of {x.dtype} has no meaning; use a floating-point tensor")
    if not 0 <= p <= 1:
        raise ValueError(f"p is {p}; use a probability from 0 to 1")
    draw = _draw(1 - p, seed, stream, offset)
    return _DropoutCounter.apply(x, 1 / (1 - p) if p < 1 else 0.0, draw)


def bernoulli_counter_(
    out: Tensor, keep_probability: float, seed: int, stream: int, offset: int = 0
) -> Tensor:
    """Fill ``out`` with ones where :func:`dropout_counter` keeps an element, else zeros.

    ``out`` has any dtype, shape and strides, and is returned.

    Raises:
        ValueError: An argument is out of its range.
    """
    if not 0 <= keep_probability <= 1:
        raise ValueError(f"keep_probability is {keep_probability}; use one from 0 to 1")
    draw = _draw(keep_probability, seed, stream, offset)
    with torch.no_grad():
        if _kernels(out):
            torch.ops.ipu_pipeline.bernoulli_counter_(out, *draw)
        else:
            out.copy_(_kept(out, draw))
    return out


def _draw(keep_probability: float, seed: int, stream: int, offset: int) -> _Draw:
    for name, value in (("seed", seed), ("stream", stream), ("offset", offset)):
        if not 0 <= value < 2**63:
            raise ValueError(f"{name} is {value}; use a number from 0 to 2^63 - 1")
    return _Draw(kept_words(keep_probability), seed, stream, offset)


def kept_words(keep_probability: float) -> int:
    """Return how many of the 2^32 words keep an element."""
    return round(keep_probability * 2**32)


class _DropoutCounter(torch.autograd.Function):
    """Dropout is linear: its gradient is the dropout of the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float, draw: _Draw) -> Tensor:
        ctx.scale, ctx.draw = scale, draw
        if _kernels(x):
            return torch.ops.ipu_pipeline.dropout_counter(x, scale, *draw)
        # In at least float32, rounded once, as the kernel does.
        y = (x.to(torch.promote_types(x.dtype, torch.float32)) * scale).to(x.dtype)
        return y.masked_fill_(~_kept(x, draw), 0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _DropoutCounter.apply(grad, ctx.scale, ctx.draw), None, None


def _kept(x: Tensor, draw: _Draw) -> Tensor:
    """Return the mask for ``x``, contiguous."""
    kept = torch.empty(x.numel(), dtype=torch.bool, device=x.device)
    for piece in kept.split(_PIECE):
        first = draw.offset + piece.storage_offset()
        words = random_words(draw.seed, draw.stream, first, piece.numel(), x.device)
        piece.copy_(words < draw.threshold)
    return kept.view(x.shape)


def random_words(
    seed: int, stream: int, first: int, count: int, device: torch.device | str = "cpu"
) -> Tensor:
    """Return the words of ``count`` elements from ``first`` on, as int64 from 0 to 2^32 - 1."""
    group, inside = divmod(first, _GROUP)
    num_groups = -(-(inside + count) // _GROUP)
    blocks = torch.arange(num_groups * _BLOCKS, device=device) + group * _BLOCKS
    words = philox_4x32(
        (blocks & _LOW, blocks >> 32, stream & _LOW, stream >> 32), (seed & _LOW, seed >> 32)
    )
    by_group = torch.stack([word.view(num_groups, _BLOCKS) for word in words], dim=1)
    return by_group.view(-1)[inside : inside + count]


def philox_4x32(
    counter: tuple[Tensor, Tensor, Any, Any], key: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the four words of Philox4x32-10 for each counter.

    A counter is four words, each an int64 tensor or a number from 0 to 2^32 - 1; a key is two.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        # Signed products wrap around: their low words are right, the shifted ones need a mask.
        p0, p2 = c0 * _FACTORS[0], c2 * _FACTORS[1]
        c0, c1 = ((p2 >> 32) & _LOW) ^ c1 ^ k0, p2 & _LOW
        c2, c3 = ((p0 >> 32) & _LOW) ^ c3 ^ k1, p0 & _LOW
        k0, k1 = (k0 + _KEY_STEPS[0]) & _LOW, (k1 + _KEY_STEPS[1]) & _LOW
    return c0, c1, c2, c3


_kernels = extension.kernels(
    dropout_counter=lambda x, *_: torch.empty_like(x),
    bernoulli_counter_=lambda *_: None,  # it changes its argument
)
