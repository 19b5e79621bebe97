"""FLOP formulas: torch's own, plus those of fused CPU attention, which torch does not list."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

_CPU_ATTENTION = "_scaled_dot_product_flash_attention_for_cpu"


def count_flops(operation: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> int:
    """Return the FLOPs of one ATen call (a multiply-add is 2); 0 where no formula is known.

    Args:
        operation: The operation's overload packet.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        result: What it returned.
    """
    name = str(operation).rsplit(".", 1)[-1]
    if name == _CPU_ATTENTION:
        query, key, value = (tensor.shape for tensor in args[:3])
        return int(sdpa_flop_count(query, key, value))
    if name == f"{_CPU_ATTENTION}_backward":
        gradient, query, key, value = (tensor.shape for tensor in args[:4])
        return int(sdpa_backward_flop_count(gradient, query, key, value))
    if name == "_grouped_mm":  # every row of the first operand meets one matrix of the second
        rows, inner = args[0].shape[-2:]
        return int(2 * rows * inner * args[1].shape[-1])
    formula = flop_registry.get(operation)
    return int(formula(*args, **kwargs, out_val=result)) if formula else 0


@contextlib.contextmanager
def countable(module: nn.Module) -> Iterator[None]:
    """Let mixture-of-experts modules run on tensors without values.

    Their grouped matrix multiplication accepts bfloat16 only there; the batched form does the
    same arithmetic for every token and its chosen experts.
    """
    configs = {id(c): c for m in module.modules() if (c := getattr(m, "config", None)) is not None}
    changed = [
        config
        for config in configs.values()
        if getattr(config, "_experts_implementation_internal", None) == "grouped_mm"
    ]
    for config in changed:
        config._experts_implementation_internal = "batched_mm"
    try:
        yield
    finally:
        for config in changed:
            config._experts_implementation_internal = "grouped_mm"


assert hasattr(torch.ops.aten, _CPU_ATTENTION), "torch renamed its fused CPU attention"
