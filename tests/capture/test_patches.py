"""Every patch of torch and transformers still fits the installed versions."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import nn
from torch._functorch import apis
from torch.nn import functional

from ipu_pipeline.capture.patches import fused_gelu
from tests.tiny_models import TINY


@dataclass(frozen=True)
class Patch:
    """One place in torch or transformers that is replaced for a while.

    Attributes:
        name: What is replaced, as a dotted name.
        reason: Why.
        version: Library and version that it was written against.
        find: Returns the present target.
        parameters: Names of its first parameters; empty for a function without a signature.
    """

    name: str
    reason: str
    version: str
    find: Callable[[], Any]
    parameters: tuple[str, ...] = ()

    def broken(self) -> str:
        """Return why the patch does not fit the installed version; empty when it does."""
        try:
            target = self.find()
        except (AttributeError, KeyError, ImportError) as error:
            return f"{self.name} is gone ({error}); written for {self.version}: {self.reason}"
        if not callable(target) and not isinstance(target, property):
            return f"{self.name} cannot be called; written for {self.version}: {self.reason}"
        if self.parameters:
            found = tuple(inspect.signature(target).parameters)[: len(self.parameters)]
            if found != self.parameters:
                return (
                    f"{self.name} takes {', '.join(found)}, not {', '.join(self.parameters)}; "
                    f"written for {self.version}: {self.reason}"
                )
        return ""


def _function_apply() -> Any:
    return torch.autograd.Function.__dict__["apply"].__func__


PATCHES = (
    Patch(
        "transformers.models.gpt_oss.modeling_gpt_oss.eager_attention_forward",
        "attention with sinks is priced as one operation",
        "transformers 5.23",
        lambda: (
            import_module("transformers.models.gpt_oss.modeling_gpt_oss").eager_attention_forward
        ),
        ("module", "query", "key", "value", "attention_mask", "scaling"),
    ),
    Patch(
        "torch.random.default_generator",
        "a model that seeds torch in its forward pass is refused",
        "torch 2.13",
        lambda: type(torch.random.default_generator).manual_seed,
    ),
    Patch(
        "torch.nn.Module._call_impl",
        "a call of a leaf becomes one node; hooks run inside it",
        "torch 2.13",
        lambda: nn.Module.__dict__["_call_impl"],
    ),
    Patch(
        "torch.nn.Module.__call__",
        "the same of a model that holds compiled modules",
        "torch 2.13",
        lambda: nn.Module.__dict__["__call__"],
    ),
    Patch(
        "torch.autograd.Function.apply",
        "a function with its own backward pass is one node, never traced through",
        "torch 2.13",
        _function_apply,
        ("cls", "args", "kwargs"),
    ),
    Patch(
        "torch._functorch.apis.vmap_impl",
        "vmap(f)(x) is one node: its batched tensors exist only inside",
        "torch 2.13",
        lambda: vars(apis)["vmap_impl"],
        ("func", "in_dims", "out_dims", "randomness", "chunk_size", "args"),
    ),
    Patch(
        "torch.nn.functional.scaled_dot_product_attention",
        "attention is counted as one operation on every device",
        "torch 2.13",
        lambda: functional.scaled_dot_product_attention,
    ),
    Patch(
        "transformers.utils.import_utils.is_tracing",
        "masks must not depend on the values of the example batch",
        "transformers 5.23",
        lambda: import_module("transformers.utils.import_utils").is_tracing,
        ("tensor",),
    ),
    Patch(
        "transformers.activations.NewGELUActivation.forward",
        "a GELU of eight operations is one in a training step",
        "transformers 5.23",
        lambda: import_module("transformers.activations").NewGELUActivation.forward,
        ("self", "input"),
    ),
    Patch(
        "transformers.activations.FastGELUActivation.forward",
        "the same of another form of it",
        "transformers 5.23",
        lambda: import_module("transformers.activations").FastGELUActivation.forward,
        ("self", "input"),
    ),
    Patch(
        "transformers.masking_utils.find_packed_sequence_indices",
        "a model with a cache does not look for packed rows; the cache is off in a capture",
        "transformers 5.23",
        lambda: import_module("transformers.masking_utils").find_packed_sequence_indices,
        ("position_ids",),
    ),
    Patch(
        "torch.nn.functional.grouped_mm",
        "the product of experts takes only bfloat16 on tensors without data",
        "torch 2.13",
        lambda: functional.grouped_mm,
        ("mat_a", "mat_b"),
    ),
)


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.name)
def test_its_target_is_what_it_was_written_for(patch: Patch) -> None:
    assert not patch.broken()
    assert patch.reason
    assert patch.version.split()[0] in ("torch", "transformers")


def test_a_changed_target_is_named() -> None:
    def changed(first: int, third: int) -> int:
        return first + third

    patch = Patch("torch.x", "it does so", "torch 2.13", lambda: changed, ("first", "second"))
    assert patch.broken() == (
        "torch.x takes first, third, not first, second; written for torch 2.13: it does so"
    )
    gone = Patch("torch.y", "it does so", "torch 2.13", lambda: nn.Module.no_such_name)
    assert gone.broken().startswith("torch.y is gone (")
    number = Patch("torch.z", "it does so", "torch 2.13", lambda: 3)
    assert number.broken().startswith("torch.z cannot be called")


@pytest.mark.parametrize("name", ["NewGELUActivation", "FastGELUActivation"])
def test_a_gelu_is_torchs_where_numbers_are_wide(name: str) -> None:
    written = getattr(import_module("transformers.activations"), name)()
    x = torch.linspace(-9, 9, 1001, dtype=torch.float64, requires_grad=True)
    plain = written(x)
    (slope,) = torch.autograd.grad(plain.sum(), x)
    with fused_gelu, ThreadPoolExecutor(1) as threads:
        assert threads.submit(_entered_and_left).result() == ""  # it stays until the last has left
        fused = written(x)
        assert type(fused.grad_fn).__name__ == "GeluBackward0"
        torch.testing.assert_close(torch.autograd.grad(fused.sum(), x)[0], slope)
        torch.testing.assert_close(fused, plain)
        narrow = x.detach().bfloat16()
        inside = written(narrow)
    assert inside.equal(written(narrow))
    assert written(x).equal(plain)


def _entered_and_left() -> str:
    with fused_gelu:
        return ""


def test_patches_are_undone() -> None:
    from ipu_pipeline.capture import capture

    before = [patch.find() for patch in PATCHES]
    assert capture(*TINY["mixtral"].build(device="meta")).graph.blocks
    assert all(patch.find() is old for patch, old in zip(PATCHES, before, strict=True))
