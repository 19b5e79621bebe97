"""Attention with dropout that keeps no L x S matrix for the backward pass.

Torch's own path for dropout on a CPU keeps three: the softmax, the mask, and their product. Here
the backward pass computes them again from queries and keys; the mask comes from
:mod:`ipu_pipeline.ops.dropout`. The kernel works on one head per thread, in tiles of queries;
plain torch on some heads at a time. Both drop the same weights, and differ by rounding.

Axes: B batch (all leading axes but one), H heads, L queries, S keys, E head size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ipu_pipeline.ops import extension
from ipu_pipeline.ops.dropout import FLOATS, dropout_counter, kept_words

# Elements of L x S matrices that plain torch computes at once: 4 MiB in float32. It decides which
# heads share a batched matmul, so it must not depend on the number of threads.
_ELEMENTS = 1 << 20


class _Options(NamedTuple):
    scale: float
    p: float
    mask_key: tuple[int, int]


def attention_counter(  # noqa: PLR0913 (torch's arguments, and one more)
    mask_key: tuple[int, int],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,  # noqa: FBT001, FBT002
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor | None:
    """Compute ``scaled_dot_product_attention`` with a mask that is not stored.

    Args:
        mask_key: Seed and stream of :func:`ipu_pipeline.ops.dropout.dropout_counter`.
        query: Queries, ``(..., H, L, E)``.
        key: Keys, ``(..., H, S, E)``, or fewer heads with ``enable_gqa``.
        value: Values, as the keys.
        attn_mask: True or 0 where a query sees a key; broadcast to ``(..., H, L, S)``.
        dropout_p: Probability to drop a weight.
        is_causal: Query l sees keys 0 to l.
        scale: Factor of the scores, ``1 / sqrt(E)`` by default.
        enable_gqa: Each head of keys serves several consecutive heads of queries.

    Returns:
        The result, of the shape that torch gives; None for what only torch's own path can do or
        refuse: a mask that wants a gradient, leading axes that differ, no heads, other types.
    """
    if enable_gqa and query.dim() > 2 and key.dim() > 2:
        key, value = _each_head(key, query.shape[-3]), _each_head(value, query.shape[-3])
    if not _is_ordinary(query, key, value) or not 0 <= dropout_p <= 1:
        return None
    if attn_mask is not None and (is_causal or not _is_constant(attn_mask, query.dtype)):
        return None
    if is_causal:
        shape = (query.shape[-2], key.shape[-2])
        attn_mask = torch.ones(shape, dtype=torch.bool, device=query.device).tril()
    options = _Options(
        1 / math.sqrt(query.shape[-1]) if scale is None else scale, dropout_p, mask_key
    )
    return _Attention.apply(query, key, value, attn_mask, options)


def _is_ordinary(query: Tensor, key: Tensor, value: Tensor) -> bool:
    same_type = query.dtype == key.dtype == value.dtype and query.dtype in FLOATS
    same_heads = query.dim() > 2 and query.shape[:-2] == key.shape[:-2] == value.shape[:-2]
    fit = query.shape[-1:] == key.shape[-1:] and key.shape[-2:-1] == value.shape[-2:-1]
    return same_type and same_heads and fit and min(query.numel(), key.numel()) > 0


def _is_constant(mask: Tensor, dtype: torch.dtype) -> bool:
    return mask.dtype in (torch.bool, torch.float32, dtype) and not mask.requires_grad


def _each_head(x: Tensor, num_heads: int) -> Tensor:
    if x.shape[-3] == 0 or num_heads % x.shape[-3]:
        return x  # torch says what is wrong with it
    return x.repeat_interleave(num_heads // x.shape[-3], dim=-3)


class _Attention(torch.autograd.Function):
    """Keeps its inputs; computes everything else again."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: _Options
    ) -> Tensor:
        ctx.save_for_backward(query, key, value, mask)
        ctx.options = options
        q, k, v = (_with_one_batch_axis(x) for x in (query, key, value))
        masks = _masks(query, key, mask)
        if _kernels(q):
            out = torch.ops.ipu_pipeline.attention_counter(q, k, v, *masks, *_numbers(options))
        else:
            out = _forward(q, k, v, masks, options)
        return out.view(*query.shape[:-1], value.shape[-1])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, mask = ctx.saved_tensors
        q, k, v, g = (_with_one_batch_axis(x) for x in (query, key, value, grad))
        masks = _masks(query, key, mask)
        if _kernels(q):
            grads = torch.ops.ipu_pipeline.attention_counter_backward(
                g, q, k, v, *masks, *_numbers(ctx.options)
            )
        else:
            grads = _backward(g, q, k, v, masks, ctx.options)
        found = [x.view(like.shape) for x, like in zip(grads, (query, key, value), strict=True)]
        return (*found, None, None)


