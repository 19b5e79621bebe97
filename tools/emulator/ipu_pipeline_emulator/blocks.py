"""Blocks: which part of a model belongs together. Outside a trace they do nothing."""

from __future__ import annotations

import functools
from collections import OrderedDict
from typing import Any, Callable

from torch import nn

from . import tracing
from .errors import createPoptorchError
from .options_base import require


class _BlockStart:
    """The forward pre-hook of ``BeginBlock``; picklable, and keeps an automatic id."""

    def __init__(self, user_id: str | None, ipu_id: int | None) -> None:
        _check_ids(user_id, ipu_id)
        self.user_id = user_id
        self.ipu_id = ipu_id

    def __call__(self, _module: nn.Module, _inputs: Any) -> None:
        self.user_id = tracing.begin_block(self.user_id, self.ipu_id)


class LegacyBeginBlockFn:
    """A callable that starts a block and then calls what it wraps."""

    def __init__(self, layer: Callable[..., Any], user_id: str | None, ipu_id: int | None) -> None:
        self._layer = layer
        self._start = _BlockStart(user_id, ipu_id)
        functools.update_wrapper(self, layer, updated=())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Start the block and call the layer."""
        self._start(None, args)  # type: ignore[arg-type]
        return self._layer(*args, **kwargs)


def BeginBlock(layer_to_call: Any, user_id: str | None = None, ipu_id: int | None = None) -> Any:
    """Start a block when the forward pass of ``layer_to_call`` starts; lasts until the next one.

    Args:
        layer_to_call: A module (returned unchanged, with a hook) or a callable (wrapped).
        user_id: Name of the block; numbered in the order of execution without one.
        ipu_id: IPU within one replica.

    Raises:
        Error: The module starts a block already, or it is neither module nor callable.
    """
    if not isinstance(layer_to_call, nn.Module):
        if callable(layer_to_call):
            return LegacyBeginBlockFn(layer_to_call, user_id, ipu_id)
        raise createPoptorchError(
            f"BeginBlock needs a module or a callable, got {type(layer_to_call).__name__}"
        )
    if any(map(_starts, layer_to_call._forward_pre_hooks.values())):
        raise createPoptorchError(
            "BeginBlock was called twice on the same module: "
            f"{type(layer_to_call).__name__} starts a block already; call removeBlocks first"
        )
    layer_to_call.register_forward_pre_hook(_BlockStart(user_id, ipu_id))
    return layer_to_call


def removeBlocks(module: nn.Module) -> None:
    """Remove the blocks of a module and of all modules in it.

    Every module gets a new table of hooks, as from the front end. A handle that was taken before
    cannot remove its hook any more, only the mark that the hook takes keyword arguments.
    """
    require(isinstance(module, nn.Module), "removeBlocks needs a module")
    for found in module.modules():
        kept = [(k, hook) for k, hook in found._forward_pre_hooks.items() if not _starts(hook)]
        found._forward_pre_hooks = OrderedDict(kept)


def _starts(hook: Any) -> bool:
    return isinstance(hook, _BlockStart)


class Block:
    """A block as a context; leaving it leaves NO block active.

    Args:
        user_id: Name of the block; numbered without one.
        ipu_id: IPU within one replica.
    """

    def __init__(self, user_id: str | None = None, ipu_id: int | None = None) -> None:
        _check_ids(user_id, ipu_id)
        self._user_id = user_id
        self._ipu_id = ipu_id

    def __enter__(self) -> Block:
        self._user_id = tracing.begin_block(self._user_id, self._ipu_id)
        return self

    def __exit__(self, *_exception: Any) -> None:
        tracing.end_block()

    @staticmethod
    def start(user_id: str | None = None, ipu_id: int | None = None) -> None:
        """Start a block that lasts until the next one."""
        _check_ids(user_id, ipu_id)
        tracing.begin_block(user_id, ipu_id)

    @staticmethod
    def useAutoId() -> None:
        """Number anonymous blocks from 0 again."""
        tracing.restart_ids()


def BlockFunction(
    user_id: str | None = None, ipu_id: int | None = None
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Run a whole function as a block (decorator)."""
    _check_ids(user_id, ipu_id)

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        block = Block(user_id, ipu_id)

        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            with block:
                return function(*args, **kwargs)

        return wrapper

    return decorate


def _check_ids(user_id: Any, ipu_id: Any) -> None:
    require(
        user_id is None or isinstance(user_id, (str, int)),
        f"Unexpected type {type(user_id)} for user_id. Expected str",
    )
    require(
        ipu_id is None or (isinstance(ipu_id, int) and ipu_id >= 0),
        f"ipu_id must be an int of at least 0 or None, got {ipu_id!r}",
    )
