"""Tensors of which a rank of tensor parallelism has a slice, followed while a block is counted.

A model's ``tp_plan`` (transformers) says which weights are cut. What a weight that is cut by its
outputs (``colwise``) makes is a slice, and so is all that is computed from slices, until a weight
that is cut by its inputs (``rowwise``) joins them. In the backward pass it is the other way round.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Iterable, Mapping
from functools import partial

from torch import Tensor, nn
from transformers import PreTrainedModel

from ipu_pipeline.capture.values import storage_key, storage_of

_NUMBER = re.compile(r"\.\d+(?=\.|$)")
_BY_OUTPUTS = frozenset({"colwise", "packed_colwise"})
_BY_INPUTS = frozenset({"rowwise", "packed_rowwise"})


def expanded_plan(model: PreTrainedModel) -> dict[str, str]:
    """Return the style of every module and parameter that the model's ``tp_plan`` names.

    The plan has ``*`` for the numbers of layers, and a module stands for its parameters.
    """
    plan = dict(model.tp_plan or {})
    found: dict[str, str] = {}
    for path, module in model.named_modules():
        style = plan.get(_NUMBER.sub(".*", path))
        for name, _ in module.named_parameters(recurse=False):
            full = f"{path}.{name}".lstrip(".")
            own = plan.get(_NUMBER.sub(".*", full), style)
            if own is not None:
                found[full] = own
        if style is not None:
            found[path] = style
    return found


def cut_styles(model: nn.Module) -> dict[int, str]:
    """Return how ranks of tensor parallelism cut each parameter, by its id; others are whole."""
    found: dict[int, str] = {}
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            styles = expanded_plan(module)
            for name, parameter in module.named_parameters():
                style = styles.get(name, "")
                if style in _BY_OUTPUTS | _BY_INPUTS:
                    found.setdefault(id(parameter), style)
    return found


class CutTensors:
    """Follows slices from operation to operation.

    Args:
        weights: Those that are cut, with their styles.

    Attributes:
        backward: Whether the backward pass runs.
    """

    def __init__(self, weights: Iterable[tuple[Tensor, str]]) -> None:
        self.backward = False
        self._styles: Mapping[int, str] = {storage_key(t): style for t, style in weights}
        self._slices: dict[int, weakref.ref[object]] = {}

    def __contains__(self, tensor: Tensor) -> bool:
        """Whether a rank has a slice of ``tensor`` only."""
        return storage_key(tensor) in self._slices

    def note(self, inputs: Iterable[Tensor], outputs: Iterable[Tensor]) -> None:
        """Follow one operation."""
        if not self._styles:
            return
        given = list(inputs)
        styles = {self._styles.get(storage_key(t), "") for t in given}
        opening, joining = bool(styles & _BY_OUTPUTS), bool(styles & _BY_INPUTS)
        if self.backward:
            opening, joining = joining, opening
        cut = opening or (not joining and any(tensor in self for tensor in given))
        for tensor in outputs:
            key = storage_key(tensor)
            if key in self._styles:
                continue  # a view of a weight
            if cut:
                freed = partial(self._slices.pop, key)
                self._slices[key] = weakref.ref(storage_of(tensor), freed)
            else:
                self._slices.pop(key, None)
