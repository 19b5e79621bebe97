"""Watches a model while it runs: records the program once, and finds the losses every time.

What the front end refuses while it traces is refused here in the recording run. One limit: a
tensor's device is ``cpu`` here, so ``x.to(y.device)`` cannot be told from ``x.to(torch.device(
"cpu"))``; only the text ``"cpu"`` and ``x.cpu()`` are refused.
"""

from __future__ import annotations

from typing import Any, Callable, Iterator

from torch import Tensor
from torch.overrides import TorchFunctionMode

from .enums import OverlapMode
from .errors import backend_error, createPoptorchError
from .program import BlockRecord, Program, SerializedMatMul
from .stages import ExecutionStrategy

_HOST_READS = frozenset(
    [
        "item",
        "tolist",
        "numpy",
        "__bool__",
        "__int__",
        "__float__",
        "__index__",
        "__contains__",
        "__array__",
        "is_nonzero",
        "equal",
        "allclose",
    ]
)
LOSS_FUNCTIONS = frozenset(
    [
        "cross_entropy",
        "nll_loss",
        "mse_loss",
        "l1_loss",
        "smooth_l1_loss",
        "huber_loss",
        "binary_cross_entropy",
        "binary_cross_entropy_with_logits",
        "kl_div",
        "ctc_loss",
        "poisson_nll_loss",
        "gaussian_nll_loss",
        "hinge_embedding_loss",
        "margin_ranking_loss",
        "soft_margin_loss",
        "multi_margin_loss",
        "multilabel_margin_loss",
        "multilabel_soft_margin_loss",
        "triplet_margin_loss",
        "triplet_margin_with_distance_loss",
        "cosine_embedding_loss",
    ]
)
"""Functions of torch whose result counts as a loss."""

_current: list[Watcher] = []


