"""Records a program: ``forward`` runs once on tensors that have shapes and types, but no values.

The tensors are ``meta`` tensors that say they are on an IPU. Two modes of torch see what happens
to them. The function mode sees calls as the model makes them; these are what the program executes
later. The dispatch mode sees the ``aten`` operations inside of them; it refuses what the front end
refuses while it builds a program, and records operations that no function mode sees (scripted
functions, ``vmap``). Types are inferred by torch's ``meta`` kernels, as in the front end.
"""

from __future__ import annotations

import contextlib
import functools
from typing import Any, Callable, Iterator

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import TorchDispatchMode

from .errors import Error, backend_error
from .graph import (
    ON_DEVICE,
    ON_HOST,
    Graph,
    Node,
    Slot,
    flat,
    replaced,
    tensors_of,
    without_values,
    zeros_for,
)
from .program import BlockRecord, Program
from .refusals import called_by_torch, place_in_model, refused_call, refused_operation
from .stages import ExecutionStrategy

_META = torch.device("meta")
_IPU = torch.device("ipu", 0)
_IPU_NAMES = (_IPU, torch.device("ipu"), "ipu", "ipu:0")
_GET_DEVICE = torch.Tensor.device.__get__
# Operations whose types the front end infers itself where torch 2.0 has no meta kernel.
_TYPES_BY_HAND = (
    "bincount bucketize count_nonzero _ctc_loss median rrelu_with_noise nll_loss2d_forward "
    "upsample_nearest3d max_pool3d_with_indices hardsigmoid silu"
)
# Functions of torch whose result counts as a loss.
_LOSS_FUNCTIONS = (
    "cross_entropy nll_loss mse_loss l1_loss smooth_l1_loss huber_loss binary_cross_entropy "
    "binary_cross_entropy_with_logits kl_div ctc_loss poisson_nll_loss gaussian_nll_loss "
    "hinge_embedding_loss margin_ranking_loss soft_margin_loss multi_margin_loss "
    "multilabel_margin_loss multilabel_soft_margin_loss triplet_margin_loss "
    "triplet_margin_with_distance_loss cosine_embedding_loss"
)


