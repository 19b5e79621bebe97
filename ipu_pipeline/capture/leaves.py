"""Choose the leaves: the modules that stay whole while the glue between them is traced.

A *boundary* is a module whose call starts a block. Every strict ancestor of a boundary is glue;
the outermost modules that are not ancestors are leaves.
"""

from __future__ import annotations

from collections.abc import Container, Iterator
from dataclasses import dataclass
from typing import get_args

from torch import nn

from ipu_pipeline.capture.patches import original_model
from ipu_pipeline.errors import CaptureError
from ipu_pipeline.ir.plan import Granularity

# An element is expanded into its own repeated list only when the list is nearly all of it (a Swin
# stage of two blocks and a patch merging: 3 of 4 parameters).
EXPANDED_SHARE = 0.7


@dataclass(frozen=True)
class Leaves:
    """Which modules are kept whole.

    Attributes:
        granularity: How fine the blocks are.
        glue: ids of the modules that are traced through (strict ancestors of boundaries).
        layers: fqns of the elements of repeated lists.
        names: fqn by module id, the first name of a shared module.
    """

    granularity: Granularity
    glue: frozenset[int]
    layers: frozenset[str]
    names: dict[int, str]

    def is_leaf(self, module: nn.Module) -> bool:
        """Whether a call of ``module`` becomes one node."""
        return id(module) in self.names and id(module) not in self.glue

    def starts_block(self, module: nn.Module) -> bool:
        """Whether a call of this leaf starts a block: it has parameters and is no mere norm."""
        if self.names[id(module)] in self.layers:
            return True
        return has_parameters(module) and "norm" not in type(module).__name__.lower()

    def in_layer(self, fqn: str) -> bool:
        """Whether ``fqn`` is an element of a repeated list, or inside one."""
        parts = fqn.split(".")
        return any(".".join(parts[:end]) in self.layers for end in range(1, len(parts) + 1))


def choose_leaves(model: nn.Module, granularity: Granularity = "layer") -> Leaves:
    """Choose the leaves of ``model``.

    Args:
        model: Any module; the elements of its repeated ``ModuleList``s are the layers.
        granularity: ``layer`` keeps those elements whole, ``sublayer`` their children
            (attention, feed-forward), ``op`` the innermost modules with parameters.

    Raises:
        ValueError: The granularity is unknown.
    """
    if granularity not in get_args(Granularity):
        raise ValueError(
            f"granularity {granularity!r} is unknown; use one of {', '.join(get_args(Granularity))}"
        )
    names: dict[int, str] = {id(module): fqn for fqn, module in model.named_modules()}
    layers = frozenset(_layers(model, ""))
    if granularity == "layer":
        boundaries = set(layers)
    elif granularity == "sublayer":
        boundaries = {part for layer in layers for part in _parts(model, layer)}
    else:
        boundaries = {
            fqn
            for fqn, module in model.named_modules()
            if has_parameters(module) and not any(True for _ in module.children())
        }
    glue = {id(model)} | {id(model.get_submodule(fqn)) for fqn in _ancestors(boundaries)}
    if not boundaries:
        glue |= {id(module) for module in _only_children(model)}
    return Leaves(granularity, frozenset(glue), layers, names)


def has_parameters(module: nn.Module) -> bool:
    """Whether ``module`` or a child of it holds a parameter."""
    return next(module.parameters(), None) is not None


def _is_repeated(container: nn.Module, *, uniform: bool = False) -> bool:
    """Whether the children of ``container`` are layers; ``uniform``: they must be of one class."""
    children = list(container.children())
    if not children or not all(has_parameters(child) for child in children):
        return False
    kinds = [type(original_model(child)) for child in children]
    own_classes = not kinds[0].__module__.startswith("torch.")
    one_class = len(set(kinds)) == 1
    if isinstance(container, nn.ModuleList):
        return own_classes and (one_class or not uniform)
    return isinstance(container, nn.Sequential) and own_classes and one_class and len(children) > 1


def _layers(module: nn.Module, prefix: str, *, uniform: bool = False) -> Iterator[str]:
    """Yield the fqns of the elements of the outermost repeated lists, hierarchies expanded."""
    for name, child in module.named_children():
        fqn = f"{prefix}{name}"
        if not _is_repeated(child, uniform=uniform):
            yield from _layers(child, f"{fqn}.", uniform=uniform)
            continue
        for position, element in child.named_children():
            inner = list(_layers(element, f"{fqn}.{position}.", uniform=True))
            yield from inner if _is_hierarchy(element) else [f"{fqn}.{position}"]


def _is_hierarchy(element: nn.Module) -> bool:
    """Whether an element is itself little more than a chain of equal layers (Swin, ConvNeXt)."""
    total = sum(parameter.numel() for parameter in element.parameters())
    for name, child in element.named_modules():
        children = list(child.children())
        if "expert" in name or not _is_repeated(child, uniform=True) or len(children) < 2:
            continue
        share = sum(parameter.numel() for parameter in child.parameters()) / max(total, 1)
        if share >= EXPANDED_SHARE:
            return True
    return False


def _parts(model: nn.Module, layer: str) -> Iterator[str]:
    """Yield the fqns of the children of a layer, looking through lists."""
    for name, child in model.get_submodule(layer).named_children():
        if isinstance(child, nn.ModuleList | nn.ModuleDict | nn.Sequential):
            yield from (f"{layer}.{name}.{inner}" for inner, _ in child.named_children())
        elif has_parameters(child):
            yield f"{layer}.{name}"


def _ancestors(fqns: set[str]) -> set[str]:
    found = set()
    for fqn in fqns:
        parts = fqn.split(".")
        found |= {".".join(parts[:end]) for end in range(len(parts))}
    return found


def _only_children(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the chain of modules below ``model`` as long as there is just one with parameters."""
    while True:
        children = [child for child in model.children() if has_parameters(child)]
        if len(children) != 1:
            return
        model = children[0]
        if not any(True for _ in model.children()):
            return
        yield model


def refuse_other_parameters(module: nn.Module, fqn: str, known: Container[int]) -> None:
    """Refuse a call of a leaf whose parameters have been replaced for the time of the call.

    Args:
        module: The leaf.
        fqn: Its name.
        known: Ids of the parameters that the model has.

    Raises:
        CaptureError: One has (``torch.func.functional_call``).
    """
    for inner, part in module.named_modules():
        for name, parameter in part._parameters.items():
            if parameter is not None and id(parameter) not in known:
                place = ".".join(filter(None, (inner, name)))
                raise CaptureError(
                    f"{fqn!r} is called with another {place!r} than its own "
                    "(torch.func.functional_call, fast weights), which a stage would not see: make "
                    "that call in the forward of a module of its own, with this one inside, or "
                    "compute with torch.nn.functional"
                )
