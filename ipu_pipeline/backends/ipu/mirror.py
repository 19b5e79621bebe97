"""The user's model and its copy in the worker: described, compared, kept equal.

The worker builds the model from its class and configuration and gets the weights by name. Both
then compute one sample: what two versions of transformers do not compute alike is refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from ipu_pipeline.backends.ipu.runtime.device import synthetic_data
from ipu_pipeline.errors import LoweringError
from ipu_pipeline.ir.plan import Plan

# Relative to the largest value of a tensor: other kernels sum in another order.
_TOLERANCE = 1e-4
_TOLERANCE_HALF = 2e-2


def described(model: nn.Module) -> dict[str, Any]:
    """Return what the worker builds the model from: class, configuration, parameters, buffers.

    Raises:
        LoweringError: It cannot be built again: no configuration, no module that can be imported.
    """
    config = getattr(model, "config", None)
    kind = type(model)
    if not isinstance(config, PretrainedConfig):
        raise LoweringError(
            f"{kind.__name__} has no transformers configuration, from which the worker under the "
            "SDK's Python builds it again; derive it from PreTrainedModel, or use target='local'"
        )
    for cls in (kind, type(config)):
        if cls.__module__ == "__main__" or "<locals>" in cls.__qualname__:
            raise LoweringError(
                f"{cls.__qualname__} is defined in {cls.__module__!r}, where the worker under the "
                "SDK's Python cannot import it; define it at the top of a module on PYTHONPATH"
            )
    _refuse_forward_hooks(model)
    elsewhere = {str(p.device) for p in model.parameters()} - {"cpu"}
    if elsewhere:
        raise LoweringError(
            f"the model has parameters on {', '.join(sorted(elsewhere))}; the worker is sent its "
            "weights from memory: load them, and call model.cpu()"
        )
    return {
        "model": {
            "class": kind.__qualname__,
            "module": kind.__module__,
            "config": config.to_json_string(use_diff=False),
            "config_class": type(config).__qualname__,
            "config_module": type(config).__module__,
            "changed": _changed_keys(config),
            "attention": _attention(config),
        },
        "parameters": _parameters(model),
        "buffers": {
            name: {"shape": list(value.shape), "dtype": _dtype(value)}
            for name, value in kept_buffers(model).items()
        },
    }


def kept_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Return the buffers that are in the state dict."""
    saved = {
        f"{path}.{name}" if path else name
        for path, module in model.named_modules()
        for name in module._buffers.keys() - module._non_persistent_buffers_set
    }
    return {name: value for name, value in model.named_buffers() if name in saved}


class HostWeights:
    """The weights here, and which of them were changed since both sides had the same.

    Args:
        model: The user's model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._seen: dict[str, tuple[int, int]] = {}
        self._trained = [p.requires_grad for p in model.parameters()]

    def tensors(self) -> dict[str, Tensor]:
        """Return parameters, each once, and saved buffers by name."""
        return {**dict(self._model.named_parameters()), **kept_buffers(self._model)}

    def changed(self) -> dict[str, Tensor]:
        """Return what differs in identity or version from :meth:`same`.

        Raises:
            LoweringError: Other parameters are trained than when the model was compiled.
        """
        if [p.requires_grad for p in self._model.parameters()] != self._trained:
            raise LoweringError(
                "requires_grad of a parameter was changed after compile(); close this executable "
                "and compile the model again"
            )
        return {n: v for n, v in self.tensors().items() if self._seen.get(n) != _version(v)}

    def same(self) -> None:
        """Note that both sides have the same weights now."""
        self._seen = {name: _version(value) for name, value in self.tensors().items()}

    def forget(self) -> None:
        """Count every weight as changed."""
        self._seen = {}

    def take(self, pages: Iterator[tuple[str, Tensor]]) -> None:
        """Copy the worker's weights into the model: all, or none where the worker dies."""
        arrived = [(name, value.clone()) for name, value in pages]
        here = self.tensors()
        with torch.no_grad():
            for name, value in arrived:
                here[name].copy_(value)
        self.same()