class Recorder:
    """Builds a program while the model runs, and refuses what cannot be part of one.

    Args:
        program: Filled while the model runs.
        strategy: Gives every block its stage and IPU.

    Attributes:
        losses: Results of loss functions and of ``identity_loss``, in order.
    """

    def __init__(self, program: Program, strategy: ExecutionStrategy) -> None:
        self.program = program
        self.graph: Graph = program.graph
        self.losses: list[Tensor] = []
        self._strategy = strategy
        self._names: dict[int, tuple[str, bool]] = {}
        self._slots: dict[int, int] = {}
        self._aliases: dict[Any, int] = {}
        self._held: list[Tensor] = []
        self._num_slots = 0
        self._calling = "forward"
        self._depth = 0
        self._paused = False
        self._next_id = 0
        self._active: BlockRecord | None = BlockRecord("", 0, 0)
        program.blocks.append(self._active)

    # ------------------------------------------------------------------ tensors
    def symbol(self, value: Tensor, name: str | None = None) -> tuple[Tensor, int]:
        """Return a tensor without values for one of the host, and its slot.

        Args:
            value: A parameter, a buffer or an input.
            name: Of a parameter or buffer.
        """
        plain = value.detach().as_subclass(Tensor)
        made = plain.to(_META, dtype=ON_DEVICE.get(plain.dtype, plain.dtype))
        is_parameter = isinstance(value, nn.Parameter)
        if is_parameter:
            made = nn.Parameter(made, requires_grad=value.requires_grad)
        slot = self._register(made)
        if name is not None:
            self._names[slot] = (name, is_parameter)
        return made, slot

    def slot_of(self, value: Tensor) -> int | None:
        """Return the slot of a tensor of the program; ``None`` for any other tensor."""
        slot = self._slots.get(id(value))
        if slot is None and value.is_meta:
            key = _alias_key(value)
            slot = None if key is None else self._aliases.get(key)
        return slot

    def _register(self, value: Tensor) -> int:
        slot = self._slots.get(id(value))
        if slot is None:
            slot = self._slots[id(value)] = self._num_slots
            self._num_slots += 1
            self._held.append(value)
            self._aliases.setdefault(_alias_key(value), slot)
        return slot

    # ------------------------------------------------------------------ blocks
    def begin_block(self, user_id: Any, ipu_id: int | None) -> Any:
        """Start a record; everything until the next start belongs to it."""
        if user_id is None:
            user_id = str(self._next_id)
            self._next_id += 1
        stage, ipu = self._strategy.locate(user_id, ipu_id)
        self._active = BlockRecord(str(user_id), stage, ipu)
        self.program.blocks.append(self._active)
        return user_id

    def end_block(self) -> None:
        """Leave no block active, as the end of a ``Block`` context does."""
        self._active = None

    def restart_ids(self) -> None:
        """Number anonymous blocks from 0 again."""
        self._next_id = 0

    @property
    def block(self) -> BlockRecord:
        """The block that runs now."""
        if self._active is None:
            raise self.refusal("No active Block, all the ops must belong to a Block")
        return self._active

    def note_loss(self, loss: Tensor, name: str) -> None:
        """Remember a loss and where it was computed."""
        self.losses.append(loss)
        self.block.losses.append(name)

    # ------------------------------------------------------------------ running
    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Record what torch is asked to do while this lasts."""
        with _Factories(self), _Functions(self), _Operations(self):
            yield

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Let torch work as it does without a recorder."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    @property
    def is_paused(self) -> bool:
        """Nothing is recorded now."""
        return self._paused

    def function(self, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Make a call of the model, and record it."""
        if self._paused:
            return func(*args, **kwargs)
        name = getattr(func, "__name__", str(func))
        if func == _GET_DEVICE:
            on_ipu = args[0].is_meta and not called_by_torch()
            return _IPU if on_ipu else func(*args)
        self._refuse(refused_call(name, args, kwargs))
        args, kwargs = replaced((args, kwargs), _on_meta)
        known = all(self.slot_of(value) is not None for value in tensors_of((args, kwargs)))
        calling, self._calling = self._calling, name
        self._depth += known
        try:
            result = self._in_device_types(self._called(func, args, kwargs))
        finally:
            self._depth -= known
            self._calling = calling
        if known:
            self.add(func, name, args, kwargs, result)
        if name in _LOSS_FUNCTIONS.split() and isinstance(result, Tensor):
            self.note_loss(result, name)
        return result

    def _called(self, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Call; once more with indices of 64 bits where torch itself wants them."""
        if func is torch.nn.functional.one_hot:  # torch looks at the values, the front end does not
            num_classes = args[1] if len(args) > 1 else kwargs["num_classes"]
            return torch.empty(*args[0].shape, num_classes, dtype=torch.int32, device=_META)
        try:
            return func(*args, **kwargs)
        except (RuntimeError, IndexError) as error:
            if isinstance(error, NotImplementedError):
                raise
            with self.paused():
                wide = replaced((args, kwargs), _widened)
                same = all(a is b for a, b in zip(flat(wide), flat((args, kwargs))))
            if same:
                raise
            result = func(*wide[0], **wide[1])
            changes = getattr(func, "__name__", "").split(".")[0].endswith("_")
            return args[0] if changes else result

    def operation(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Infer the types of one ``aten`` operation; refuse what the front end refuses."""
        if self._paused:
            return func(*args, **kwargs)
        with self.paused():
            name = func._schema.name
            tensors = tensors_of((args, kwargs))
            self._refuse(refused_operation(name, self._calling, args, kwargs))
            result = self._in_device_types(self._infer(func, name, args, kwargs))
            outside = self._depth == 0
        if outside and any(value.is_meta for value in [*tensors, *tensors_of(result)]):
            self.add(func, name, args, kwargs, result)
        return result

    def add(self, func: Any, name: str, args: Any, kwargs: Any, result: Any) -> None:
        """Record a call that was made, in the block that runs now."""
        with self.paused():
            self._add(func, name, args, kwargs, result)

    def _add(self, func: Any, name: str, args: Any, kwargs: Any, result: Any) -> None:
        made = [value for value in tensors_of(result) if value.is_meta]
        used = [value for value in tensors_of((args, kwargs)) if value.is_meta]
        if not made and not (used and _changes_arguments(name)):
            return
        for value in made:
            if value.numel() == 0:
                raise self.refusal(
                    f"{name}() made a tensor of shape {tuple(value.shape)}: zero-sized tensors "
                    "are not supported"
                )
        self.block.num_ops += 1
        for value in used:
            self._note_variable(self.slot_of(value))
        positional, named = replaced((args, kwargs), self._recorded)
        outputs = [self._register(value) for value in made]
        self.graph.nodes.append(Node(func, positional, named, outputs, torch.is_grad_enabled()))

    def _note_variable(self, slot: int | None) -> None:
        if slot in self._names:
            variable, is_parameter = self._names[slot]
            listed = self.block.parameters if is_parameter else self.block.buffers
            if variable not in listed:
                listed.append(variable)

    def _recorded(self, value: Any) -> Any:
        """Return what stands for an argument in the program."""
        if isinstance(value, Tensor):
            slot = self.slot_of(value)
            if slot is None and value.is_meta:
                raise self.refusal("A tensor is used that no operation of the program made")
            if slot is None:
                slot = self._num_slots
                self._num_slots += 1
                self.graph.constants[slot] = value.detach().clone()
            return Slot(slot)
        if isinstance(value, torch.device):
            return torch.device("cpu")
        return ON_HOST.get(value, value) if isinstance(value, torch.dtype) else value

    def mark_custom_functions(self) -> None:
        """Give the operations of a custom ``autograd.Function`` gradients.

        The device differentiates its program, so it never sees a ``backward`` in Python. What
        they write in place is written to a copy: torch keeps the value before for the gradient.
        """
        inside = False
        custom = {
            self._slots[id(value)]
            for value in self._held
            if isinstance(value.grad_fn, torch.autograd.function.BackwardCFunction)
        }
        for node in reversed(self.graph.nodes):
            inside = not node.has_gradient and (inside or bool(custom & set(node.outputs)))
            node.has_gradient = node.has_gradient or inside
            name = getattr(node.function, "__name__", "")
            if inside and name.endswith("_") and not name.endswith("__"):
                node.function = functools.partial(_on_copy, node.function)

    # ------------------------------------------------------------------ types
    def _infer(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        try:
            return self._called(func, args, kwargs)
        except NotImplementedError as error:
            if name.split("::")[-1] not in _TYPES_BY_HAND.split():
                raise self.refusal(
                    f"Type inference failed for {name} because the operator doesn't have an "
                    "implementation for the Meta backend"
                ) from error
            zeros = replaced((args, kwargs), zeros_for)
            return replaced(func(*zeros[0], **zeros[1]), without_values)
        except (RuntimeError, IndexError) as error:
            raise self.refusal(f"Type inference failed for {name}: {error}") from error

    def _in_device_types(self, result: Any) -> Any:
        def narrowed(value: Any) -> Any:
            if not isinstance(value, Tensor) or not value.is_meta or value.dtype not in ON_DEVICE:
                return value
            with self.paused():
                return value.to(ON_DEVICE[value.dtype])

        if not any(value.is_meta and value.dtype in ON_DEVICE for value in tensors_of(result)):
            return result
        return _rebuilt(result, narrowed)

    # ------------------------------------------------------------------ refusals
    def refusal(self, message: str) -> Error:
        """Return the front end's error, with the place in the model."""
        return backend_error(f"{message} (in {self._calling}(), {place_in_model()})")

    def _refuse(self, message: str) -> None:
        if message:
            raise self.refusal(message)


class _Functions(TorchFunctionMode):
    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self._recorder.function(func, args, kwargs or {})


class _Operations(TorchDispatchMode):
    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self._recorder.operation(func, args, kwargs or {})


class _Factories(DeviceContext):
    """Makes tensors on the device where no device is named."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__(_META)
        self._recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._recorder.is_paused:
            return func(*args, **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs)


def _on_copy(function: Callable[..., Any], target: Tensor, *args: Any, **kwargs: Any) -> Any:
    return function(target.clone(), *args, **kwargs)


def _alias_key(value: Tensor) -> Any:
    """Return what is equal for two tensors over the same memory; ``None`` for a wrapper's."""
    try:
        memory = value.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):
        return None
    return memory, value.storage_offset(), value.shape, value.stride(), value.dtype


def _on_meta(value: Any) -> Any:
    is_name = isinstance(value, (torch.device, str)) and value in _IPU_NAMES
    return _META if is_name else value


def _widened(value: Any) -> Any:
    narrow = isinstance(value, Tensor) and value.dtype == torch.int32
    return value.to(torch.int64) if narrow else value


def _rebuilt(result: Any, function: Callable[[Any], Any]) -> Any:
    """Return a result with its tensors replaced, in the type that torch gave it."""
    if isinstance(result, tuple) and not hasattr(result, "_fields"):
        # torch.return_types take one iterable, as a plain tuple does.
        return type(result)([_rebuilt(value, function) for value in result])
    if isinstance(result, (list, tuple)):
        return replaced(result, function)
    return function(result)


def _changes_arguments(name: str) -> bool:
    return name in ("__setitem__", "__set__") or (name.endswith("_") and not name.endswith("__"))
