"""Count what a block does: every tensor operation of its forward and backward pass.

The block's program runs once on tensors without data (fake, or meta for a meta model), recorded
by a dispatch mode; FLOPs follow torch's own formulas (``torch.utils.flop_counter``).
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from ipu_pipeline.capture.fused import CountedAttention, attention_window, grouped_without_values
from ipu_pipeline.capture.patches import without_gradient_hooks
from ipu_pipeline.capture.places import restored_places
from ipu_pipeline.capture.programs import Program, program_signature
from ipu_pipeline.capture.python_state import PythonState
from ipu_pipeline.capture.reads import unguarded
from ipu_pipeline.capture.recorder import CutTensors, LiveBytes, OtherDeviceError, Recorder
from ipu_pipeline.capture.state import values_of
from ipu_pipeline.capture.values import TensorMeta, storage_key
from ipu_pipeline.errors import CaptureError
from ipu_pipeline.ir.graph import OpRecord
from ipu_pipeline.ops.autocast import autocast_dtype


@dataclass(frozen=True)
class Operations:
    """What one run of a block did.

    Attributes:
        forward: Operations of the forward pass.
        backward: Operations of the backward pass.
        saved_bytes: Bytes kept for the backward pass, without parameters and block inputs.
        cut_bytes: Those of them that ranks of tensor parallelism have slices of.
        whole_peak_bytes: Most bytes alive at one time of all else, as ``peak_bytes``.
        peak_bytes: Most bytes alive at one time in either pass, without parameters, their
            gradients, and block inputs.
        output_bytes: Bytes that each output adds to ``saved_bytes`` while it is alive.
        keeps_inputs: Whether each input is kept for the backward pass.
    """

    forward: tuple[OpRecord, ...]
    backward: tuple[OpRecord, ...]
    saved_bytes: int
    peak_bytes: int
    output_bytes: tuple[int, ...]
    keeps_inputs: tuple[bool, ...]
    cut_bytes: int = 0
    whole_peak_bytes: int = 0


class OperationCounter:
    """Counts the operations of programs, in training backward as well; equal ones are run once.

    Blocks whose code depends on values get real ones, from ``example_values``.
    """

    def __init__(
        self,
        specs: Mapping[str, TensorMeta],
        example_values: Callable[[], Mapping[str, Any]],
        *,
        training: bool,
        on_meta: bool,
        styles: Mapping[int, str] | None = None,
    ) -> None:
        self.specs = specs
        self.styles = styles or {}
        self.example_values = lru_cache(maxsize=1)(example_values)
        self.training = training
        self.on_meta = on_meta
        self._known: dict[Any, Operations] = {}

    def count(self, program: Program) -> Operations:
        """Return the operations of ``program``."""
        cut = tuple(self.styles.get(id(p), "") for p in program.module.parameters())
        window = attention_window(program.module)
        signature = program_signature(program, self.specs), window, cut
        if signature not in self._known:
            with restored_places(program.module), without_gradient_hooks(program.module):
                self._known[signature] = self._counted(program)
        return self._known[signature]

    def _run(self, program: Program, mode: Any, device: str, *, strict: bool = False) -> Operations:
        python, changing = PythonState(program.module.modules()), program.changing.values()
        # What runs again inside a backward pass (reentrant checkpoints) uses the parameters.
        gradients = [(parameter, parameter.grad) for parameter in program.module.parameters()]
        try:
            with values_of(changing, [tensor.detach().clone() for tensor in changing]):
                return self._count_on(program, mode, device, strict=strict)
        finally:
            python.restore()
            for parameter, gradient in gradients:
                parameter.grad = gradient

    def _counted(self, program: Program) -> Operations:
        if not any(isinstance(module, _CHOOSE_BY_DEVICE) for module in program.module.modules()):
            # Three times as fast as fake tensors; where anything depends on the device, it fails.
            with contextlib.suppress(Exception):
                return self._run(program, contextlib.nullcontext(), "meta", strict=True)
        try:
            return self._run(program, FakeTensorMode(allow_non_fake_inputs=True), "cpu")
        except RuntimeError:  # code inside the block depends on values: give it real ones
            device = "meta" if self.on_meta else "cpu"
        try:
            return self._run(program, contextlib.nullcontext(), device)
        except RuntimeError as error:
            if torch.autograd.grad not in {node.target for node in program.module.graph.nodes}:
                raise
            raise CaptureError(
                f"the code between the blocks takes a gradient (torch.autograd.grad in block "
                f"{program.name!r}) through other blocks, which may be in other stages; take it in "
                "a block that calls these layers itself"
            ) from error

    def _count_on(self, program: Program, mode: Any, device: str, *, strict: bool) -> Operations:
        module = program.module
        quiet = logging.getLogger("torch._subclasses.fake_tensor")
        real = device == "cpu" and not isinstance(mode, FakeTensorMode)
        with (
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
            cuts = CutTensors(
                (state[name], self.styles[id(parameter)])
                for name, parameter in module.named_parameters()
                if id(parameter) in self.styles
            )
            return _measure(module, state, inputs, cuts, training=self.training, only_meta=strict)

    def _input(self, name: str, device: str, *, real: bool) -> Any:
        spec = self.specs[name]
        if not real:
            return _empty(spec, device)
        return self.example_values()[name].detach().clone().requires_grad_(spec.requires_grad)


# Of torch's own modules, those that run other operations on some devices.
_CHOOSE_BY_DEVICE = (
    torch.nn.RNNBase,
    torch.nn.MultiheadAttention,
    torch.nn.TransformerEncoder,
    torch.nn.TransformerEncoderLayer,
)


def _empty(spec: TensorMeta, device: str) -> Tensor:
    tensor = torch.empty(spec.shape, dtype=getattr(torch, spec.dtype), device=device)
    return tensor.requires_grad_(spec.requires_grad)


def _measure(
    module: torch.nn.Module,
    state: Mapping[str, Tensor],
    inputs: Sequence[Any],
    cuts: CutTensors,
    *,
    training: bool,
    only_meta: bool,
) -> Operations:
    """Run ``module`` forward and backward as it runs inside a stage."""
    weights = [tensor for tensor in state.values() if tensor.requires_grad and training]
    for weight in weights:
        weight.grad = torch.empty_like(weight)  # as after an earlier microbatch
    gradients = [weight.grad for weight in weights if weight.grad is not None]
    live = LiveBytes([*state.values(), *gradients, *(v for v in inputs if isinstance(v, Tensor))])
    recorder = Recorder(live, gradients, cuts, only_meta=only_meta)
    alike = _DeviceIsNotAsked() if only_meta else contextlib.nullcontext()
    attending = CountedAttention(recorder, attention_window(module))
    taken: list[Tensor] = []
    entered = tuple(
        _StageInput.apply(taken, value)
        if isinstance(value, Tensor) and value.requires_grad
        else value
        for value in inputs
    )
    saved = _Saved(live, cuts)
    with (
        attending,
        alike,
        grouped_without_values(recorder),
        recorder,
        torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda t: t),
    ):
        outputs = torch.func.functional_call(module, dict(state), entered)
    forward, peak = recorder.take(), live.take_peak()
    saved_bytes, cut_bytes = saved.apart.now, saved.slices.now
    output_bytes = tuple(_added(outputs, live, saved.apart.keys()))
    if training:
        ends = list(outputs)
        del outputs
        peak = max(peak, _backward(ends, recorder, live, alike))
    return Operations(
        forward,
        recorder.take(),
        saved_bytes,
        peak,
        output_bytes,
        tuple(isinstance(v, Tensor) and storage_key(v) in saved.inputs for v in inputs),
        cut_bytes,
        recorder.whole_peak,
    )


class _Saved:
    """What a forward pass saves for the backward pass.

    Attributes:
        apart: What is neither weights nor inputs.
        slices: That part of it which ranks of tensor parallelism have slices of.
        inputs: Storages of the inputs that are saved.
    """

    def __init__(self, live: LiveBytes, cuts: CutTensors) -> None:
        self._live, self._cuts = live, cuts
        self.apart, self.slices = LiveBytes([]), LiveBytes([])
        self.inputs: set[int] = set()

    def pack(self, tensor: Tensor) -> Tensor:
        """Note a tensor that is saved, and save it as it is."""
        if self._live.is_apart(tensor):
            self.inputs.add(storage_key(tensor))
        else:
            self.apart.note([tensor])
            self.slices.note([tensor] if tensor in self._cuts else [])
        return tensor


def _backward(
    outputs: list[Any],
    recorder: Recorder,
    live: LiveBytes,
    alike: contextlib.AbstractContextManager[Any],
) -> int:
    """Run the backward pass of ``outputs``, which it empties; return its peak in bytes."""
    roots = [t for t in outputs if isinstance(t, Tensor) and t.requires_grad]
    if not roots:
        return 0
    with recorder:
        for root in roots:  # who hands a gradient over is not known: this block pays for it
            torch.ones_like(root)
    end = _StageOutputs.apply(recorder, *roots)
    seed = torch.ones_like(end)
    outputs.clear()
    del roots, root  # unsaved tensors are freed
    live.take_peak()
    recorder.cuts.backward = True
    with alike, recorder:
        torch.autograd.backward(end, seed)
    return live.take_peak()


def _added(values: Iterable[Any], live: LiveBytes, counted: Iterable[int]) -> Iterator[int]:
    """Bytes that each value has for itself: not outside, saved, or shared with one before it."""
    known = set(counted)
    for value in values:
        if not isinstance(value, Tensor) or live.is_apart(value) or storage_key(value) in known:
            yield 0
            continue
        known.add(storage_key(value))
        yield int(value.untyped_storage().nbytes())


class _StageInput(torch.autograd.Function):
    """An input as inside a stage, where its producer takes the gradient: no leaf adds it up."""

    @staticmethod
    def forward(ctx: Any, taken: list[Tensor], value: Tensor) -> Tensor:
        ctx.taken = taken
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None]:
        ctx.taken.append(gradient)
        return None, None


class _StageOutputs(torch.autograd.Function):
    """Makes the gradients of a block's outputs as a later block does; no reference is kept."""

    @staticmethod
    def forward(ctx: Any, recorder: Recorder, *roots: Tensor) -> Tensor:
        ctx.recorder = recorder
        likes = [torch.empty_like(root) for root in roots]
        ctx.kinds = [(t.shape, t.stride(), t.dtype, t.device) for t in likes]
        return torch.zeros((), device=roots[0].device)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        with ctx.recorder.unrecorded():
            handed = [
                torch.empty_strided(shape, stride, dtype=dtype, device=device).fill_(1)
                for shape, stride, dtype, device in ctx.kinds
            ]
        return (None, *handed)


_DEVICE = {
    Tensor.get_device,
    *(getattr(Tensor, name).__get__ for name in ("device", "is_cpu", "is_cuda", "is_meta")),
}


class _DeviceIsNotAsked(TorchFunctionMode):
    """Within it, code that may do something else on a device ends with an error.

    It asks which device a tensor is on, or casts there by autocast, of which meta has none.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _DEVICE or autocast_dtype() is not None:
            raise OtherDeviceError
        return func(*args, **(kwargs or {}))
