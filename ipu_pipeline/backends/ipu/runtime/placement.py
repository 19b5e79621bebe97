"""Put the annotations of a plan on a model, and take every one of them off again.

Modules are found also where this transformers version names them otherwise.
"""

from __future__ import annotations

import difflib
import functools
from typing import Any, Callable, Mapping, Sequence, Tuple

from torch import Tensor, nn

from .tables import Part, cut, find_table, restore


class PlacementError(ValueError):
    """The annotations cannot be put on the model."""


class Placement:
    """Annotations that are on a model.

    Args:
        model: The user's model.
        annotations: One mapping per block, in execution order: ``block``, ``module``, ``stage``,
            ``ipu``, ``again``, ``checkpoint``, ``serialize``, ``inference``, ``rows``. The last
            but one is stage, IPU and slices in evaluation, ``None``: as in training; the last are
            the rows of its module's table that it has, ``None``: all.
        planned_parameters: See :func:`find_modules`.
        poptorch: The front end.

    A module that stands for several blocks (one embedding for encoder and decoder) begins them in
    turn: its first call the first, its second call the second. Blocks that have the rows of one
    table begin one after the other within a call.

    Attributes:
        parts: Names of the parameters that took the place of a spread table's, by its name.

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
        self._idle: list[tuple[nn.Module, dict[str, Any]]] = []
        self._rows: dict[int, dict[tuple[int, int], nn.Parameter]] = {}
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        paths = [annotation["module"] for annotation in self.annotations]
        self.modules = find_modules(model, paths, planned_parameters)
        self.begun = _distinct(self.annotations, self.modules)
        try:
            self._apply()
        except Exception:
            self.undo()
            raise
        here = {id(parameter): name for name, parameter in model.named_parameters()}
        self.parts = {
            names[whole]: [here[id(rows[key])] for key in sorted(rows)]
            for whole, rows in self._rows.items()
        }

    def strategy(self, *, pipelined: bool = True) -> Any:
        """Return the execution strategy: one stage per stage of the plan, on its IPU.

        All blocks of a stage begin under one name, and names become stages in the order in which
        they first begin. Stages that are listed by hand cannot be pickled into an executable.
        """
        kind = self.poptorch.PipelinedExecution if pipelined else self.poptorch.ShardedExecution
        return kind(self.poptorch.AutoStage.AutoIncrement)

    def undo(self) -> None:
        """Leave the model as it was: blocks, hooks and serialized modules are gone."""
        for handle in self._handles:  # first: removeBlocks puts other dicts in place of theirs
            handle.remove()
        self.poptorch.removeBlocks(self.model)
        for table in self._tables:
            restore(table)
        for module, parameters in self._idle:
            module._parameters.clear()
            module._parameters.update(parameters)
        self._handles, self._tables, self._idle = [], [], []

    def _check_variables(self) -> None:
        """Refuse a parameter that modules on two IPUs hold: PopART copies no variables."""
        for training in (True, False):
            homes: dict[tuple[int, Any], Mapping[str, Any]] = {}
            for annotation in self.annotations:
                rows, module = annotation.get("rows"), self.modules[annotation["module"]]
                table = rows and find_table(module, annotation["block"]).weight
                for name, parameter in module.named_parameters():
                    if rows and parameter is not table:  # the front end looks where it is used
                        continue
                    home = homes.setdefault((id(parameter), rows), annotation)
                    here, there = (
                        place(annotation, training=training)[1],
                        place(home, training=training)[1],
                    )
                    if here != there:
                        raise PlacementError(
                            "parameter {!r} of {!r} on IPU {} is also used by {!r} on IPU {}{}; "
                            "put both on one IPU, or untie them".format(
                                name, annotation["block"], here, home["block"], there,
                                "" if training else " in evaluation",
                            )
                        )  # fmt: skip

    def _apply(self) -> None:
        self._check_variables()
        shared = _SharedParameters(self.model)
        by_module: dict[int, list[Mapping[str, Any]]] = {}
        for annotation in self.begun:
            by_module.setdefault(id(self.modules[annotation["module"]]), []).append(annotation)
        for together in by_module.values():
            self._put(together, self.modules[together[0]["module"]], shared)
        for module in self.model.modules():  # that hold a spread weight and never run
            left = [n for n, p in module._parameters.items() if id(p) in self._rows]
            if left:
                self._idle.append((module, dict(module._parameters)))
                for name in left:
                    del module._parameters[name]

    def _put(
        self, annotations: Sequence[Mapping[str, Any]], module: nn.Module, shared: _SharedParameters
    ) -> None:
        """Put all annotations of one module on it."""
        first, calls = annotations[0], calls_of(annotations)
        turns = _Turns(calls, self.model, self.poptorch)
        is_spread = any(annotation.get("rows") for annotation in annotations)
        slices = [
            max(place(a, training=training)[2] for a in annotations) for training in (True, False)
        ]
        if is_spread or max(slices) > 1:
            self._cut(find_table(module, first["block"]), calls, turns)
        # Before the block begins: the hook then still runs in the block before this one.
        self._handles.extend(shared.watch(module))
        alone = len(annotations) == 1 and place(first, training=False)[:2] == place(first)[:2]
        if alone:
            self.poptorch.BeginBlock(module, user_id=_stage_name(first), ipu_id=first["ipu"])
        else:
            self._handles.append(module.register_forward_pre_hook(turns.begin))
            self._handles.append(self.model.register_forward_pre_hook(turns.restart))
        if any(call[-1]["checkpoint"] for call in calls):
            keep = functools.partial(_checkpoint, self.poptorch)
            self._handles.append(module.register_forward_hook(keep))

    def _cut(
        self, table: nn.Embedding | nn.Linear, calls: Sequence[Sequence[Any]], turns: _Turns
    ) -> None:
        """Let ``table`` compute in the slices, and with the rows, that its blocks ask for."""
        weight = table.weight
        made = self._rows.setdefault(id(weight), {}) if calls[0][0].get("rows") else {}
        parts = []
        for number, blocks in enumerate(zip(*calls)):
            rows = tuple(blocks[0].get("rows") or (0, len(weight)))
            factors = [max(place(a, training=t)[2] for a in blocks) for t in (True, False)]
            later = number + 1 < len(calls[0])
            parts.append(
                Part(
                    blocks[0]["block"],
                    rows,
                    (factors[0], factors[1]),
                    functools.partial(turns.begin_part, number) if number else None,
                    later and any(a["checkpoint"] for a in blocks),
                )
            )
        if any(
            [a.get("rows") for a in call] != [a.get("rows") for a in calls[0]] for call in calls
        ):
            raise PlacementError(
                "{!r} has other rows in one call than in another".format(calls[0][0]["block"])
            )
        cut(table, parts, made)
        self._tables.append(table)


def calls_of(annotations: Sequence[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    """Return the blocks that begin in each call of their module: the first rows begin another."""
    calls: list[list[Mapping[str, Any]]] = []
    for annotation in annotations:
        rows = annotation.get("rows")
        if calls and rows and rows[0]:
            calls[-1].append(annotation)
        else:
            calls.append([annotation])
    return calls


def place(annotation: Mapping[str, Any], *, training: bool = True) -> tuple[int, int, int]:
    """Return stage, IPU and slices of a block in training or in evaluation."""
    if not training and annotation.get("inference") is not None:
        stage, ipu, slices = annotation["inference"]
        return stage, ipu, slices
    return annotation["stage"], annotation["ipu"], annotation["serialize"]


def _stage_name(annotation: Mapping[str, Any], *, training: bool = True) -> str:
    return "stage{}".format(place(annotation, training=training)[0])


class _Turns:
    """Begins one block after the other, a new one at every call of their common module.

    A program is traced with the model in the mode that it is for: that chooses the placement.
    """

    def __init__(
        self, blocks: Sequence[Sequence[Mapping[str, Any]]], model: nn.Module, poptorch: Any
    ) -> None:
        self._blocks = blocks
        self._model = model
        self._poptorch = poptorch
        self._calls = 0

    def restart(self, _module: nn.Module, _args: Any) -> None:
        self._calls = 0

    def begin(self, _module: nn.Module, _args: Any) -> None:
        self._calls += 1
        self.begin_part(0)

    def begin_part(self, number: int) -> None:
        """Begin the block that has the part ``number`` of a spread table, in the call that runs."""
        annotation = self._blocks[min(self._calls, len(self._blocks)) - 1][number]
        training = self._model.training
        ipu = place(annotation, training=training)[1]
        self._poptorch.Block.start(user_id=_stage_name(annotation, training=training), ipu_id=ipu)


class _SharedParameters:
    """Parameters and buffers handed to blocks as arguments become values, once per forward pass.

    PopART copies values between IPUs, but no variables. The first block that is given one makes the
    value, on the IPU of the block before it; later blocks are given the same value.
    """

    def __init__(self, model: nn.Module) -> None:
        self._values: dict[int, Tensor] = {}
        self._model = model
        self._buffers: frozenset[int] = frozenset()
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
        self._buffers = frozenset(id(buffer) for buffer in self._model.buffers())

    def _is_variable(self, item: Any) -> bool:
        return isinstance(item, nn.Parameter) or id(item) in self._buffers

    def _value(self, item: Any) -> Any:
        if not self._is_variable(item):
            return item
        if id(item) not in self._values:
            self._values[id(item)] = item + 0
        return self._values[id(item)]

    def _replace(
        self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if not any(map(self._is_variable, [*args, *kwargs.values()])):
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
    """Return the annotations without further ones of a module all of whose calls share a stage."""
    stages: dict[int, set[tuple[int, int]]] = {}
    for annotation in annotations:
        both = (place(annotation)[0], place(annotation, training=False)[0])
        stages.setdefault(id(modules[annotation["module"]]), set()).add(both)
    seen: set[int] = set()
    begun = []
    for annotation in annotations:
        key = id(modules[annotation["module"]])
        if key not in seen or len(stages[key]) > 1 or annotation.get("rows"):
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


Structure = Tuple[Tuple[str, str], ...]


class ModuleNotFound(LookupError):
    """A module that the plan names is not in the model."""


def find_modules(
    model: nn.Module, paths: Sequence[str], planned_parameters: Mapping[str, str]
) -> dict[str, nn.Module]:
    """Return the module of every path.

    A path that the model does not have is matched by structure: the modules whose parameters have
    the same names below them and the same shapes, or at least the same shapes, in the order of the
    model, one to one.

    Args:
        model: The model.
        paths: Dotted paths of the plan, in its order.
        planned_parameters: ``shape dtype`` text by parameter name of the planned model, such as
            ``384x384 float32``.

    Returns:
        The module by path.

    Raises:
        ModuleNotFound: No module, or not as many as the plan names, have that structure.
    """
    # One module object may have several paths (T5's embedding, in older versions).
    here = dict(model.named_modules(remove_duplicate=False))
    found = {path: here[path] for path in paths if path in here}
    missing = [path for path in paths if path not in here]
    groups: dict[Structure, list[str]] = {}
    for path in missing:
        groups.setdefault(_planned_structure(path, planned_parameters), []).append(path)
    taken = {id(module) for module in found.values()}
    free = [module for module in model.modules() if id(module) not in taken]
    for structure, members in groups.items():
        candidates = [m for m in free if structure and _structure(m) == structure]
        if not candidates:  # parameters were renamed, too
            shapes = _shapes(structure)
            candidates = [m for m in free if shapes and _shapes(_structure(m)) == shapes]
        if len(candidates) != len(members):
            raise ModuleNotFound(_message(members, candidates, here))
        found.update(zip(members, candidates))
    return found


def _shapes(structure: Structure) -> tuple[str, ...]:
    return tuple(sorted(shape for _, shape in structure))


def _planned_structure(path: str, planned_parameters: Mapping[str, str]) -> Structure:
    below = {
        name[len(path) + 1 :]: text.split(" ")[0]
        for name, text in planned_parameters.items()
        if name.startswith(path + ".")
    }
    return tuple(sorted(below.items()))


def _structure(module: nn.Module) -> Structure:
    shapes = {
        name: "x".join(str(size) for size in parameter.shape) or "scalar"
        for name, parameter in module.named_parameters()
    }
    return tuple(sorted(shapes.items()))


def _message(
    members: Sequence[str], candidates: Sequence[nn.Module], here: Mapping[str, nn.Module]
) -> str:
    close = difflib.get_close_matches(members[0], list(here), n=3)
    hint = "; close names: " + ", ".join(close) if close else ""
    return (
        f"the model has no module {members[0]!r}, and {len(candidates)} modules of its structure "
        f"for {len(members)} that the plan names{hint}; use the transformers version the plan was "
        "made with, or correct the paths"
    )