_Masks = tuple[Tensor | None, Tensor | None]


def _masks(query: Tensor, key: Tensor, mask: Tensor | None) -> _Masks:
    """Return what is hidden or added, ``(B, H, L, S)``, and the queries that see no key."""
    if mask is None:
        return None, None
    hidden = ~mask if mask.dtype == torch.bool else mask == -math.inf
    blind = hidden.all(-1, keepdim=True).expand(*query.shape[:-1], 1)
    shown = hidden if mask.dtype == torch.bool else mask
    shown = shown.expand(*query.shape[:-1], key.shape[-2])
    return _with_one_batch_axis(shown), _with_one_batch_axis(blind)


def _with_one_batch_axis(x: Tensor) -> Tensor:
    return x if x.dim() == 4 else x.reshape(-1, *x.shape[-3:])


def _wide(x: Tensor) -> Tensor:
    """Torch computes attention with dropout in at least float32, too."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _forward(q: Tensor, k: Tensor, v: Tensor, masks: _Masks, options: _Options) -> Tensor:
    out = v.new_empty(*q.shape[:-1], v.shape[-1])
    for at, first in _parts(q, k):
        weights = _dropped(_softmax(q[at], k[at], _at(masks, at), options), first, options)
        out[at] = weights @ _wide(v[at])
    return out


def _backward(
    g: Tensor, q: Tensor, k: Tensor, v: Tensor, masks: _Masks, options: _Options
) -> list[Tensor]:
    grads = [torch.empty_like(x) for x in (q, k, v)]
    for at, first in _parts(q, k):
        out_grad = _wide(g[at])
        softmax = _softmax(q[at], k[at], _at(masks, at), options)
        grads[2][at] = _dropped(softmax, first, options).mT @ out_grad
        weights_grad = _dropped(out_grad @ _wide(v[at]).mT, first, options)
        score_grad = torch._softmax_backward_data(weights_grad, softmax, -1, softmax.dtype)
        score_grad *= options.scale
        grads[0][at] = score_grad @ _wide(k[at])
        grads[1][at] = score_grad.mT @ _wide(q[at])
    return grads


def _softmax(q: Tensor, k: Tensor, masks: _Masks, options: _Options) -> Tensor:
    scores = (_wide(q) * options.scale) @ _wide(k).mT
    mask, blind = masks
    if mask is None or blind is None:
        return torch.softmax(scores, -1)
    if mask.dtype == torch.bool:
        scores.masked_fill_(mask, -math.inf)
    else:
        scores += mask
    return torch.softmax(scores, -1).masked_fill_(blind, 0)


def _dropped(x: Tensor, first: int, options: _Options) -> Tensor:
    return dropout_counter(x, options.p, *options.mask_key, first)


_Place = tuple[slice, slice]


def _at(masks: _Masks, at: _Place) -> _Masks:
    mask, blind = masks
    return (None if mask is None else mask[at]), (None if blind is None else blind[at])


def _parts(q: Tensor, k: Tensor) -> Iterator[tuple[_Place, int]]:
    """Cut (B, H) into whole batches, or heads of one; with the index of their first weight."""
    batch, num_heads, length, _ = q.shape
    matrix = length * k.shape[-2]
    step = max(1, _ELEMENTS // (matrix * num_heads))
    head_step = num_heads if step > 1 else max(1, min(num_heads, _ELEMENTS // matrix))
    for b in range(0, batch, step):
        for h in range(0, num_heads, head_step):
            yield (slice(b, b + step), slice(h, h + head_step)), (b * num_heads + h) * matrix


def _numbers(options: _Options) -> tuple[float, float, int, int, int]:
    """Return what the kernels take after their tensors."""
    kept_scale = 1 / (1 - options.p) if options.p < 1 else 0.0
    return options.scale, kept_scale, kept_words(1 - options.p), *options.mask_key


_kernels = extension.kernels(
    attention_counter=lambda q, _k, v, *_: v.new_empty(*q.shape[:-1], v.shape[-1]),
    attention_counter_backward=lambda _g, *qkv: tuple(map(torch.empty_like, qkv[:3])),
)
