"""The same model under the SDK's Python: built from its configuration, filled by name.

transformers there is years older than the one that the plan was made with. What its class lacks, a
key of the configuration that it does not know, and parameters of other names or shapes are refused
by name; whether it computes the same is then tried on a sample.
"""

from __future__ import annotations

import importlib
import json
import sys
from typing import Any, Dict, Mapping

import torch
import transformers
from torch import Tensor, nn

# Keys that describe a file, a type or a kernel, and change nothing that a model computes.
_ABOUT = {
    "_attn_implementation",
    "_name_or_path",
    "attn_implementation",
    "architectures",
    "dtype",
    "experts_implementation",
    "model_type",
    "torch_dtype",
    "transformers_version",
}
# Newer torch keeps a weight norm's two factors under other names: ours, theirs.
_RENAMED = (
    (".parametrizations.weight.original0", ".weight_g"),
    (".parametrizations.weight.original1", ".weight_v"),
)


class ModelError(ValueError):
    """The SDK's Python cannot make the model that the plan is for."""


class SdkModel:
    """The model, with the names that the other side knows.

    Args:
        description: ``class``, ``module``, ``config`` (JSON text), ``config_class``,
            ``config_module``, ``changed`` (keys that differ from the configuration's defaults) and
            ``attention``.
        parameters: By every name, also a second one of the same parameter: ``shape``, ``dtype``,
            ``trained``, and ``same_as``, the first name.
        buffers: Shape and dtype of the buffers that are saved, by name.

    Attributes:
        model: In float32 until :meth:`finish`.
        has_guesses: Whether a parameter of another name was found by its shape alone, so that what
            the model computes must be compared.

    Raises:
        ModelError: It cannot be made, or has other parameters.
    """

    def __init__(
        self,
        description: Mapping[str, Any],
        parameters: Mapping[str, Mapping[str, Any]],
        buffers: Mapping[str, Mapping[str, Any]],
    ) -> None:
        self.model = _built(description)
        self._parameters = parameters
        self._buffers = buffers
        theirs = dict(self.model.named_parameters(remove_duplicate=False))
        named = {name: _renamed(name, theirs) for name in parameters}
        self._theirs = _found_by_shape(named, parameters, theirs)
        self.has_guesses = self._theirs != named
        _check_same("parameter", parameters, {n: theirs.get(t) for n, t in self._theirs.items()})
        known = {id(theirs[name]) for name in self._theirs.values()}
        for name, parameter in theirs.items():
            if id(parameter) not in known:
                raise ModelError(_difference("parameter", name, "is only in the SDK's model"))
        kept = self.model.state_dict()
        _check_same("buffer", buffers, {name: kept.get(name) for name in buffers})
        self._tie(theirs)
        # While a table is spread over IPUs, its weight is no parameter of the model.
        self._own = dict(self.model.named_parameters(remove_duplicate=False))
        self._named = dict(self.model.named_parameters())

    def write(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy ``tensors`` into the parameters and buffers of these names.

        Raises:
            ModelError: There is no such name.
        """
        here = self.tensors()
        unknown = [name for name in tensors if name not in here]
        if unknown:
            raise ModelError(f"the model has no parameter or buffer {unknown[0]!r}")
        with torch.no_grad():
            for name, value in tensors.items():
                here[name].copy_(value)

    def tensors(self) -> dict[str, Tensor]:
        """Return parameters, each once, and saved buffers, by the names of the other side."""
        found: dict[str, Tensor] = {
            name: self._own[self._theirs[name]]
            for name, about in self._parameters.items()
            if about["same_as"] == name
        }
        buffers = dict(self.model.named_buffers())
        found.update((name, buffers[name]) for name in self._buffers)
        return found

    def names(self) -> dict[str, str]:
        """Return the other side's name of every parameter here."""
        own: dict[int, str] = {id(p): name for name, p in self._named.items()}
        return {own[id(value)]: name for name, value in self.tensors().items() if id(value) in own}

    def finish(self) -> None:
        """Give every tensor the type that it has on the other side, and freeze what is frozen."""
        for name, value in self.tensors().items():
            about = self._parameters.get(name) or self._buffers[name]
            value.data = value.data.to(getattr(torch, about["dtype"]))
        for name, about in self._parameters.items():
            self._own[self._theirs[name]].requires_grad_(about["trained"])

    def _tie(self, theirs: Mapping[str, nn.Parameter]) -> None:
        """Share the parameters that the other side shares, and no others."""
        owners: dict[int, str] = {}
        for name, about in self._parameters.items():
            parameter = theirs[self._theirs[about["same_as"]]]
            if owners.setdefault(id(parameter), about["same_as"]) != about["same_as"]:
                raise ModelError(
                    _difference("parameter", name, f"is {owners[id(parameter)]!r} there")
                )
            path, _, leaf = self._theirs[name].rpartition(".")
            owner = self.model.get_submodule(path) if path else self.model
            if owner._parameters[leaf] is not parameter:
                owner._parameters[leaf] = parameter


def _built(description: Mapping[str, Any]) -> Any:
    name = description["class"]
    cls = _found(description["module"], name, "model")
    kind = _found(description["config_module"], description["config_class"], "configuration")
    given = json.loads(description["config"])
    _check_keys(kind, given, description["changed"])
    own = {key: value for key, value in given.items() if key not in _ABOUT}
    own["architectures"] = [name]
    try:
        model = cls(kind.from_dict(own))
    except Exception as error:  # of transformers, about values that it does not know
        raise ModelError(
            f"{_where()} cannot build {name} from its configuration: {type(error).__name__}: "
            f"{error}; {_REMEDY}"
        ) from error
    attention = description["attention"]
    if attention is not None and hasattr(model, "set_attn_implementation"):
        model.set_attn_implementation(attention)
    return model.float()


def _found(module: str, name: str, what: str) -> Any:
    """Return a class of transformers by its name, any other one by its module."""
    if module.split(".")[0] == "transformers":
        cls = getattr(transformers, name, None)
        if cls is None:
            raise ModelError(f"{_where()} has no {name}; {_REMEDY}")
        return cls
    try:
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except Exception as error:  # whatever the user's module raises under an older Python
        raise ModelError(
            f"the {what}'s class {name} cannot be imported from {module!r} under {sys.executable}: "
            f"{type(error).__name__}: {error}; put its folder on PYTHONPATH, and write it so that "
            "the SDK's Python and transformers can import it"
        ) from error
    return found


def _check_keys(kind: Any, given: Mapping[str, Any], changed: Any) -> None:
    known = kind()
    unknown = [
        key
        for key in changed
        if key not in _ABOUT and not hasattr(known, key) and key not in known.to_dict()
    ]
    if unknown:
        said = ", ".join(f"{key}={given[key]!r}" for key in unknown)
        raise ModelError(
            f"{_where()} does not know what the configuration sets: {said:.300}; leave "
            f"{'it' if len(unknown) == 1 else 'them'} at the default, or {_REMEDY}"
        )


def _renamed(name: str, theirs: Mapping[str, Any]) -> str:
    for ours, other in _RENAMED:
        if name not in theirs and name.endswith(ours):
            return name[: -len(ours)] + other
    return name


def _found_by_shape(
    named: Mapping[str, str], ours: Mapping[str, Any], theirs: Mapping[str, Tensor]
) -> Dict[str, str]:
    """Return the names there; where one of ours and one of theirs of a shape are left, they match.

    Args:
        named: The names that ours should have there.
        ours: Shapes of ours.
        theirs: The parameters there.
    """
    missing = [name for name, there in named.items() if there not in theirs]
    free = [name for name in theirs if name not in named.values()]
    found = dict(named)
    for name in missing:
        shape = list(ours[name]["shape"])
        rivals = [other for other in missing if list(ours[other]["shape"]) == shape]
        fitting = [other for other in free if list(theirs[other].shape) == shape]
        if len(rivals) == len(fitting) == 1:
            found[name] = fitting[0]
    return found


def _check_same(what: str, ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
    for name, about in ours.items():
        other = theirs[name]
        if other is None:
            raise ModelError(_difference(what, name, "is missing in the SDK's model"))
        if list(other.shape) != list(about["shape"]):
            raise ModelError(
                _difference(
                    what, name, f"is {list(about['shape'])} here, {list(other.shape)} there"
                )
            )


def _difference(what: str, name: str, how: str) -> str:
    return f"{what} {name!r} {how} ({_where()}); {_REMEDY}"


def _where() -> str:
    return f"transformers {transformers.__version__} of {sys.executable}"


_REMEDY = (
    "install the transformers there that has it, make the plan with theirs, or train with "
    "target='local' or 'distributed'"
)
