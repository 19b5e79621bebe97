"""``PoplarExecutor``: a model compiled for the (emulated) device."""

from __future__ import annotations

import contextlib
import logging
import time
from typing import Any

from torch import Tensor

from . import saving
from .compile import bind_inputs, effective_options, group_of_parameters, record, values_of
from .device import Weights
from .device_optimizer import DeviceOptimizer
from .enums import ConnectionType
from .errors import createPoptorchError
from .executor_base import DeviceModel
from .optim import Optimizer
from .optim_base import changed_constant, popart_type
from .options_base import require
from .rules import check_options
from .structure import Counts, check_inputs, in_order_of, same_signature, signature_of
from .training import GRADIENT, DeviceProgram

_LOG = logging.getLogger("poptorch")


class PoplarExecutor(DeviceModel):
    """Runs a model on the emulated device; made by ``trainingModel`` and ``inferenceModel``.

    Args: those of :class:`DeviceModel`.
    """

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
        check_options(self._options)
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
        self._device = DeviceProgram(
            self._program.graph, self._program.trained, self._options, weights, optimizer
        )
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
        inputs = in_order_of(self._signature, inputs)
        assert self._device is not None
        if not self._attached:
            self.attachToDevice()
        self._upload_if_needed()
        self._load_optimizer_state(force=False)
        started = time.perf_counter()
        outputs = self._device.run(inputs)
        self.note_call(started, time.perf_counter(), inputs, outputs)
        if self._link is not None:
            self._link.device_is_newer = True
        return outputs

    def getTensorNames(self) -> list[str]:
        """Return the names of the tensors that can be anchored: parameters' gradients."""
        self._require_compiled("getTensorNames()")
        return [GRADIENT + name for name in self.program.trained] if self._training else []

    def getAnchoredTensor(self, short_name: str) -> Tensor:
        """Return what the last call kept of a tensor named by ``Options.anchorTensor``.

        Raises:
            Error: Not compiled, not run, or no such tensor.
        """
        self._require_compiled("getAnchoredTensor()")
        anchors = self._options.anchored_tensors
        if short_name not in anchors:
            raise createPoptorchError(f"{short_name!r} is not anchored, only {sorted(anchors)} are")
        assert self._device is not None
        return self._device.anchored(anchors[short_name][0])

    def _check_call(self, inputs: Any) -> None:
        check_inputs(inputs, Counts.of(self._options))
        found = signature_of(inputs)
        if not same_signature(self._signature, found):
            raise createPoptorchError(
                f"The inputs differ from those the model was compiled for: got {found}, compiled "
                f"for {self._signature}; shapes, types, structure and constants must be the same"
            )

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

    def _load_optimizer_state(self, *, force: bool) -> None:
        optimizer = self._optimizer
        if not isinstance(optimizer, Optimizer) or not (force or optimizer._state_is_new):
            return
        assert self._device is not None
        assert self._device.optimizer is not None
        self._device.optimizer.load(optimizer.ipu_state or {})
        optimizer._state_is_new = False
