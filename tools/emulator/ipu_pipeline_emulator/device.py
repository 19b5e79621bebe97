"""The emulated device: its own copy of the weights, and the model run on them."""

from __future__ import annotations

import contextlib
from typing import Any, Iterator

import torch
from torch import Tensor, nn

from .errors import backend_error, createPoptorchError
from .tracing import Watcher


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
            [_plain(tensor).detach().clone() for tensor in self._host_buffers.values()]
            for _ in range(replicas)
        ]
        self._slots = self._find_slots()

    def _find_slots(self) -> list[tuple[dict[str, Any], str, bool, int]]:
        """Return where the model's modules hold parameters and buffers (tied ones: often)."""
        parameter_at = {id(tensor): i for i, tensor in enumerate(self._host.values())}
        buffer_at = {id(tensor): i for i, tensor in enumerate(self._host_buffers.values())}
        slots: list[tuple[dict[str, Any], str, bool, int]] = []
        for module in self._model.modules():
            for held, is_parameter, index_of in (
                (module._parameters, True, parameter_at),
                (module._buffers, False, buffer_at),
            ):
                for key, tensor in held.items():
                    if tensor is not None:
                        slots.append((held, key, is_parameter, index_of[id(tensor)]))
        return slots

    def named_tensors(self, replica: int = 0) -> dict[int, tuple[str, bool]]:
        """Return ``id(tensor)`` to name and whether it is a parameter."""
        found = {id(t): (name, True) for name, t in zip(self.names, self.parameters)}
        for name, tensor in zip(self._host_buffers, self._buffers[replica]):
            found[id(tensor)] = (name, False)
        return found

    @contextlib.contextmanager
    def in_model(self, replica: int) -> Iterator[None]:
        """Put the device's tensors into the user's modules.

        Raises:
            Error: The model replaced a parameter or a buffer while it ran.
        """
        before = [held[key] for held, key, _, _ in self._slots]
        placed = [
            self.parameters[i] if is_parameter else self._buffers[replica][i]
            for _, _, is_parameter, i in self._slots
        ]
        for (held, key, _, _), tensor in zip(self._slots, placed):
            held[key] = tensor
        try:
            yield
            for (held, key, _, _), tensor in zip(self._slots, placed):
                if held.get(key) is not tensor:
                    raise createPoptorchError(
                        f"The parameter or buffer {key!r} was reassigned inside forward(): only "
                        "in-place operations change it on the device"
                    )
        finally:
            for (held, key, _, _), tensor in zip(self._slots, before):
                held[key] = tensor

    @contextlib.contextmanager
    def buffers_kept(self) -> Iterator[None]:
        """Undo what a recording run does to the buffers."""
        saved = [[tensor.clone() for tensor in copies] for copies in self._buffers]
        try:
            yield
        finally:
            for copies, values in zip(self._buffers, saved):
                for tensor, value in zip(copies, values):
                    tensor.copy_(value)

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


def _copy_parameter(tensor: Tensor) -> nn.Parameter:
    copied = tensor.detach().clone()
    return nn.Parameter(copied, requires_grad=bool(tensor.requires_grad))


def find_loss(losses: list[Tensor], outputs: list[Any]) -> Tensor:
    """Return the one loss that feeds no other loss.

    Raises:
        Error: None, several, one that is not a scalar, or one that is not returned.
    """
    unique = [loss for loss in {id(loss): loss for loss in losses}.values() if loss.grad_fn]
    if not unique:
        raise backend_error("Couldn't find a loss in graph!")
    ancestors = [(loss, _ancestors(loss)) for loss in unique]
    independent = [
        loss
        for loss in unique
        if not any(loss is not other and loss.grad_fn in above for other, above in ancestors)
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
        and (value.grad_fn is loss.grad_fn or loss.grad_fn in _ancestors(value))
    )


def _ancestors(tensor: Tensor) -> set[Any]:
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


def run_model(
    model: nn.Module, inputs: tuple[tuple[Any, ...], dict[str, Any]], watcher: Watcher
) -> Any:
    """Call the model while ``watcher`` looks on; with gradients when it is a training one."""
    args, kwargs = inputs
    with torch.set_grad_enabled(watcher.training), watcher:
        return model(*args, **kwargs)


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
