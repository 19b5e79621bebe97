"""Put the annotations of a plan on a model, and take every one of them off again."""

from __future__ import annotations

import functools
from typing import Any, Callable, Mapping, Sequence

from torch import Tensor, nn

from .find import find_modules
from .serialized import find_table, restore, serialize


class PlacementError(ValueError):
    """The annotations cannot be put on the model."""


class Placement:
    """Annotations that are on a model.

    Args:
        model: The user's model.
        annotations: One mapping per block, in execution order: ``block``, ``module``, ``stage``,
            ``ipu``, ``again``, ``checkpoint``, ``serialize``.
        planned_parameters: See :func:`find_modules`.
        poptorch: The front end.

    A module that stands for several blocks (one embedding for encoder and decoder) begins them in
    turn: its first call the first, its second call the second.

    Raises:
        PlacementError: Blocks on two IPUs use the same parameter.
        ModuleNotFound: A module is not there.
        ValueError: A block cannot be serialized.
    """

    def __init__(
        self,
        model: nn.Module,
        annotations: Sequence[Mapping[str, Any]],
        planned_parameters: Mapping[str, str],
        poptorch: Any,
    ) -> None:
        self.model = model
        self.annotations = [a for a in annotations if a["module"] and not a["again"]]
        self.poptorch = poptorch
        self._handles: list[Any] = []
        self._tables: list[nn.Module] = []
        paths = [annotation["module"] for annotation in self.annotations]
        self.modules = find_modules(model, paths, planned_parameters)
        self.begun = _distinct(self.annotations, self.modules)
        try:
            self._apply()
        except Exception:
            self.undo()
            raise

    def strategy(self, *, pipelined: bool = True) -> Any:
        """Return the execution strategy: one stage per stage of the plan, on its IPU."""
        stages: dict[int, list[Mapping[str, Any]]] = {}
        for annotation in self.begun:
            stages.setdefault(annotation["stage"], []).append(annotation)
        kind = self.poptorch.PipelinedExecution if pipelined else self.poptorch.ShardedExecution
        return kind(
            *[
                self.poptorch.Stage(*[a["block"] for a in stages[index]]).ipu(
                    stages[index][0]["ipu"]
                )
                for index in sorted(stages)
            ]
        )

    def undo(self) -> None:
        """Leave the model as it was: blocks, hooks and serialized modules are gone."""
        self.poptorch.removeBlocks(self.model)
        for handle in self._handles:
            handle.remove()
        for table in self._tables:
            restore(table)
        self._handles, self._tables = [], []

    def _check_variables(self) -> None:
        """Refuse a parameter that modules on two IPUs hold: PopART copies no variables."""
        homes: dict[int, Mapping[str, Any]] = {}
        for annotation in self.annotations:
            for name, parameter in self.modules[annotation["module"]].named_parameters():
                home = homes.setdefault(id(parameter), annotation)
                if home["ipu"] != annotation["ipu"]:
                    raise PlacementError(
                        "parameter {!r} of {!r} on IPU {} is also used by {!r} on IPU {}; put both "
                        "on one IPU, or untie them".format(
                            name, annotation["block"], annotation["ipu"], home["block"], home["ipu"]
                        )
                    )

    def _apply(self) -> None:
        self._check_variables()
        shared = _SharedParameters(self.model)
        by_module: dict[int, list[Mapping[str, Any]]] = {}
        for annotation in self.begun:
            by_module.setdefault(id(self.modules[annotation["module"]]), []).append(annotation)
        for together in by_module.values():
            self._put(together, self.modules[together[0]["module"]], shared)

    def _put(
        self, annotations: Sequence[Mapping[str, Any]], module: nn.Module, shared: _SharedParameters
    ) -> None:
        """Put all annotations of one module on it."""
        first = annotations[0]
        slices = max(annotation["serialize"] for annotation in annotations)
        if slices > 1:
            table = find_table(module, slices, first["block"])
            serialize(table, slices)
            self._tables.append(table)
        # Before the block begins: the hook then still runs in the block before this one.
        self._handles.extend(shared.watch(module))
        if len(annotations) == 1:
            self.poptorch.BeginBlock(module, user_id=first["block"], ipu_id=first["ipu"])
        else:
            turns = _Turns(annotations, self.poptorch)
            self._handles.append(module.register_forward_pre_hook(turns.begin))
            self._handles.append(self.model.register_forward_pre_hook(turns.restart))
        if any(annotation["checkpoint"] for annotation in annotations):
            keep = functools.partial(_checkpoint, self.poptorch)
            self._handles.append(module.register_forward_hook(keep))


