"""PEFT adapters over a model on ``meta``: the base's files do not know of them.

Files name the parameters of the plain base. LoRA's own parameters get their first values by PEFT's
code; what other adapters compute from weights is not known where these are elsewhere.
"""

from __future__ import annotations

import copy
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from ipu_pipeline.errors import LoweringError

# What PEFT puts into the names of a base's parameters.
_ADDED = re.compile(r"^base_model\.model\.|\.(base_layer|original_module|modules_to_save\.[^.]+)")


def has_adapters(model: nn.Module) -> bool:
    """Whether PEFT has wrapped a model, or layers in it (``model.add_adapter``)."""
    return "peft" in sys.modules and hasattr(model, "peft_config")


def without_adapters(model: nn.Module) -> nn.Module:
    """Return the base of a model with adapters, on ``meta``, as its files know it."""
    from peft import PeftMixedModel, PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    base: Any = model
    if isinstance(model, PeftModel):
        base = model.get_base_model()
    elif isinstance(model, PeftMixedModel):
        base = model.base_model.model
    found: nn.Module = copy.deepcopy(base)
    for path, module in list(found.named_modules()):
        plain: Any = None
        if isinstance(module, BaseTunerLayer):
            plain = module.get_base_layer()
        elif isinstance(module, ModulesToSaveWrapper):
            plain = module.original_module
        if plain is not None:
            parent, _, name = path.rpartition(".")
            setattr(found.get_submodule(parent), name, plain)
    return found


def name_in_base(name: str) -> str:
    """Return what the base calls a parameter; an adapter's own has a name that it does not know."""
    return _ADDED.sub("", name)


def adapter_initializers(model: nn.Module) -> dict[nn.Module, Callable[[nn.Module], object]]:
    """Return what gives adapters their first values, by the layer that has them.

    Raises:
        LoweringError: They are no plain LoRA, are merged into weights, or repeat layers.
    """
    if not has_adapters(model):
        return {}
    from peft.tuners.lora.layer import LoraLayer

    configs: Any = model.peft_config
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    _refuse_computed(configs, layers)

    def reset(layer: Any) -> None:
        for name, config in configs.items():
            if config.init_lora_weights is not False:
                layer.reset_lora_parameters(name, config.init_lora_weights)
                continue
            for parts in (layer.lora_A, layer.lora_B):
                if name in parts:
                    parts[name].reset_parameters()

    return dict.fromkeys(layers, reset)


def _refuse_computed(configs: Any, layers: Sequence[Any]) -> None:
    """Refuse adapters that are no plain LoRA, are merged into weights, or repeat layers."""
    if merged := next((name for layer in layers for name in layer.merged_adapters), ""):
        raise LoweringError(
            f"adapter {merged!r} was merged into weights that have no values, which those of the "
            "base replace; call unmerge_adapter() before, and merge what was trained"
        )
    for name, config in configs.items():
        if getattr(config, "layer_replication", None):
            raise LoweringError(
                f"layer_replication of adapter {name!r} repeats layers under names that the files "
                "of the base do not have; leave it out, or build the model with values"
            )
        start = getattr(config, "init_lora_weights", None)
        known = isinstance(start, bool) or start == "gaussian"
        if config.peft_type != "LORA" or not known or config.use_dora:
            raise LoweringError(
                f"adapter {name!r} ({config.peft_type.value}) is no LoRA that begins with "
                "init_lora_weights True, False or 'gaussian' and without DoRA, and what begins "
                "from weights is not known where these are elsewhere; use such a LoRA, or build "
                "the model with values"
            )
