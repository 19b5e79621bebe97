"""Nested inputs and outputs: flattening, slicing into micro-batches, joining."""

from __future__ import annotations

import abc
import logging
from dataclasses import dataclass
from typing import Any, Callable

import torch
from torch import Tensor

from .enums import CommGroupType, OutputMode
from .errors import createPoptorchError
from .options import Options
from .options_base import require

_LOG = logging.getLogger("poptorch")


class ICustomArgParser(abc.ABC):
    """Finds the tensors in objects of a user's class, and makes such objects again."""

    @abc.abstractmethod
    def yieldTensors(self, struct: Any) -> Any:
        """Yield every tensor in ``struct``, always in the same order."""

    @abc.abstractmethod
    def reconstruct(self, original_structure: Any, tensor_iterator: Any) -> Any:
        """Return an object like the original one, with other tensors."""


custom_arg_parsers: dict[type, ICustomArgParser] = {}


def registerCustomArgParser(arg_data_type: type, arg_parser: ICustomArgParser | None) -> None:
    """Read arguments of a class with a parser; ``None`` removes its parser.

    Raises:
        Error: The parser does not inherit from ICustomArgParser.
    """
    if arg_parser is None:
        custom_arg_parsers.pop(arg_data_type, None)
        return
    if not isinstance(arg_parser, ICustomArgParser):
        raise createPoptorchError("arg_parser must inherit from ICustomArgParser")
    custom_arg_parsers[arg_data_type] = arg_parser


def map_leaves(function: Callable[[Any], Any], value: Any) -> Any:
    """Return the structure with ``function`` applied to everything that is not a container."""
    if isinstance(value, dict):
        items = {key: map_leaves(function, item) for key, item in value.items()}
        return items if type(value) is dict else type(value)(**items)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(map_leaves(function, item) for item in value))
    if isinstance(value, (list, tuple)):
        return type(value)(map_leaves(function, item) for item in value)
    parser = custom_arg_parsers.get(type(value))
    if parser is not None:
        made = [function(item) for item in parser.yieldTensors(value)]
        if all(isinstance(item, Tensor) for item in made):
            return parser.reconstruct(value, iter(made))
        return tuple(made)
    return function(value)


def leaves(value: Any) -> list[Any]:
    """Return everything that is not a container, in order."""
    found: list[Any] = []
    map_leaves(found.append, value)
    return found


@dataclass(frozen=True)
class Counts:
    """How one call is divided.

    Attributes:
        iterations: Device iterations.
        accumulation: Micro-batches per weight update and replica.
        replicas: Replicas of this process.
        group_size: Replicas that get the same input.
        group_type: Which replicas form such a group.
    """

    iterations: int
    accumulation: int
    replicas: int
    group_size: int
    group_type: CommGroupType

    @classmethod
    def of(cls, options: Options) -> Counts:
        """Read the counts from options."""
        return cls(
            options.device_iterations,
            options.Training.gradient_accumulation,
            options.replication_factor,
            options.input_group_size,
            options.input_cgt,
        )

    @property
    def input_groups(self) -> int:
        """Groups of replicas with inputs of their own."""
        return self.replicas // self.group_size

    @property
    def divisor(self) -> int:
        """Micro-batches in the inputs of one call."""
        return self.iterations * self.accumulation * self.input_groups

    def slot(self, iteration: int, step: int, replica: int) -> int:
        """Position of a micro-batch in dim 0: [iteration][accumulation][replica]."""
        if self.group_type is CommGroupType.Orthogonal:
            group = replica % self.input_groups
        else:
            group = replica // self.group_size
        return (iteration * self.accumulation + step) * self.input_groups + group


def check_inputs(inputs: Any, counts: Counts) -> None:
    """Refuse inputs that the device cannot take.

    Raises:
        AssertionError: Dim 0 of a tensor is not a multiple of the micro-batches in a call.
        Error: An input has no elements.
    """
    for index, tensor in enumerate(v for v in leaves(inputs) if isinstance(v, Tensor)):
        if tensor.requires_grad:
            _LOG.warning(
                "Input %d of shape %s has requires_grad=True set: it is detached, because there "
                "is no backward pass through inputs",
                index,
                tuple(tensor.shape),
            )
        if tensor.numel() == 0:
            raise createPoptorchError(
                f"Input {index} has shape {tuple(tensor.shape)}: zero-sized tensors are not "
                "supported"
            )
        require(
            tensor.dim() == 0 or tensor.shape[0] % counts.divisor == 0,
            f"Invalid batch dimension: input {index} has shape {tuple(tensor.shape)}, but dim 0 "
            f"must be a multiple of {counts.divisor}: deviceIterations ({counts.iterations}) x "
            f"gradientAccumulation ({counts.accumulation}) x replicationFactor "
            f"({counts.replicas}) / input group size ({counts.group_size})",
        )


