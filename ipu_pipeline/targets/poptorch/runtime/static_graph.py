"""Keep model code from doing what a device program cannot: read values, keep caches.

transformers skips an attention mask when all of it is ones, unless it is being traced; poptorch's
tracing is not the one that model code asks about. Caches of keys and values start with empty
tensors, which the device does not have, and training needs none.
"""

from __future__ import annotations

import contextlib
import functools
from typing import Any, Callable, Iterator

import torch
from torch import nn


@contextlib.contextmanager
def static_graph(model: nn.Module) -> Iterator[None]:
    """While it lasts, ``torch.jit.is_tracing()`` says yes and ``model`` uses no cache."""
    jit: Any = torch.jit
    own = jit.is_tracing
    configs = _configs_with_cache(model)
    jit.is_tracing = lambda: True
    for config in configs:
        config.use_cache = False
    try:
        yield
    finally:
        jit.is_tracing = own
        for config in configs:
            config.use_cache = True


def _configs_with_cache(model: nn.Module) -> list[Any]:
    """Return the distinct configurations of ``model`` and its parts that ask for a cache."""
    found = {}
    for module in model.modules():
        config = getattr(module, "config", None)
        if getattr(config, "use_cache", False) is True:
            found[id(config)] = config
    return list(found.values())


def loss_only(model: nn.Module, poptorch: Any) -> Callable[[], None]:
    """Make ``model.forward`` return only its loss, marked as the loss; return what undoes it."""
    plain = model.forward

    @functools.wraps(plain)
    def forward(*args: Any, **kwargs: Any) -> Any:
        with static_graph(model):
            output = plain(*args, **kwargs)
        # A sum of losses must be marked as the one loss.
        return poptorch.identity_loss(output["loss"], reduction="none")

    model.forward = forward
    return lambda: delattr(model, "forward")
