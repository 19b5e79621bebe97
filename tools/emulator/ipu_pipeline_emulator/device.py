"""The emulated device: its own copy of the weights, and the model run on them."""

from __future__ import annotations

import contextlib
from typing import Any, Iterator

import torch
from torch import Tensor, nn

from .errors import backend_error, createPoptorchError
from .graph import ON_HOST, Graph, Values
from .recorder import Recorder

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
"""Modules that may replace a buffer while they are recorded."""


class Weights:
    """The device's copies of parameters and buffers.

    Args:
        model: The user's model; only read here.
        replicas: Copies of every buffer; parameters are equal on all replicas.

    Attributes:
        names: Name of each parameter, in the order of ``parameters``.
        parameters: Leaf tensors of the device.
    """

    def __init__(self, model: nn.Module, replicas: int) -> None:
        self._model = model
        self._host = dict(model.named_parameters())
        self._host_buffers = dict(model.named_buffers())
        self.names = list(self._host)
        self.parameters = [_copy_parameter(tensor) for tensor in self._host.values()]
        self._buffers = [
            [_device_copy(tensor) for tensor in self._host_buffers.values()]
            for _ in range(replicas)
        ]

    @contextlib.contextmanager
    def symbolic(self, recorder: Recorder) -> Iterator[None]:
        """Put tensors without values into the user's modules, and register them.

        Raises:
            Error: The model replaced a parameter or a buffer while it ran.
        """
        graph = recorder.graph
        made: dict[int, Tensor] = {}
        for found, values, slots in (
            (self._host, self.parameters, graph.parameters),
            (self._host_buffers, self._buffers[0], graph.buffers),
        ):
            for (name, host), value in zip(found.items(), values):
                made[id(host)], slot = recorder.symbol(value, name)
                slots.append(slot)
        places = [
            (module, held, key, tensor)
            for module in self._model.modules()
            for held in (module._parameters, module._buffers)
            for key, tensor in held.items()
            if tensor is not None
        ]
        for _, held, key, tensor in places:
            held[key] = made[id(tensor)]
        self._symbols = [made[id(host)] for host in self._host.values()]
        try:
            yield
            for module, held, key, tensor in places:
                moved = held.get(key) is not made[id(tensor)]
                if moved and not isinstance(module, _BATCH_NORMS):
                    raise createPoptorchError(
                        f"The parameter or buffer {key!r} was reassigned inside forward(): only "
                        "in-place operations change it on the device"
                    )
        finally:
            for _, held, key, tensor in places:
                held[key] = tensor

    def trained(self, loss: Tensor) -> list[str]:
        """Return the names of the parameters that a loss depends on; while they are symbolic."""
        reached = {id(node.variable) for node in ancestors(loss) if hasattr(node, "variable")}
        return [name for name, value in zip(self.names, self._symbols) if id(value) in reached]

    def values(self, graph: Graph, replica: int) -> Values:
        """Return the values of all parameters and buffers by slot."""
        found = dict(zip(graph.parameters, self.parameters))
        return {**found, **dict(zip(graph.buffers, self._buffers[replica]))}

    def upload(self) -> None:
        """Copy the host's weights to the device."""
        with torch.no_grad():
            for tensor, host in zip(self.parameters, self._host.values()):
                tensor.copy_(_plain(host))
        self.upload_buffers(list(self._host_buffers))

    def upload_buffers(self, names: list[str]) -> None:
        """Copy some of the host's buffers to the device."""
        with torch.no_grad():
            for copies in self._buffers:
                for tensor, (name, host) in zip(copies, self._host_buffers.items()):
                    if name in names:
                        tensor.copy_(_plain(host))

    def download(self) -> None:
        """Copy the device's weights, and the first replica's buffers, to the host."""
        with torch.no_grad():
            for tensor, host in zip(self.parameters, self._host.values()):
                host.data.copy_(tensor)
            for buffer, host_buffer in zip(self._buffers[0], self._host_buffers.values()):
                host_buffer.data.copy_(buffer)

    def host_pointers(self) -> dict[int, str]:
        """Return the address of every host parameter, as optimizers look it up."""
        return {tensor.data_ptr(): name for name, tensor in self._host.items()}


def _plain(tensor: Tensor) -> Tensor:
    return tensor.data


def _device_copy(tensor: Tensor) -> Tensor:
    plain = _plain(tensor)
    return plain.detach().clone().to(ON_HOST.get(plain.dtype, plain.dtype))


def _copy_parameter(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(_device_copy(tensor), requires_grad=bool(tensor.requires_grad))


def find_loss(losses: list[Tensor], outputs: list[Any]) -> Tensor:
    """Return the one loss that feeds no other loss.

    Raises:
        Error: None, several, one that is not a scalar, or one that is not returned.
    """
    unique = [loss for loss in {id(loss): loss for loss in losses}.values() if loss.grad_fn]
    if not unique:
        raise backend_error("Couldn't find a loss in graph!")
    below = [(loss, ancestors(loss)) for loss in unique]
    independent = [
        loss
        for loss in unique
        if not any(loss is not other and loss.grad_fn in nodes for other, nodes in below)
    ]
    if len(independent) > 1:
        raise backend_error(
            f"Multiple independent losses found ({len(independent)}): combine them and mark the "
            "result with poptorch.identity_loss"
        )
    (loss,) = independent
    if loss.numel() != 1:
        raise backend_error(
            f"The loss has shape {tuple(loss.shape)}: it must be a scalar; reduce it, for "
            "example with poptorch.identity_loss(loss, 'mean')"
        )
    if not any(_depends(value, loss) for value in outputs):
        raise backend_error(
            "The loss is not among the outputs of the model: forward() must return it"
        )
    return loss


def _depends(value: Any, loss: Tensor) -> bool:
    if value is loss:
        return True
    return (
        isinstance(value, Tensor)
        and value.grad_fn is not None
        and (value.grad_fn is loss.grad_fn or loss.grad_fn in ancestors(value))
    )


def ancestors(tensor: Tensor) -> set[Any]:
    """Return all nodes of the autograd graph below a tensor, without its own."""
    found: set[Any] = set()
    waiting = [tensor.grad_fn]
    while waiting:
        node = waiting.pop()
        for child, _ in getattr(node, "next_functions", ()):
            if child is not None and child not in found:
                found.add(child)
                waiting.append(child)
    return found


@contextlib.contextmanager
def modes(model: nn.Module, flags: list[bool]) -> Iterator[None]:
    """Give every module the training flag that it was compiled with."""
    modules = list(model.modules())
    before = [module.training for module in modules]
    for module, flag in zip(modules, flags):
        module.training = flag
    try:
        yield
    finally:
        for module, flag in zip(modules, before):
            module.training = flag


@contextlib.contextmanager
def random_numbers(seed: int | None) -> Iterator[None]:
    """Draw from a generator of one micro-batch, or from torch's own when there is no seed."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