def signature_of(inputs: Any) -> Any:
    """Return what must be equal in every later call: shapes, types, structure, constants."""
    return map_leaves(_describe, inputs)


def _describe(value: Any) -> Any:
    if isinstance(value, Tensor):
        return f"tensor{tuple(value.shape)} of {value.dtype}"
    return value


def same_signature(first: Any, second: Any) -> bool:
    """Compare two signatures."""
    if type(first) is not type(second):
        return False
    if isinstance(first, dict):
        return set(first) == set(second) and all(
            same_signature(first[key], second[key]) for key in first
        )
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(same_signature, first, second))
    return bool(first == second)


def in_order_of(first: Any, value: Any) -> Any:
    """Return inputs with the keys of every dict in the order of the first call's."""
    if type(first) is not type(value):
        return value
    if type(first) is dict:
        return {key: in_order_of(first[key], value[key]) for key in first}
    if type(first) in (list, tuple):
        return type(value)(map(in_order_of, first, value))
    return value


def to_device(inputs: Any) -> Any:
    """Return the inputs in the device's types: int32 values, float32 instead of float64."""
    return map_leaves(_input_to_device, inputs)


def _input_to_device(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    if value.dtype == torch.float64:
        return value.detach().to(torch.float32)
    if value.dtype == torch.int64:
        # Kept as int64 for torch's own kernels, with the values that an int32 would hold.
        return value.detach().to(torch.int32).to(torch.int64)
    return value.detach().clone()


def micro_batch(inputs: Any, slot: int, divisor: int) -> Any:
    """Return one micro-batch; 0-d tensors are passed whole."""

    def cut(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.dim() == 0:
            return value
        size = value.shape[0] // divisor
        return value[slot * size : (slot + 1) * size].clone()

    return map_leaves(cut, inputs)


def to_host(outputs: Any) -> Any:
    """Return outputs in the device's types, without gradients."""
    return map_leaves(_output_to_host, outputs)


def _output_to_host(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    kind = {torch.float64: torch.float32, torch.int64: torch.int32}.get(value.dtype, value.dtype)
    return value.detach().to(kind).clone()


class Collector:
    """Keeps the outputs that a call returns.

    Args:
        counts: How a call is divided.
        mode: Which outputs to keep; not Default.
        period: Keep each ``period``-th device iteration (EveryN).
    """

    def __init__(self, counts: Counts, mode: OutputMode, period: int) -> None:
        self._counts = counts
        self._mode = mode
        self._period = period
        self._kept: dict[int, Any] = {}
        self._order = 0

    def add(self, iteration: int, replica: int, outputs: Any) -> None:
        """Take the outputs of one micro-batch."""
        if self._mode is OutputMode.Final:
            self._kept[replica] = outputs
        elif self._mode is OutputMode.Sum:
            present = self._kept.get(replica)
            self._kept[replica] = outputs if present is None else _add(present, outputs)
        elif self._mode is OutputMode.All or (iteration + 1) % self._period == 0:
            self._kept[self._order] = outputs
            self._order += 1

    def result(self) -> Any:
        """Return the kept outputs, joined on dim 0 when there are several."""
        kept = [self._kept[key] for key in sorted(self._kept)]
        if len(kept) == 1:
            return kept[0]
        columns = zip(*(leaves(outputs) for outputs in kept))
        joined = iter([_join(list(column)) for column in columns])
        return map_leaves(lambda _value: next(joined), kept[0])


def _join(values: list[Any]) -> Any:
    if not isinstance(values[0], Tensor):
        return values[0]
    return torch.stack(values) if values[0].dim() == 0 else torch.cat(values)


def _add(first: Any, second: Any) -> Any:
    others = iter(leaves(second))

    def plus(value: Any) -> Any:
        other = next(others)
        return value + other if isinstance(value, Tensor) else value

    return map_leaves(plus, first)
