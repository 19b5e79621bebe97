"""``PoplarExecutor``: a model compiled for the (emulated) device."""

from __future__ import annotations

import contextlib
import logging
import time
from typing import Any

import torch
from torch import Tensor, nn

from . import saving, sync
from .compile import bind_inputs, effective_options, group_of_parameters, record, values_of
from .counters import PerfCounters
from .device import Weights
from .device_optimizer import DeviceOptimizer
from .enums import ConnectionType
from .errors import createPoptorchError
from .optim import Optimizer
from .optim_base import changed_constant, popart_type
from .options import Options
from .options_base import require, require_type
from .program import Program
from .structure import Counts, check_inputs, same_signature, signature_of
from .training import DeviceProgram, SeedHook
from .version import __version__

_LOG = logging.getLogger("poptorch")


class PoplarExecutor(PerfCounters):
    """Runs a model on the emulated device; made by ``trainingModel`` and ``inferenceModel``.

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
        if training:
            self._link = sync.Link(model, self._download, self.destroy)
        _LOG.info(
            "ipu_pipeline's poptorch stand-in %s (no IPU, no Graphcore SDK): %s model %s runs on "
            "the CPU",
            __version__,
            "training" if training else "inference",
            type(model).__name__,
        )

    # ------------------------------------------------------------------ reading
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

    # ------------------------------------------------------------------ compiling
    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Record the program and check it; a second call does nothing but warn."""
        if self._program is not None:
            _LOG.warning("Call to compile() ignored: the model is compiled already")
            return
        self._compile(bind_inputs(self._model, args, kwargs))
        if self._options.connection_type is ConnectionType.Always:
            self._attached = True

    def _compile(self, inputs: Any) -> None:
        started = time.perf_counter()
        counts = Counts.of(self._options)
        require(
            self._options.Distributed.numProcesses == 1,
            "The stand-in runs one process: Distributed.numProcesses must be 1",
        )
        check_inputs(inputs, counts)
        self._fetch_training_weights()
        weights = Weights(self._model, counts.replicas)
        flags = [module.training for module in self._model.modules()]
        flags[0] = self._root_flag
        optimizer = None
        if self._training:
            groups = group_of_parameters(self._optimizer, weights)
            optimizer = DeviceOptimizer(values_of(self._optimizer), groups)
        self._program = record(
            self._model, self._options, weights, inputs, flags, training=self._training
        )
        self._weights = weights
        self._device = DeviceProgram(self._model, self._options, weights, flags, optimizer)
        self._device.seed_hook = self._seed_hook
        self._signature = signature_of(inputs)
        self._examples = saving.examples_of(inputs)
        if isinstance(self._optimizer, Optimizer):
            self._optimizer._read_device = self._download_optimizer
            self._load_optimizer_state(force=bool(self._optimizer.ipu_state))
        self.compile_seconds = time.perf_counter() - started

    def compileAndExport(
        self, filename: str, *args: Any, export_model: bool = True, **kwargs: Any
    ) -> None:
        """Compile and write the executable to a file."""
        if self._program is None:
            self._compile(bind_inputs(self._model, args, kwargs))
        self.save(filename, export_model=export_model)

    def save(self, filename: str, export_model: bool = True, save_rng_state: bool = True) -> None:
        """Write the executable to a file; a folder gets ``model.poptorch``."""
        self._require_compiled("save()")
        self.copyWeightsToHostIfNeeded()
        self._download_optimizer()
        content = {
            "training": self._training,
            "options": self._options.clone(),
            "examples": self._examples,
            "rng_state": self.rng_state if save_rng_state else None,
            "model": self._model if export_model else None,
            "optimizer": self._optimizer if export_model else None,
        }
        with self._link.unwrapped() if self._link else contextlib.nullcontext():
            saving.write(content, filename)

    def loadExecutable(self, filename: str) -> None:
        """Load an executable; the model is traced again on inputs of the saved shapes.

        Raises:
            Error: Compiled already, or an executable of another version.
        """
        if self._program is not None:
            raise createPoptorchError("loadExecutable(): the model is compiled already")
        content = saving.read(filename)
        self._compile(saving.inputs_like(content["examples"]))
        if content["rng_state"] is not None:
            self.rng_state = content["rng_state"]

    # ------------------------------------------------------------------ running
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Compile on the first call, then run.

        Raises:
            AssertionError: The options say never to connect, or a wrong batch dimension.
            Error: Inputs that differ from those compiled for.
        """
        require(
            self._options.connection_type is not ConnectionType.Never,
            "Trying to run a model on an offline device (ConnectionType.Never): use compile() or "
            "compileAndExport()",
        )
        inputs = bind_inputs(self._model, args, kwargs)
        if self._program is None:
            self._compile(inputs)
        self._check_call(inputs)
        assert self._device is not None
        if not self._attached:
            self.attachToDevice()
        self._upload_if_needed()
        started = time.perf_counter()
        outputs = self._device.run(inputs)
        self.note_call(started, time.perf_counter(), inputs, outputs)
        if self._link is not None:
            self._link.device_is_newer = True
        return outputs

    def _check_call(self, inputs: Any) -> None:
        check_inputs(inputs, Counts.of(self._options))
        found = signature_of(inputs)
        if not same_signature(self._signature, found):
            raise createPoptorchError(
                f"The inputs differ from those the model was compiled for: got {found}, compiled "
                f"for {self._signature}; shapes, types, structure and constants must be the same"
            )

    def _upload_if_needed(self) -> None:
        self._fetch_training_weights()
        link = sync.link_of(self._model)
        if self._link is None and link is not None and link.version != self._seen_version:
            self._upload_needed = True
            self._seen_version = link.version
        if self._upload_needed:
            self.copyWeightsToDevice()
        self._load_optimizer_state(force=False)

    def _fetch_training_weights(self) -> None:
        link = sync.link_of(self._model)
        if link is not None and link is not self._link:
            link.fetch_if_newer()

    # ------------------------------------------------------------------ device
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

    # ------------------------------------------------------------------ optimizer
    def setOptimizer(self, optimizer: Any) -> None:
        """Give the device the values of an optimizer; needed after every change.

        Raises:
            ValueError: It accumulates in float16 and the compiled one did not.
            Error: A constant, the type or the clipping changed.
        """
        require(self._training, "setOptimizer() needs a training model")
        popart_type(optimizer)
        if self._device is not None and self._device.optimizer is not None:
            self._change_optimizer(optimizer, self._device.optimizer)
        else:
            self._options = effective_options(self._options, True, optimizer)
        self._optimizer = optimizer

    def _change_optimizer(self, optimizer: Any, device: DeviceOptimizer) -> None:
        values = values_of(optimizer)
        if values["accumType"] != device.values["accumType"]:
            raise ValueError(
                f"The accumulation type cannot change after compilation, from "
                f"{device.values['accumType']} to {values['accumType']}"
            )
        changed = changed_constant(device.values, values)
        if changed:
            raise createPoptorchError(
                f"setOptimizer() cannot change {changed} after compilation: pass the argument "
                "explicitly when the optimizer is made, or markAsVariable() it"
            )
        device.values = values
        if isinstance(optimizer, Optimizer):
            optimizer._read_device = self._download_optimizer

    def _download_optimizer(self) -> None:
        if self._device is None or self._device.optimizer is None:
            return
        if isinstance(self._optimizer, Optimizer) and not self._optimizer._state_is_new:
            state = self._device.optimizer.state
            self._optimizer.ipu_state = {key: value.clone() for key, value in state.items()}
            self._optimizer.ipu_param = {"lossScaling": self._device.optimizer.loss_scaling}

    def _load_optimizer_state(self, *, force: bool) -> None:
        optimizer = self._optimizer
        if not isinstance(optimizer, Optimizer) or not (force or optimizer._state_is_new):
            return
        assert self._device is not None
        assert self._device.optimizer is not None
        self._device.optimizer.load(optimizer.ipu_state)
        optimizer._state_is_new = False

    # ------------------------------------------------------------------ random numbers
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
