"""Linear layers whose matrix products run where they are fast.

In float32, large products go to oneDNN on processors where MKL does not use the widest vectors.
Under bfloat16 autocast, a weight is cast once and not for every microbatch, and x86 processors
without AVX-512 compute in float32 and round once. In both, a backward pass inside
:func:`adding_to_grad` adds the weight's gradient to ``.grad`` within the product (float32) or in
one pass (bfloat16), where autograd would write it, read it and add it.

Only the C++ kernels do this; without them every layer is torch's. Decision 0019 has the numbers.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from ipu_pipeline.errors import PipelineError
from ipu_pipeline.ops import extension
from ipu_pipeline.ops.autocast import autocast_dtype

# Which library computes float32 products: "onednn", "mkl", or nothing for what suits the processor.
SWITCH = "IPU_PIPELINE_MATMUL"
# Smaller products gain less than the detour costs (LEAST_MULTIPLICATIONS of product.cpp).
_LEAST_MULTIPLICATIONS = 4 << 20
# A weight's number of in-place writes when it was cast, and the cast.
_casts: WeakIdKeyDictionary = WeakIdKeyDictionary()


def fast_linear(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, *, transposed: bool = False
) -> Tensor | None:
    """Compute ``torch.nn.functional.linear``.

    Args:
        input: Of any leading shape, last dimension K.
        weight: ``(N, K)``.
        bias: ``(N)``, or None.
        transposed: The weight is ``(K, N)``.

    Returns:
        The product; None for what torch computes as fast: small products, other types and
        devices, and everything where the kernels are missing.
    """
    if not _is_large(input, weight, transposed=transposed) or not _is_alike(weight, bias):
        return None
    if not _kernels():
        return None
    operator = torch.ops.ipu_pipeline.linear
    dtype = autocast_dtype(input.device)
    if dtype is None:
        fits = input.dtype is torch.float32 and onednn_products()
        return operator(input, weight, bias, transposed=transposed) if fits else None
    if dtype is not torch.bfloat16 or not (torch.is_grad_enabled() or widens_bfloat16()):
        return None
    if input.dtype not in (torch.float32, torch.bfloat16):
        return None
    # Casts are kept for a step; evaluation has no end at which to give them back.
    narrow = (
        _cast(weight, torch.bfloat16)
        if torch.is_grad_enabled()
        else weight.detach().to(torch.bfloat16)
    )
    return operator(input.to(torch.bfloat16), weight, bias, narrow, transposed)


def fast_addmm(
    input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1
) -> Tensor | None:
    """Compute ``torch.addmm``, which Transformers' ``Conv1D`` calls, as a linear layer.

    ``input`` is the bias ``(N)``, ``mat2`` the weight ``(K, N)``; None as in :func:`fast_linear`.
    """
    if beta != 1 or alpha != 1:
        return None
    return fast_linear(mat1, mat2, input, transposed=True)


def adding_to_grad() -> AbstractContextManager[None]:
    """Within it, backward passes of this thread add weight gradients to ``.grad`` themselves.

    Only for ``torch.autograd.backward`` that accumulates into all parameters: what a parameter
    would receive no longer passes its hooks' place in the graph. Parameters that have hooks, or
    no ``.grad`` yet, are left to autograd.
    """
    return _switched("set_adds_to_grad", wish=True, changes=extension.state().usable)


@contextlib.contextmanager
def adding_to(sums: Mapping[Tensor, Tensor]) -> Iterator[None]:
    """As :func:`adding_to_grad`, but to the dense float32 sums given for parameters.

    Gradients of others go where the backward pass would have them.
    """
    if not sums or not extension.state().usable:
        yield
        return
    set_sums = torch.ops.ipu_pipeline.set_grad_sums
    set_sums([*sums], [*sums.values()])
    try:
        with adding_to_grad():
            yield
    finally:
        set_sums([], [])


def torchs_products() -> AbstractContextManager[None]:
    """Within it, all threads compute float32 products as torch does: to compare with eager.

    Two libraries round differently, and some models make a difference of 1e-5 of it.
    """
    return _switched("set_onednn_products", wish=False, changes=onednn_products())


@contextlib.contextmanager
def _switched(operator: str, *, wish: bool, changes: bool) -> Iterator[None]:
    if not changes:
        yield
        return
    switch = getattr(torch.ops.ipu_pipeline, operator)
    before = switch(wish)
    try:
        yield
    finally:
        switch(before)


@contextlib.contextmanager
def casts_of_one_step() -> Iterator[None]:
    """Give back the memory of the weights that were cast when the step ends."""
    try:
        yield
    finally:
        _casts.clear()


def _cast(weight: Tensor, dtype: torch.dtype) -> Tensor:
    found = _casts.get(weight)
    if found is None or found[0] != weight._version:
        found = (weight._version, weight.detach().to(dtype))
        _casts[weight] = found
    cast: Tensor = found[1]
    return cast


def _is_large(input: Tensor, weight: Tensor, *, transposed: bool) -> bool:
    if weight.dim() != 2 or input.dim() < 2:
        return False
    outputs, inputs = reversed(weight.shape) if transposed else weight.shape
    return input.shape[-1] == inputs and input.numel() * outputs >= _LEAST_MULTIPLICATIONS


def is_plain(weight: Tensor) -> bool:
    """Whether a weight is a float32 tensor in the CPU's memory, which the kernels can take."""
    if weight.dtype is not torch.float32 or weight.device.type != "cpu":
        return False
    if type(weight) not in (Tensor, nn.Parameter):  # of a DTensor this is a slice only
        return False
    if weight.dim() != 2 or min(weight.shape) <= 1:
        return True
    # The library knows no memory whose rows overlap, which stand-ins have.
    return not 0 < weight.stride(0) == weight.stride(1)


def _is_alike(weight: Tensor, bias: Tensor | None) -> bool:
    fits = bias is None or (bias.dtype is torch.float32 and bias.dim() == 1)
    return fits and is_plain(weight)


@functools.cache
def _kernels() -> bool:
    wish = os.environ.get(SWITCH, "")
    if wish not in ("", "onednn", "mkl"):
        raise PipelineError(f"{SWITCH}={wish} is unknown; use onednn, mkl, or do not set it")
    return extension.kernels(
        linear_forward=lambda x, weight, _bias, transposed: x.new_empty(
            *x.shape[:-1], weight.shape[1 if transposed else 0]
        ),
        linear_backward=lambda _grad, x, weight, _transposed, *needs: tuple(
            each.new_empty(each.shape) if need else None
            for each, need in zip((x, weight), needs, strict=True)
        ),
    )()


def onednn_products() -> bool:
    """Whether large float32 products go to oneDNN here: on processors that MKL uses half of.

    Raises:
        PipelineError: ``IPU_PIPELINE_MATMUL`` names another library.
    """
    return _kernels() and bool(torch.ops.ipu_pipeline.onednn_products())


def widens_bfloat16() -> bool:
    """Whether large bfloat16 products are computed in float32 here: on x86 without AVX-512.

    Torch has no fast code for them there; the result is rounded to bfloat16 once, as theirs is.
    """
    return _kernels() and bool(torch.ops.ipu_pipeline.widens_bfloat16())
