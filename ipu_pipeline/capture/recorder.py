"""Records the operations of a block as they run, and which memory is alive meanwhile.

Slices of tensor parallelism are followed on the way. A model's ``tp_plan`` (transformers) says
which weights are cut. What a weight that is cut by its outputs (``colwise``) makes is a slice, and
so is all that is computed from slices, until a weight that is cut by its inputs (``rowwise``) joins
them. In the backward pass it is the other way round.
"""

from __future__ import annotations

import contextlib
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from ipu_pipeline.capture.values import storage_key, storage_of
from ipu_pipeline.ir.graph import OpKind, OpRecord

BY_OUTPUTS = frozenset({"colwise", "packed_colwise"})
BY_INPUTS = frozenset({"rowwise", "packed_rowwise"})
_KINDS: tuple[tuple[OpKind, tuple[str, ...]], ...] = (
    ("gather", ("embedding", "gather", "index_select", "index", "take")),
    ("scatter", ("embedding_dense_backward", "scatter", "index_put", "index_add")),
    ("softmax", ("softmax", "nll_loss", "logsumexp")),
    ("norm", ("norm",)),
    ("random", ("bernoulli", "dropout", "rand", "normal", "uniform")),
    ("copy", ("clone", "copy", "cat", "stack", "contiguous", "_to_copy", "constant_pad_nd")),
)


def count_flops(operation: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> int:
    """Return the FLOPs of one ATen call (a multiply-add is 2); 0 where no formula is known."""
    formula = flop_registry.get(operation)
    return int(formula(*args, **kwargs, out_val=result)) if formula else 0


class LiveBytes:
    """Adds up living storages, except those of ``apart``, which are counted elsewhere."""

    def __init__(self, apart: Iterable[Tensor]) -> None:
        self.now = 0
        self.peak = 0
        # Held, not only their keys: the key of a freed storage is given to a new one.
        self._apart = {storage_key(t): t.untyped_storage() for t in apart}
        self._alive: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def note(self, tensors: Iterable[Tensor]) -> None:
        """Count the storages of ``tensors`` that are new."""
        for tensor in tensors:
            storage = storage_of(tensor)
            key = int(storage._cdata)
            if key not in self._apart and key not in self._alive:
                self._add(key, storage)
        self.peak = max(self.peak, self.now)

    def take_peak(self) -> int:
        """Return the peak and start again from what is alive now."""
        peak, self.peak = self.peak, self.now
        return peak

    def keys(self) -> Iterable[int]:
        """Return the keys of the storages that are counted."""
        return self._alive.keys()

    def is_apart(self, tensor: Tensor) -> bool:
        """Whether ``tensor`` is, or is a view of, one that is counted elsewhere."""
        return storage_key(tensor) in self._apart

    def _add(self, key: int, storage: torch.UntypedStorage) -> None:
        num_bytes = int(storage.nbytes())

        def gone(_: object) -> None:
            self.now -= num_bytes
            del self._alive[key]

        self._alive[key] = weakref.ref(storage, gone)
        self.now += num_bytes


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
        opening, joining = bool(styles & BY_OUTPUTS), bool(styles & BY_INPUTS)
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


class OtherDeviceError(Exception):
    """On another device other operations may run."""


class Recorder(TorchDispatchMode):
    """Records every operation that moves data, and which storages are alive.

    What is added to ``gradients``, those of the parameters, is work of the optimizer step.
    ``only_meta``: A tensor that is not on meta is an error: on a device, none would be moved.

    Attributes:
        live: Storages that are alive.
        cuts: Those of tensor parallelism.
        whole_peak: Most bytes alive at one time that are no slices.
    """

    def __init__(
        self,
        live: LiveBytes,
        gradients: Sequence[Tensor],
        cuts: CutTensors,
        *,
        only_meta: bool = False,
    ) -> None:
        super().__init__()
        self.live, self.cuts, self.whole_peak = live, cuts, 0
        self._slices = LiveBytes([])
        self.only_meta = only_meta
        self._recording = True
        self._gradients = {storage_key(gradient) for gradient in gradients}
        self._counts: Counter[OpRecord] = Counter()

    @contextlib.contextmanager
    def unrecorded(self) -> Iterator[None]:
        """Only follow storages."""
        self._recording = False
        try:
            yield
        finally:
            self._recording = True

    def record(self, op: OpRecord) -> None:
        """Count one operation."""
        self._counts[op] += 1

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
        self._check(outputs)
        recorded = not is_view and outputs and self._recording
        if recorded and storage_key(outputs[0]) not in self._gradients:
            self._note(func, args, kwargs, result, outputs)
        self.follow([t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)], outputs)
        return result

    def follow(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        """Note what an operation made."""
        self.live.note(outputs)
        self.cuts.note(inputs, outputs)
        self._slices.note(t for t in outputs if t in self.cuts and not self.live.is_apart(t))
        if self._recording:  # else what they are is noted next
            self.whole_peak = max(self.whole_peak, self.live.now - self._slices.now)

    def _note(
        self, func: Any, args: Any, kwargs: Any, result: Any, outputs: Sequence[Tensor]
    ) -> None:
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        self._check(inputs)
        flops = count_flops(func.overloadpacket, args, kwargs, result)
        name = str(func.overloadpacket)
        written = sum(_num_bytes(t) for t in outputs)
        record = OpRecord(
            name=name,
            kind=_kind(name, flops),
            dtype=str(outputs[0].dtype).removeprefix("torch."),
            shapes=tuple(tuple(t.shape) for t in inputs),
            flops=flops,
            bytes_moved=written + sum(_num_bytes(t) for t in inputs),
        )
        self.record(record)

    def _check(self, tensors: Sequence[Tensor]) -> None:
        if self.only_meta and not all(tensor.is_meta for tensor in tensors):
            raise OtherDeviceError


def _num_bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _kind(name: str, flops: int) -> OpKind:
    if flops:
        return "matmul"
    short = name.split(".")[-1]
    if "dense_backward" in short:
        return "scatter"
    return next((kind for kind, words in _KINDS if any(word in short for word in words)), "vector")
