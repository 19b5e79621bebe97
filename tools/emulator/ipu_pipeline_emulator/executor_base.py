"""The part of an executor that owns the device: weights up and down, attaching, random numbers."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn

from . import sync
from .compile import effective_options
from .counters import PerfCounters
from .device import Weights
from .enums import ConnectionType
from .errors import createPoptorchError
from .optim import Optimizer
from .options import Options
from .options_base import require, require_type
from .program import Program
from .training import DeviceProgram, SeedHook
from .version import __version__

_LOG = logging.getLogger("poptorch")


class DeviceModel(PerfCounters):
    """A user's model and its copy on the emulated device.

    Args:
        model: The user's model.
        options: Frozen by this; the executor works on a copy.
        training: Train, with ``optimizer``.
        optimizer: A poptorch or torch optimizer.
    """

    def __init__(
        self, model: nn.Module, options: Options | None, *, training: bool, optimizer: Any = None
    ) -> None:
        super().__init__()
        require_type(model, nn.Module, "the model")
        given = Options() if options is None else options
        require_type(given, Options, "options")
        given._freeze()
        self._options = effective_options(given, training, optimizer)
        self._training = training
        self._optimizer = optimizer
        self._model = model
        self._root_flag = model.training
        self._program: Program | None = None
        self._device: DeviceProgram | None = None
        self._weights: Weights | None = None
        self._signature: Any = None
        self._examples: Any = None
        self._attached = False
        self._upload_needed = True
        self._seen_version = -1
        self._seed_hook: SeedHook = None
        self._link: sync.Link | None = None
        name = type(model).__name__
        if training:
            self._link = sync.Link(model, self._download, self.destroy)
        _LOG.info(
            "ipu_pipeline's poptorch stand-in %s (no IPU, no Graphcore SDK): %s model %s runs on "
            "the CPU",
            __version__,
            "training" if training else "inference",
            name,
        )

    @property
    def options(self) -> Options:
        """The effective, frozen options."""
        return self._options

    @property
    def model(self) -> nn.Module:
        """The user's model."""
        return self._model

    @property
    def program(self) -> Program:
        """The recorded program (stand-in only).

        Raises:
            Error: Not compiled.
        """
        self._require_compiled("reading the program")
        assert self._program is not None
        return self._program

    def setSeedHook(self, hook: SeedHook) -> None:
        """Seed every micro-batch by (update, accumulation step, replica) (stand-in only)."""
        self._seed_hook = hook
        if self._device is not None:
            self._device.seed_hook = hook

    def __getattr__(self, name: str) -> Any:
        model = self.__dict__.get("_model")
        if model is None or name.startswith("__"):
            raise AttributeError(name)
        return getattr(model, name)

    def isCompiled(self) -> bool:
        """Tell whether there is a program."""
        return self._program is not None

    def isAttachedToDevice(self) -> bool:
        """Tell whether the program is on the device."""
        return self._attached

    def attachToDevice(self) -> None:
        """Take the device.

        Raises:
            AssertionError: The options say never to connect.
            Error: Not compiled, or attached already.
        """
        require(
            self._options.connection_type is not ConnectionType.Never,
            "Trying to attach to an offline device (ConnectionType.Never)",
        )
        self._require_compiled("attachToDevice()")
        if self._attached:
            raise createPoptorchError("attachToDevice(): the model is attached already")
        self._attached = True
        self._upload_needed = True

    def detachFromDevice(self) -> None:
        """Read back weights and optimizer state, and free the device.

        Raises:
            Error: Not compiled, or not attached.
        """
        self._require_compiled("detachFromDevice()")
        if not self._attached:
            raise createPoptorchError("detachFromDevice(): the model is not attached")
        self.copyWeightsToHostIfNeeded()
        self._download_optimizer()
        self._attached = False

    def copyWeightsToHost(self) -> None:
        """Read the device's weights into the user's model."""
        self._require_compiled("copyWeightsToHost()")
        if self._link is not None:
            self._link.device_is_newer = True
            self._link.fetch_if_newer()
        else:
            self._download()

    def copyWeightsToHostIfNeeded(self) -> None:
        """Read the device's weights if they changed since the last read."""
        if self._link is not None:
            self._link.fetch_if_newer()

    def copyWeightsToDevice(self) -> None:
        """Write the weights of the user's model to the device."""
        self._require_compiled("copyWeightsToDevice()")
        assert self._weights is not None
        if self._link is not None:
            self._link.device_is_newer = False
        self._weights.upload()
        self._upload_needed = False

    def copyNamedBuffersToDevice(self) -> None:
        """Write the buffers named in ``Options.updatableNamedBuffers`` to the device."""
        self._require_compiled("copyNamedBuffersToDevice()")
        names = self._options.updatable_named_buffers
        require(bool(names), "copyNamedBuffersToDevice() needs Options.updatableNamedBuffers")
        assert self._weights is not None
        self._weights.upload_buffers(names)

    def load_state_dict(self, state_dict: dict[str, Tensor], strict: bool = True) -> Any:
        """Load weights into the user's model and, if attached, the device."""
        self.copyWeightsToHostIfNeeded()
        found = self._model.load_state_dict(state_dict, strict=strict)
        if self._program is not None:
            self._upload_needed = True
            if self._attached:
                self.copyWeightsToDevice()
        return found

    def destroy(self) -> None:
        """Read the weights back, free the device and unwrap the user's model, if compiled."""
        if self._program is None:
            return
        self.copyWeightsToHostIfNeeded()
        self._download_optimizer()
        if isinstance(self._optimizer, Optimizer):
            self._optimizer._read_device = None
        if self._link is not None:
            self._link.unwrap()
            self._link = None
        self._attached = False
        self._program, self._device, self._weights = None, None, None

    def _download(self) -> None:
        if self._weights is not None:
            self._weights.download()

    def _upload_if_needed(self) -> None:
        self._fetch_training_weights()
        link = sync.link_of(self._model)
        version = -1 if link is None else link.version
        if self._link is None and version != self._seen_version:
            self._upload_needed = True
            self._seen_version = version
        if self._upload_needed:
            self.copyWeightsToDevice()

    def _fetch_training_weights(self) -> None:
        link = sync.link_of(self._model)
        if link is not None and link is not self._link:
            link.fetch_if_newer()

    def _download_optimizer(self) -> None:
        if self._device is None or self._device.optimizer is None:
            return
        if isinstance(self._optimizer, Optimizer) and not self._optimizer._state_is_new:
            state = self._device.optimizer.state
            self._optimizer.ipu_state = {key: value.clone() for key, value in state.items()}
            self._optimizer.ipu_param = {"lossScaling": self._device.optimizer.loss_scaling}

    @property
    def rng_state(self) -> list[int]:
        """State of the device's random numbers; here torch's own generator."""
        self._require_compiled("rng_state")
        return [int(value) for value in torch.get_rng_state()]

    @rng_state.setter
    def rng_state(self, state: list[int]) -> None:
        self._require_compiled("rng_state")
        torch.set_rng_state(torch.tensor(state, dtype=torch.uint8))

    def _require_compiled(self, what: str) -> None:
        if self._program is None:
            raise createPoptorchError(f"{what}: the model has not been compiled yet")
