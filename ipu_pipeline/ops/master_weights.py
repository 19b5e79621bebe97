"""Float32 copies of 16-bit weights for any optimizer of torch (master weights).

A 16-bit weight loses updates below half of its spacing. The optimizer therefore steps a float32
copy of it, which keeps them; the weight is that copy, rounded. See :mod:`ipu_pipeline.ops.adamw`
for the way that needs no copy.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

# Where a copy is kept between steps: in the state of its parameter, and so in checkpoints.
MASTER_WEIGHT = "master_weight"
HALVES = frozenset({torch.bfloat16, torch.float16})


class MasterWeights:
    """The float32 copies of an optimizer's 16-bit parameters.

    They begin as the weights, stand in ``optimizer.state`` as ``master_weight``, and are taken
    from the weight again where somebody has changed it between two steps.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self._versions = WeakIdKeyDictionary()  # in-place writes of a weight when it was rounded

    def parameters(self) -> list[torch.nn.Parameter]:
        """Return the 16-bit parameters that the optimizer has."""
        groups = self.optimizer.param_groups
        return [p for group in groups for p in group["params"] if p.dtype in HALVES]

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within it the parameters that have a gradient are their copies, gradients float32 too.

        Afterwards the weights are the copies, rounded, and have no gradients.
        """
        swapped: list[tuple[torch.nn.Parameter, Tensor]] = []
        try:
            for parameter in self.parameters():
                if parameter.grad is not None:
                    swapped.append((parameter, parameter.data))
                    self._widen(parameter)
            yield
        finally:
            for parameter, narrow in swapped:
                self._narrow(parameter, narrow)

    def load(self, state_dict: Mapping[str, Any]) -> None:
        """Give the optimizer the precision of what it has loaded, which torch rounds to 16 bits."""
        groups = zip(self.optimizer.param_groups, state_dict["param_groups"], strict=True)
        for parameter, key in (
            p for a, b in groups for p in zip(a["params"], b["params"], strict=True)
        ):
            if parameter.dtype in HALVES:
                loaded = self.optimizer.state.get(parameter, {})
                for name, value in state_dict["state"].get(key, {}).items():
                    if isinstance(value, Tensor) and isinstance(loaded.get(name), Tensor):
                        loaded[name] = value.to(loaded[name].device)

    def _widen(self, parameter: torch.nn.Parameter) -> None:
        gradient, narrow = parameter.grad, parameter.data
        assert gradient is not None
        # An optimizer whose state of a parameter is empty makes it; a copy must not be in it.
        state = self.optimizer.state.get(parameter, {})
        master = state.pop(MASTER_WEIGHT, None)
        for name, value in state.items():  # some optimizers make it before any step
            if isinstance(value, Tensor) and value.dtype in HALVES:
                state[name] = value.float()
        if master is None or not self._is_current(parameter, master):
            master = narrow.float()
        parameter.grad = None
        parameter.data = master
        parameter.grad = gradient.float()

    def _is_current(self, parameter: torch.nn.Parameter, master: Tensor) -> bool:
        if self._versions.get(parameter) == parameter._version:
            return True
        return torch.equal(master.to(parameter.dtype), parameter.data)

    def _narrow(self, parameter: torch.nn.Parameter, narrow: Tensor) -> None:
        parameter.grad = None
        master, parameter.data = parameter.data, narrow
        with torch.no_grad():
            parameter.copy_(master)
        self.optimizer.state[parameter][MASTER_WEIGHT] = master
        self._versions[parameter] = parameter._version