class Watcher(TorchFunctionMode):
    """Sees every call of torch that the model makes, on the device's behalf.

    Args:
        training: The model is compiled for training.

    Attributes:
        losses: Results of loss functions and of ``identity_loss``, in order.
    """

    def __init__(self, *, training: bool) -> None:
        super().__init__()
        self.training = training
        self.losses: list[Tensor] = []

    def __enter__(self) -> Any:
        _current.append(self)
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        _current.pop()
        super().__exit__(*exception)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        del types
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        self.before(name, args, kwargs)
        result = func(*args, **kwargs)
        if name in LOSS_FUNCTIONS and isinstance(result, Tensor):
            self.note_loss(result, name)
        self.after(name, args, kwargs, result)
        return result

    def before(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Look at a call before it is made."""

    def after(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        """Look at the result of a call."""

    def note_loss(self, loss: Tensor, _name: str) -> None:
        """Remember a loss."""
        self.losses.append(loss)

    def begin_block(self, user_id: str | None, _ipu_id: int | None) -> str | None:
        """Start a block; a compiled program knows its blocks already."""
        return user_id

    def end_block(self) -> None:
        """Leave a block."""


class Recorder(Watcher):
    """A watcher that builds the program and refuses what cannot be traced.

    Args:
        program: Filled while the model runs.
        strategy: Gives every block its stage and IPU.
        names: ``id(tensor)`` to the name of a parameter or buffer and whether it is a parameter.
    """

    def __init__(
        self, program: Program, strategy: ExecutionStrategy, names: dict[int, tuple[str, bool]]
    ) -> None:
        super().__init__(training=program.training)
        self.program = program
        self._strategy = strategy
        self._names = names
        self._next_id = 0
        self._active: BlockRecord | None = BlockRecord("", 0, 0)
        program.blocks.append(self._active)

    def begin_block(self, user_id: str | None, ipu_id: int | None) -> str | None:
        """Start a record; everything until the next start belongs to it."""
        if user_id is None:
            user_id = str(self._next_id)
            self._next_id += 1
        stage, ipu = self._strategy.locate(user_id, ipu_id)
        self._active = BlockRecord(user_id, stage, ipu)
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
            raise backend_error("No active Block, all the ops must belong to a Block")
        return self._active

    def before(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Refuse what needs a tensor's value on the host."""
        if name in _HOST_READS or (name == "full" and _fill_is_tensor(args, kwargs)):
            raise backend_error(
                f"aten::item is only supported in eager mode, but was intercepted in {name}(): "
                "forward() reads a tensor's value on the host"
            )
        if name == "cpu" or (name == "to" and _names_cpu(args, kwargs)):
            raise backend_error(
                'A tensor was moved with .to("cpu") or .cpu() inside forward(): host '
                "operations cannot be part of the program; use poptorch.CPU"
            )

    def after(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        """Count the operation and note which variables it uses."""
        made = [value for value in _flat(result) if isinstance(value, Tensor)]
        if not made:
            return
        for tensor in made:
            if tensor.numel() == 0:
                raise backend_error(
                    f"{name}() made a tensor of shape {tuple(tensor.shape)}: "
                    "zero-sized tensors are not supported"
                )
        block = self.block
        block.num_ops += 1
        for value in _flat((args, kwargs)):
            if id(value) in self._names and isinstance(value, Tensor):
                variable, is_parameter = self._names[id(value)]
                listed = block.parameters if is_parameter else block.buffers
                if variable not in listed:
                    listed.append(variable)

    def note_loss(self, loss: Tensor, name: str) -> None:
        """Remember a loss and where it was computed."""
        super().note_loss(loss, name)
        self.block.losses.append(name)


def _flat(value: Any) -> Iterator[Any]:
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from _flat(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _flat(item)
    else:
        yield value


def _fill_is_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    fill = args[1] if len(args) > 1 else kwargs.get("fill_value")
    return isinstance(fill, Tensor)


def _names_cpu(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    return any(isinstance(value, str) and value == "cpu" for value in _flat((args, kwargs)))


def _recorder() -> Recorder | None:
    return _current[-1] if _current and isinstance(_current[-1], Recorder) else None


def is_running() -> bool:
    """Tell whether a model runs as the device's program now."""
    return bool(_current)


def is_training() -> bool:
    """Tell whether the program that runs now is a training one."""
    return bool(_current) and _current[-1].training


def begin_block(user_id: str | None, ipu_id: int | None) -> str | None:
    """Start a block and return its id; ``None`` stays ``None`` outside a recording."""
    return _current[-1].begin_block(user_id, ipu_id) if _current else user_id


def end_block() -> None:
    """Leave the block that is active."""
    if _current:
        _current[-1].end_block()


def restart_ids() -> None:
    """Number anonymous blocks from 0 again."""
    recorder = _recorder()
    if recorder is not None:
        recorder.restart_ids()


def note_checkpoints(count: int) -> None:
    """Record checkpointed tensors in the block that runs now."""
    recorder = _recorder()
    if recorder is not None:
        recorder.block.checkpoints += count


def note_loss(loss: Tensor, name: str) -> None:
    """Record a loss that no function of torch computed."""
    if _current:
        _current[-1].note_loss(loss, name)


def note_serialized(mode: str, factor: int, lhs: Tensor, rhs: Tensor) -> None:
    """Record a matrix product in slices."""
    recorder = _recorder()
    if recorder is not None:
        made = SerializedMatMul(mode, factor, tuple(lhs.shape), tuple(rhs.shape))
        recorder.block.serialized.append(made)


def note_attributes(values: list[tuple[str, str, str]]) -> None:
    """Record attributes given to the operations of the block that runs now."""
    recorder = _recorder()
    if recorder is not None:
        recorder.block.attributes.extend(values)


def note_custom_op(name: str) -> None:
    """Record a custom operation."""
    recorder = _recorder()
    if recorder is not None:
        recorder.program.custom_ops.append(name)


def note_overlap(mode: OverlapMode) -> None:
    """Record that copies overlap with compute."""
    recorder = _recorder()
    if recorder is not None and mode is not OverlapMode.NoOverlap:
        recorder.program.overlapped = True


def refuse_in_training(what: str) -> None:
    """Refuse an operation that has no gradient on the device.

    Raises:
        Error: A training program runs.
    """
    if is_training():
        raise createPoptorchError(f"{what} is supported in inference models only")
