"""Which classes there are, and how a model's configuration names them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ipu_pipeline.errors import DatasetError, shown

# As text: a negative number, or a fraction ("2.0" is a class that a table of floats wrote).
_NO_CLASS = re.compile(r"-\d+(\.\d+)?|\d*\.\d*[1-9]\d*")


def class_name(value: Any, where: str) -> str:
    """Return a label as text.

    Raises:
        DatasetError: It is a fraction, a negative number (no label) or nothing.
    """
    known = isinstance(value, (str, int)) and value != ""
    of_csv = isinstance(value, str) and _NO_CLASS.fullmatch(value) is not None
    if not known or of_csv or (isinstance(value, int) and value < 0):
        raise DatasetError(
            f"{where} has label {shown(value)}; a class is a name or a number from 0 on (numbers "
            "to predict, and samples without label, are not supported)"
        )
    return str(value)


def number_of(label: str, classes: Sequence[str], where: str) -> int:
    """Return the number of a class.

    Raises:
        DatasetError: There is no class of that name.
    """
    if label not in classes:
        raise DatasetError(
            f"{where} has label {shown(label)}, the classes are {shown(classes)}; train on data "
            "with this label, or remove the sample"
        )
    return classes.index(label)


def order_classes(names: Iterable[str]) -> tuple[str, ...]:
    """Return the different names in the order of their numbers: by value, else alphabetically."""
    different = set(names)
    if all(name.isdecimal() for name in different):
        return tuple(sorted(different, key=lambda name: (len(name.lstrip("0")), name.lstrip("0"))))
    return tuple(sorted(different))


def choose_classes(
    names: Mapping[str, Iterable[str]], known: Mapping[str, int] | None = None
) -> tuple[str, ...]:
    """Return the classes in the order of their numbers.

    Args:
        names: Labels of every split; those of ``train`` are the classes to learn.
        known: Names and numbers of the model's configuration. They stay as they are if the data
            has no other class, so that a trained model is evaluated, or trained further.

    Raises:
        DatasetError: There is nothing to train on, and the model does not know these classes; or
            there are fewer than 2 classes.
    """
    found = {split: set(labels) for split, labels in names.items()}
    every = set().union(*found.values())
    if known is not None and every <= set(known):
        return tuple(sorted(known, key=lambda name: known[name]))
    if "train" not in found:
        raise DatasetError(
            f"the data has classes {_shown(every)} and the model knows {_shown(known or ())}; "
            "evaluate a model that was trained on these classes, or train"
        )
    if len(found["train"]) < 2:
        raise DatasetError(
            f"the training data has one class only, {_shown(found['train'])}; nothing can be "
            "learned from it"
        )
    return order_classes(found["train"])


def label_config(labels: tuple[str, ...]) -> dict[str, Any]:
    """Return what a model's configuration says about ``labels``; empty without labels."""
    if not labels:
        return {}
    return {
        "num_labels": len(labels),
        "id2label": dict(enumerate(labels)),
        "label2id": {name: number for number, name in enumerate(labels)},
    }


def _shown(names: Iterable[str], limit: int = 8) -> str:
    ordered = order_classes(names)
    more = ", ..." if len(ordered) > limit else ""
    return ", ".join(f"{name:.40}" for name in ordered[:limit]) + more or "none"
