"""What a capture sees of a model: what the caller computes with it, under the model's own names."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn


@contextlib.contextmanager
def viewed(model: nn.Module, view: Callable[[dict[str, Any]], Any]) -> Iterator[None]:
    """Let ``model(**inputs)`` return ``view(inputs)`` while the context is open.

    The view may call the model: such a call reaches the model's own ``forward``. Nothing else of
    the model changes, so blocks and parameters keep their names.
    """
    own = model.forward
    inside = False

    def forward(*args: Any, **kwargs: Any) -> Any:
        nonlocal inside
        if inside:
            return own(*args, **kwargs)
        inside = True
        try:
            return view(kwargs)
        finally:
            inside = False

    before = vars(model).get("forward")
    model.forward = forward
    try:
        yield
    finally:
        if before is None:
            del model.forward
        else:
            model.forward = before


def flatten(outputs: Any, *, with_loss: bool) -> dict[str, Tensor]:
    """Return every tensor of a model's outputs under a name that tells where it belongs.

    Args:
        outputs: A mapping, or a tuple whose first member is the loss if there is one.
        with_loss: Leave out that first member; a mapping's ``loss`` is left out always.
    """
    if isinstance(outputs, Mapping):
        members = {str(key): value for key, value in outputs.items() if key != "loss"}
    else:
        whole = (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)
        members = {str(i): value for i, value in enumerate(whole) if i or not with_loss}
    # Stages hand results over in their own order, so a name starts with its place.
    found = (item for name, value in members.items() for item in _leaves(value, (name,)))
    return {f"{i:05d}/{'/'.join(path)}": tensor for i, (path, tensor) in enumerate(found)}


def unflatten(named: Mapping[str, Tensor]) -> dict[str, Any]:
    """Put back together what :func:`flatten` took apart, in the model's order."""
    paths = [(name.split("/")[1:], named[name]) for name in sorted(named)]
    return _grouped(paths)


def _leaves(value: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Tensor]]:
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, tuple | list):
        for index, item in enumerate(value):
            yield from _leaves(item, (*path, str(index)))
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _leaves(item, (*path, str(key)))


def _grouped(paths: list[tuple[list[str], Tensor]]) -> dict[str, Any]:
    groups: dict[str, list[tuple[list[str], Tensor]]] = {}
    for (first, *rest), tensor in paths:
        groups.setdefault(first, []).append((rest, tensor))
    return {name: _member(members) for name, members in groups.items()}


def _member(members: list[tuple[list[str], Tensor]]) -> Any:
    if not members[0][0]:
        return members[0][1]
    inner = _grouped(members)
    return tuple(inner.values()) if all(key.isdigit() for key in inner) else inner
