"""Make a model's forward pass a static program: no reads of values, no caches, no host draws.

transformers skips an attention mask when all of it is ones, unless it is being traced; poptorch's
tracing is not the one that model code asks about. Caches of keys and values start with empty
tensors, which the device does not have, and training needs none. The rest is done while the model
runs, by :class:`~.program_mode.ProgramMode`, whatever the model is.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from typing import Any, Dict, Iterator, Mapping, Optional, Sequence, Tuple

import torch
from torch import Tensor, nn

from .device import load_ahead
from .host_draws import PREFIX, HostDraws
from .host_values import HostValues, map_leaves, tensors_of
from .indexing import indexing_seen
from .own_gradients import gradients_checked
from .program_mode import ProgramMode
from .rewrites import RULES
from .static_errors import StaticGraphError

# Name in a config, what it may say, and what it says in a program: no cache, and experts whose
# shapes do not depend on which tokens come to them.
_CHOICES = (
    ("use_cache", True, False),
    ("_experts_implementation", "grouped_mm", "batched_mm"),
)


# Functions of tensors that model code applies to sizes where it is traced: sizes are tensors there.
_OF_SIZES = ("ceil", "floor", "round")


def _of_numbers(own: Any) -> Any:
    @functools.wraps(own)
    def changed(x: Any, *args: Any, **kwargs: Any) -> Any:
        return own(x if isinstance(x, Tensor) else torch.tensor(x), *args, **kwargs)

    return changed


@contextlib.contextmanager
def static_graph(model: nn.Module) -> Iterator[None]:
    """While it lasts, ``torch.jit.is_tracing()`` says yes and configs choose what is static."""
    jit: Any = torch.jit
    own = jit.is_tracing
    owned: Any = (getattr(module, "config", None) for module in model.modules())
    configs = {id(config): config for config in owned if config is not None}.values()
    changed = [
        (config, name, dynamic)
        for config in configs
        for name, dynamic, static in _CHOICES
        if getattr(config, name, None) == dynamic
    ]
    statics = {name: static for name, _, static in _CHOICES}
    of_sizes = {name: getattr(torch, name) for name in _OF_SIZES}
    jit.is_tracing = lambda: True
    for name, function in of_sizes.items():
        setattr(torch, name, _of_numbers(function))
    for config, name, _ in changed:
        setattr(config, name, statics[name])
    try:
        yield
    finally:
        jit.is_tracing = own
        for name, function in of_sizes.items():
            setattr(torch, name, function)
        for config, name, dynamic in changed:
            setattr(config, name, dynamic)


class StaticProgram:
    """How a model runs as a program that is compiled once.

    Args:
        model: The user's model.

    Attributes:
        draws: What the model draws on the host in each pass.
        values: What depends on the inputs only, and what the model reads of it.
    """

    def __init__(self, model: nn.Module) -> None:
        self.draws = HostDraws()
        self.values = HostValues()
        self._model = model
        self._buffers = dict(_named_buffers(model))
        self._sample: Optional[Dict[str, Any]] = None
        self._attributes: Dict[str, Any] = {}

    def rehearse(self, sample: Mapping[str, Any]) -> None:
        """Run the model without values, as the front end does; learn what it reads and draws.

        Args:
            sample: One microbatch.

        Raises:
            StaticGraphError: The model does what no program can do.
        """
        self._sample = dict(sample)
        model = self._model
        inputs = {n: v.to("meta") if isinstance(v, Tensor) else v for n, v in sample.items()}
        self._attributes = _plain_attributes(model)
        # On meta no weight asks for a gradient; grad mode shows where the model switches it off.
        with torch.set_grad_enabled(model.training), _on_meta(model):
            checked = gradients_checked() if model.training else contextlib.nullcontext()
            with checked, self._running(inputs, [], learn=True):
                model(**inputs)
            after = _plain_attributes(model)
        # What the forward pass itself writes is no setting of the user's.
        kept = {n: v for n, v in self._attributes.items() if after.get(n, v) == v}
        self._attributes = kept

    def inputs(self, batch: Mapping[str, Any], copies: int) -> Dict[str, Any]:
        """Return a batch with what the host draws for it.

        Args:
            batch: As the device takes it, ``copies`` microbatches along axis 0.
            copies: Microbatches in it.

        Raises:
            StaticGraphError: The program was built for other batches, or an attribute of a module
                that it may have used has changed.
        """
        changed = [n for n, v in _plain_attributes(self._model).items()
                   if self._attributes and self._attributes.get(n, v) != v]  # fmt: skip
        if changed:
            raise StaticGraphError(
                f"{changed[0]} has changed since the program was built, which holds its old value "
                f"{self._attributes[changed[0]]!r}; set it back, or compile again"
            )
        if not (self.values.is_read or self.draws.names):
            return dict(batch)
        parts = [_part(batch, index, copies) for index in range(copies)]
        for part in parts:
            self.values.check(part)
        return {**batch, **self.draws.make(self.values, parts)}

    def run(self, forward: Any, args: Any, kwargs: Any) -> Any:
        """Call ``forward`` with the arguments of the program."""
        signature = inspect.signature(forward)
        given = [kwargs[name] for name in self.draws.names if name in kwargs]
        own = {name: value for name, value in kwargs.items() if not name.startswith(PREFIX)}
        bound = signature.bind(*args, **own)
        inputs = dict(bound.arguments)
        for name, parameter in signature.parameters.items():
            if parameter.kind is inspect.Parameter.VAR_KEYWORD:
                inputs.update(inputs.pop(name, {}))
        with self._running(inputs, given, learn=False) as mode:
            output = forward(*bound.args, **bound.kwargs)
            return map_leaves(mode.current, dict(output) if isinstance(output, dict) else output)

    @contextlib.contextmanager
    def _running(
        self, inputs: Mapping[str, Any], given: Sequence[Tensor], *, learn: bool
    ) -> Iterator[ProgramMode]:
        model = self._model
        values = HostValues()
        found = [t for t in [*model.parameters(), *tensors_of(dict(inputs))]]
        device = found[0].device
        here = dict(_named_buffers(model))
        emulated = device.type == "cpu"
        buffers = {
            id(t): (t, t if emulated else self._buffers[n])
            for n, t in here.items()
            if n in self._buffers
        }
        mode = ProgramMode(device, buffers, values, RULES, self.draws)
        self.draws.attach(mode)
        for name, value in inputs.items():
            if isinstance(value, Tensor):
                mode.add_input(value, name, self._host_input(name, value))
        for tensor in given:
            mode.mark(tensor)
        drawing = self.draws.running(model, given, learn=learn)
        with static_graph(model), drawing, indexing_seen(), mode.stopped.running(), mode:
            yield mode
        if mode.pending is not None:
            raise mode.pending.error
        if learn:
            self.values = values

    def _host_input(self, name: str, value: Tensor) -> Optional[Tensor]:
        if value.device.type == "cpu":
            return value
        known = None if self._sample is None else self._sample.get(name)
        return known if isinstance(known, Tensor) else None


def _named_buffers(model: nn.Module) -> Iterator[Tuple[str, Tensor]]:
    """Return every buffer under every name."""
    for path, module in model.named_modules(remove_duplicate=False):
        for name, value in module._buffers.items():
            if value is not None:
                yield f"{path}.{name}", value


@contextlib.contextmanager
def _on_meta(model: nn.Module) -> Iterator[None]:
    """While it lasts, parameters and buffers have no values; tied ones stay tied."""
    attributes = [(vars(module), dict(vars(module))) for module in model.modules()]
    made: Dict[int, Tensor] = {}
    before = []
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, value in held.items():
                if value is not None:
                    before.append((module, held, name, value))
                    made.setdefault(id(value), _without_values(value))
    try:
        for module, held, name, value in before:
            _put(module, held, name, made[id(value)])
        yield
    finally:
        for module, held, name, value in before:
            _put(module, held, name, value)
        for now, then in attributes:  # a forward pass may leave tensors there
            now.clear()
            now.update(then)


def _without_values(value: Tensor) -> Tensor:
    empty = torch.empty_like(value.detach(), device="meta")
    return nn.Parameter(empty, requires_grad=False) if isinstance(value, nn.Parameter) else empty


def _put(module: nn.Module, held: Any, name: str, value: Tensor) -> None:
    if isinstance(module, nn.RNNBase):  # it keeps a list of its parameters, too
        setattr(module, name, value)
    else:
        held[name] = value


def _part(batch: Mapping[str, Any], index: int, copies: int) -> Dict[str, Any]:
    """Return one of ``copies`` microbatches."""
    part = {}
    for name, value in batch.items():
        if isinstance(value, Tensor) and value.dim():
            size = len(value) // copies
            value = value[index * size : (index + 1) * size]
        part[name] = value
    return part


def _plain_attributes(model: nn.Module) -> Dict[str, Any]:
    """Return what the modules hold of numbers and texts, by dotted path."""
    return {
        f"{path}.{name}": value
        for path, module in model.named_modules()
        for name, value in vars(module).items()
        if type(value) in (bool, int, float, str) and name not in ("training", "forward")
    }


def _with_draws(signature: inspect.Signature) -> inspect.Signature:
    """Return a signature that also takes what the host draws."""
    parameters = list(signature.parameters.values())
    kind = inspect.Parameter.VAR_KEYWORD
    if not any(parameter.kind is kind for parameter in parameters):
        parameters.append(inspect.Parameter("host_draws", kind))
    return signature.replace(parameters=parameters)


class DeviceForward:
    """Makes ``model.forward`` return only what the device gives back, until :meth:`restore`.

    In training that is the loss, marked as the loss; in evaluation a tuple of all tensors of the
    output, whose names are in :attr:`names`.

    Args:
        model: The user's model.
        poptorch: The front end.
        settings: The flat object of ``settings.json``.

    Attributes:
        names: Of the tensors of the last evaluation.
    """

    def __init__(self, model: nn.Module, poptorch: Any, settings: Mapping[str, Any]) -> None:
        self.names: list[str] = []
        self._model = model
        # Somebody may have put a forward on the object before us.
        self._own = model.__dict__.get("forward")
        plain = model.forward
        self._programs = {training: StaticProgram(model) for training in (True, False)}

        @functools.wraps(plain)
        def changed(*args: Any, **kwargs: Any) -> Any:
            given = load_ahead((args, kwargs), settings, poptorch, training=model.training)
            output = self._programs[model.training].run(plain, *given)
            if model.training:
                # A sum of losses must be marked as the one loss.
                return poptorch.identity_loss(output["loss"], reduction="none")
            tensors = {n: value for n, value in output.items() if isinstance(value, Tensor)}
            self.names = list(tensors)
            return tuple(tensors.values())

        forward: Any = changed
        forward.returns_tensors = True
        forward.__signature__ = _with_draws(inspect.signature(plain))
        self._changed = forward
        model.forward = forward

    def inputs(
        self, batch: Mapping[str, Any], micro_batch_size: int, *, training: bool, build: bool
    ) -> Dict[str, Any]:
        """Return what a call of the executor takes for a batch: the batch, and what the host draws.

        Args:
            batch: Microbatches along axis 0.
            micro_batch_size: Rows of one.
            training: For the executor that trains; to build it, the model is in this mode.
            build: The executor is compiled with this batch.

        Raises:
            StaticGraphError: No program can do what the model does; or it was built for other
                batches, or for another value of a module's attribute.
        """
        rows = [len(v) for v in batch.values() if isinstance(v, Tensor) and v.dim()]
        copies = rows[0] // micro_batch_size if rows else 1
        if build:
            self._programs[training] = StaticProgram(self._model)
            with self.restored():
                self._programs[training].rehearse(_part(batch, 0, copies))
        return self._programs[training].inputs(batch, copies)

    def restore(self) -> None:
        """Give the model its own ``forward`` back."""
        if self._own is None:
            self._model.__dict__.pop("forward", None)
        else:
            self._model.__dict__["forward"] = self._own

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        """While it lasts, the model has its own ``forward``."""
        self.restore()
        try:
            yield
        finally:
            self._model.forward = self._changed


def is_changed(model: nn.Module) -> bool:
    """Tell whether a :class:`DeviceForward` is on ``model``."""
    return getattr(model.forward, "returns_tensors", False)