def host_outputs(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the tensors that ``model`` computes here, in evaluation mode and without gradients."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            output = model(**batch)
    finally:
        for module, mode in modes:
            module.training = mode
    return {name: value for name, value in output.items() if isinstance(value, Tensor)}


def sample_of(plan: Plan, model: nn.Module) -> dict[str, Tensor]:
    """Return one made-up microbatch in the shapes of the plan.

    No row is masked in full, and no label is the padding token: what is made of such a label (CTC
    takes it for its blank) differs between versions of transformers, and nobody trains on it.
    """
    inputs = [{"name": i.name, "shape": i.shape, "dtype": i.dtype} for i in plan.graph.inputs]
    sample = synthetic_data(inputs, plan.micro_batch_size, seed=0)
    padding = getattr(getattr(model, "config", None), "pad_token_id", None)
    floating = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    for name, value in sample.items():
        if value.is_floating_point():
            sample[name] = value.to(floating)
        if "mask" in name and value.ndim > 1:
            value[:, 0] = 1
        if "label" in name and padding in (0, 1) and not value.is_floating_point():
            value[value == padding] = 1 - padding
    return sample


def check_labels(model: nn.Module, batch: Mapping[str, Any]) -> None:
    """Refuse labels that versions of transformers read differently.

    Raises:
        LoweringError: Labels of a CTC model hold the padding token, which is its blank.
    """
    labels = batch.get("labels")
    is_ctc = any("ForCTC" in kind.__name__ for kind in type(model).__mro__)
    if is_ctc and isinstance(labels, Tensor):
        blank = getattr(model.config, "pad_token_id", None)
        if blank is not None and bool(labels.eq(blank).any()):
            raise LoweringError(
                f"labels hold {blank}, the padding token and the blank of the CTC loss, which "
                "versions of transformers count or leave out; pad labels with -100"
            )


def compare(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], versions: str) -> None:
    """Compare what both sides computed for one sample.

    Raises:
        LoweringError: A tensor differs by more than rounding, or they share none.
    """
    both = [name for name in ours if name in theirs]
    if not both:
        raise LoweringError(
            f"the model returns {', '.join(ours)} here and {', '.join(theirs)} under {versions}; "
            "use a version of transformers there that returns the same"
        )
    for name in both:
        left, right = ours[name].float(), theirs[name].float()
        half = ours[name].dtype in (torch.float16, torch.bfloat16)
        tolerance = _TOLERANCE_HALF if half else _TOLERANCE
        same_shape = left.shape == right.shape
        room = tolerance * max(1.0, float(left.abs().nan_to_num().max())) if left.numel() else 0.0
        if not same_shape or not torch.allclose(left, right, rtol=0, atol=room, equal_nan=True):
            how = (
                f"up to {float((left - right).abs().max()):.3g} apart"
                if same_shape
                else (f"of shape {tuple(left.shape)} here, {tuple(right.shape)} there")
            )
            raise LoweringError(
                f"the model computes another {name!r} here than under {versions}, {how}, with the "
                "same weights and inputs; install the transformers there that computes the same, "
                "or train with target='local' or 'distributed'"
            )


def _version(tensor: Tensor) -> tuple[int, int]:
    return id(tensor), 0 if tensor.is_inference() else tensor._version


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _parameters(model: nn.Module) -> dict[str, Any]:
    first: dict[int, str] = {}
    return {
        name: {
            "shape": list(value.shape),
            "dtype": _dtype(value),
            "trained": value.requires_grad,
            "same_as": first.setdefault(id(value), name),
        }
        for name, value in model.named_parameters(remove_duplicate=False)
    }


def _changed_keys(config: PretrainedConfig) -> list[str]:
    """Return the keys of the class whose values are no defaults and follow from no others."""
    given = _as_json(config)
    try:
        known: Any = type(config)()
    except Exception:  # a class that cannot be made without arguments
        known = config
    return [k for k in given if hasattr(known, k) and not _is_implied(config, given, k)]


def _is_implied(config: PretrainedConfig, given: Mapping[str, Any], key: str) -> bool:
    try:
        without = type(config).from_dict({k: v for k, v in given.items() if k != key})
    except Exception:  # it needs the key, or checks it against others
        return False
    found = _as_json(without)
    return key in found and found[key] == given[key]


def _as_json(config: PretrainedConfig) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    return found


def _attention(config: PretrainedConfig) -> str | None:
    found = getattr(config, "_attn_implementation", None)
    return found if isinstance(found, str) else None


def _refuse_forward_hooks(model: nn.Module) -> None:
    hooked = [
        name
        for name, module in model.named_modules()
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
        if not (hook.__module__ or "").startswith("transformers.")  # it has them there, too
    ]
    if hooked:
        raise LoweringError(
            f"{hooked[0] or type(model).__name__!r} has a forward hook, which stays in this "
            "process while the model runs in another one; remove the hook, or use target='local'"
        )
