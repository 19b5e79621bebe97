"""Count what a block does: every tensor operation of its forward and backward pass.

The block's program runs once on tensors without data (fake, or meta for a meta model), watched
by a dispatch mode; FLOPs follow torch's own formulas (``torch.utils.flop_counter``).
"""

from __future__ import annotations

import contextlib
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ipu_pipeline.capture.flops import count_flops, countable
from ipu_pipeline.capture.guards import unguarded
from ipu_pipeline.capture.meta import TensorMeta
from ipu_pipeline.capture.programs import Program
from ipu_pipeline.capture.signature import program_signature
from ipu_pipeline.capture.storage import storage_key
from ipu_pipeline.ir.graph import OpKind, OpRecord

_KINDS: tuple[tuple[OpKind, tuple[str, ...]], ...] = (
    ("gather", ("embedding", "gather", "index_select", "index", "take")),
    ("scatter", ("embedding_dense_backward", "scatter", "index_put", "index_add")),
    ("softmax", ("softmax", "nll_loss", "logsumexp")),
    ("norm", ("norm",)),
    ("random", ("bernoulli", "dropout", "rand", "normal", "uniform")),
    ("copy", ("clone", "copy", "cat", "stack", "contiguous", "_to_copy", "constant_pad_nd")),
)


@dataclass(frozen=True)
class Operations:
    """What one run of a block did.

    Attributes:
        forward: Operations of the forward pass.
        backward: Operations of the backward pass.
        saved_bytes: Bytes kept for the backward pass, without parameters and block inputs.
        workspace_bytes: Largest output of one operation.
    """

    forward: tuple[OpRecord, ...]
    backward: tuple[OpRecord, ...]
    saved_bytes: int
    workspace_bytes: int


class OperationCounter:
    """Counts the operations of programs; equal programs are run once.

    Args:
        specs: Description of every value by name.
        example_values: Gives real values, for blocks whose code depends on them.
        training: Whether a backward pass is wanted.
        on_meta: The model lives on the meta device.
    """

    def __init__(
        self,
        specs: Mapping[str, TensorMeta],
        example_values: Callable[[], Mapping[str, Any]],
        *,
        training: bool,
        on_meta: bool,
    ) -> None:
        self.specs = specs
        self.example_values = lru_cache(maxsize=1)(example_values)
        self.training = training
        self.on_meta = on_meta
        self._known: dict[Any, Operations] = {}

    def count(self, program: Program) -> Operations:
        """Return the operations of ``program``."""
        signature = program_signature(program, self.specs)
        if signature not in self._known:
            self._known[signature] = self._run(program)
        return self._known[signature]

    def _run(self, program: Program) -> Operations:
        if self.on_meta:
            return self._watch(program, contextlib.nullcontext(), "meta")
        try:
            return self._watch(program, FakeTensorMode(allow_non_fake_inputs=True), "cpu")
        except RuntimeError:  # code inside the block depends on values: give it real ones
            return self._watch(program, contextlib.nullcontext(), "cpu")

    def _watch(self, program: Program, mode: Any, device: str) -> Operations:
        module = program.module
        quiet = logging.getLogger("torch._subclasses.fake_tensor")
        real = device == "cpu" and not isinstance(mode, FakeTensorMode)
        watcher = _Watcher()
        with (
            countable(module),
            unguarded(module),
            mock.patch.object(quiet, "disabled", new=True),
            mode,
            torch.random.fork_rng(devices=[]),
            torch.set_grad_enabled(self.training),
        ):
            state = {
                name: tensor if real else _empty(TensorMeta.of(tensor), device)
                for name, tensor in [*module.named_parameters(), *module.named_buffers()]
            }
            if real:
                state = {n: t.detach().clone().requires_grad_(t.requires_grad)
                         for n, t in state.items()}  # fmt: skip
            inputs = [self._input(name, device, real=real) for name in program.inputs]
            own = {storage_key(tensor) for tensor in [*state.values(), *inputs]}
            saved: dict[int, int] = {}

            def pack(tensor: Tensor) -> Tensor:
                if storage_key(tensor) not in own:
                    saved[storage_key(tensor)] = tensor.untyped_storage().nbytes()
                return tensor

            with watcher, torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
                outputs = torch.func.functional_call(module, state, tuple(inputs))
            forward = watcher.take()
            if self.training:
                with watcher:
                    _backward(outputs, [*state.values(), *inputs])
            return Operations(forward, watcher.take(), sum(saved.values()), watcher.largest)

    def _input(self, name: str, device: str, *, real: bool) -> Any:
        spec = self.specs[name]
        if not real:
            return _empty(spec, device)
        return self.example_values()[name].detach().clone().requires_grad_(spec.requires_grad)


def _empty(spec: TensorMeta, device: str) -> Tensor:
    tensor = torch.empty(spec.shape, dtype=getattr(torch, spec.dtype), device=device)
    return tensor.requires_grad_(spec.requires_grad)


def _backward(outputs: Sequence[Any], leaves: Sequence[Tensor]) -> None:
    roots = [t for t in outputs if isinstance(t, Tensor) and t.requires_grad]
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    if roots and wanted:
        gradients = [torch.ones_like(root) for root in roots]
        torch.autograd.grad(roots, wanted, gradients, allow_unused=True)


class _Watcher(TorchDispatchMode):
    """Records every operation that moves data."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0
        self._counts: Counter[OpRecord] = Counter()

    def take(self) -> tuple[OpRecord, ...]:
        """Return what was recorded since the last call."""
        records = tuple(replace(op, count=number) for op, number in self._counts.items())
        self._counts.clear()
        return records

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        returns = func._schema.returns
        is_view = bool(returns) and all(
            value.alias_info is not None and not value.alias_info.is_write for value in returns
        )
        outputs = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        if not is_view and outputs:
            self._note(func, args, kwargs, result, outputs)
        return result

    def _note(
        self, func: Any, args: Any, kwargs: Any, result: Any, outputs: Sequence[Tensor]
    ) -> None:
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        flops = count_flops(func.overloadpacket, args, kwargs, result)
        name = str(func.overloadpacket)
        written = sum(_num_bytes(t) for t in outputs)
        self.largest = max(self.largest, written)
        record = OpRecord(
            name=name,
            kind=_kind(name, flops),
            dtype=str(outputs[0].dtype).removeprefix("torch."),
            shapes=tuple(tuple(t.shape) for t in inputs),
            flops=flops,
            bytes_moved=written + sum(_num_bytes(t) for t in inputs),
        )
        self._counts[record] += 1


def _num_bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _kind(name: str, flops: int) -> OpKind:
    if flops:
        return "matmul"
    short = name.split(".")[-1]
    if "dense_backward" in short:
        return "scatter"
    return next((kind for kind, words in _KINDS if any(word in short for word in words)), "vector")
