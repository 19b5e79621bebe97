"""Storage of options: type rule, frozen state, refusal of undeclared names."""

from __future__ import annotations

from typing import Any


class OptionsDict:
    """A group of options that can be frozen.

    A new value must be an instance of the type of the present value; ``None`` as the present
    value accepts anything. Attributes that were not declared cannot be set.
    """

    def __init__(self, **defaults: Any) -> None:
        object.__setattr__(self, "_values", dict(defaults))
        object.__setattr__(self, "_frozen", False)

    def set(self, **values: Any) -> None:
        """Store values under their declared names.

        Raises:
            AttributeError: The options are frozen.
            AssertionError: An undeclared name, or a value of another type.
        """
        self.checkIsFrozen()
        for name, value in values.items():
            require(name in self._values, f"Unknown option {name}")
            present = self._values[name]
            if present is not None:
                require_type(value, type(present), f"option {name}")
            self._values[name] = value

    def checkIsFrozen(self) -> None:
        """Raise AttributeError when the options are in use by a model or a loader."""
        if self._frozen:
            raise AttributeError("Can't modify frozen Options")

    def _groups(self) -> dict[str, OptionsDict]:
        return {}

    def _freeze(self, frozen: bool = True) -> None:
        object.__setattr__(self, "_frozen", frozen)
        for group in self._groups().values():
            group._freeze(frozen)

    def toDict(self) -> dict[str, Any]:
        """Return the values as the back end gets them."""
        return dict(self._values)

    def __getattr__(self, name: str) -> Any:
        values = self.__dict__.get("_values")
        if values is not None and name in values:
            return values[name]
        raise AttributeError(f"{type(self).__name__} has no option {name}")

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self._values:
            self.set(**{name: value})
        elif name.startswith("_"):
            raise AttributeError(f"{type(self).__name__} has no private attribute {name}")
        else:
            self.checkIsFrozen()
            raise AssertionError(
                f"{type(self).__name__}.{name} is not an option; call the setter of that name"
            )

    def __getstate__(self) -> dict[str, Any]:
        return dict(self.__dict__)

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            object.__setattr__(self, name, value)


def setter(option: str, doc: str, *default: Any) -> Any:
    """Return a method that stores its argument and returns its object.

    Args:
        option: Declared name of what it sets.
        doc: Docstring of the method.
        default: Of the argument, where it has one.
    """

    def method(self: OptionsDict, value: Any) -> OptionsDict:
        self.set(**{option: value})
        return self

    method.__doc__ = doc
    method.__defaults__ = default or None
    return method


def require(condition: bool, message: str) -> None:
    """Raise what the front end's own checks raise; works under ``python -O`` too.

    Raises:
        AssertionError: ``condition`` is false.
    """
    if not condition:
        raise AssertionError(message)


def require_type(value: Any, kind: Any, what: str) -> None:
    """Refuse a value of another type.

    Raises:
        AssertionError: ``value`` is not an instance of ``kind``.
    """
    require(isinstance(value, kind), f"Unexpected type {type(value)} for {what}. Expected {kind}")


def merge(target: dict[str, Any], values: dict[str, Any]) -> None:
    """Add ``values`` to ``target``; a key of two groups is refused.

    Raises:
        AssertionError: A key appears twice.
    """
    twice = sorted(set(target) & set(values))
    require(not twice, f"Options set twice, by two groups of options: {', '.join(twice)}")
    target.update(values)