class _Turns:
    """Begins one block after the other, a new one at every call of their common module."""

    def __init__(self, annotations: Sequence[Mapping[str, Any]], poptorch: Any) -> None:
        self._annotations = annotations
        self._poptorch = poptorch
        self._calls = 0

    def restart(self, _module: nn.Module, _args: Any) -> None:
        self._calls = 0

    def begin(self, _module: nn.Module, _args: Any) -> None:
        annotation = self._annotations[min(self._calls, len(self._annotations) - 1)]
        self._calls += 1
        self._poptorch.Block.start(user_id=annotation["block"], ipu_id=annotation["ipu"])


class _SharedParameters:
    """Parameters handed to blocks as arguments become plain values, once per forward pass.

    PopART copies values between IPUs, but no variables. The first block that is given one makes the
    value, on the IPU of the block before it; later blocks are given the same value.
    """

    def __init__(self, model: nn.Module) -> None:
        self._values: dict[int, Tensor] = {}
        self._model = model
        self._cleared = False

    def watch(self, module: nn.Module) -> list[Any]:
        """Return the handles of the hooks put on ``module``."""
        handles = [_register_pre_hook(module, self._replace)]
        if not self._cleared:
            handles.append(self._model.register_forward_pre_hook(self._clear))
            self._cleared = True
        return handles

    def _clear(self, _module: nn.Module, _args: Any) -> None:
        self._values = {}

    def _value(self, item: Any) -> Any:
        if not isinstance(item, nn.Parameter):
            return item
        if id(item) not in self._values:
            self._values[id(item)] = item + 0
        return self._values[id(item)]

    def _replace(
        self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if not any(isinstance(a, nn.Parameter) for a in [*args, *kwargs.values()]):
            return None
        return (
            tuple(self._value(a) for a in args),
            {name: self._value(a) for name, a in kwargs.items()},
        )


def _register_pre_hook(module: nn.Module, hook: Callable[..., Any]) -> Any:
    try:
        return module.register_forward_pre_hook(hook, with_kwargs=True)
    except TypeError:  # torch before 2.0 has no keyword arguments in hooks

        def positional(owner: nn.Module, args: tuple[Any, ...]) -> Any:
            changed = hook(owner, args, {})
            return None if changed is None else changed[0]

        return module.register_forward_pre_hook(positional)


def _distinct(
    annotations: Sequence[Mapping[str, Any]], modules: Mapping[str, nn.Module]
) -> list[Mapping[str, Any]]:
    """Return the annotations without further ones of a module in the same stage."""
    seen: set[tuple[int, int]] = set()
    begun = []
    for annotation in annotations:
        key = (id(modules[annotation["module"]]), annotation["stage"])
        if key not in seen:
            seen.add(key)
            begun.append(annotation)
    return begun


def _checkpoint(poptorch: Any, _module: nn.Module, _args: Any, output: Any) -> Any:
    if isinstance(output, Tensor):
        return poptorch.recomputationCheckpoint(output)
    if isinstance(output, tuple) and type(output) is tuple:
        return tuple(
            poptorch.recomputationCheckpoint(item) if isinstance(item, Tensor) else item
            for item in output
        )
    return output
