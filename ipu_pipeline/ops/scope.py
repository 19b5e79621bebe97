"""What every block runs in: its own random numbers, and our operations where they are faster."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ipu_pipeline.ops.linear import fast_addmm, fast_linear
from ipu_pipeline.ops.random import random_scope

# They return None for a call that torch has to take, and have torch's names of arguments.
_FASTER: dict[Any, Callable[..., Tensor | None]] = {
    functional.linear: fast_linear,
    torch.addmm: fast_addmm,
}


class block_scope(random_scope):
    """Within it, torch functions of this thread run as those of one block.

    Args:
        *key: Whole numbers and strings that identify the block's random numbers: seed, step,
            microbatch, block.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        faster = _FASTER.get(func)
        if faster is not None:
            result = faster(*args, **(kwargs or {}))
            if result is not None:
                return result
        return super().__torch_function__(func, types, args, kwargs)
