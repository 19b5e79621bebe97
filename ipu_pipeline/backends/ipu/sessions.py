"""The two programs of one model, training and evaluation: they take turns on the IPUs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ipu_pipeline.backends.ipu.optimizers import device_groups, group_values, write_state
from ipu_pipeline.backends.ipu.runtime.device import make_optimizer, make_options
from ipu_pipeline.backends.ipu.runtime.placement import Placement
from ipu_pipeline.backends.ipu.runtime.static_graph import DeviceForward
from ipu_pipeline.errors import LoweringError
from ipu_pipeline.stages.executable import EvalResult


class Sessions:
    """Makes the executors when they are needed, and has at most one on the IPUs.

    Args:
        model: The annotated model.
        placement: Its annotations.
        forward: What the model's forward is while it is on the device.
        optimizer: The user's torch optimizer; ``None`` for evaluation only.
        settings: The flat object of ``settings.json``.
        poptorch: The front end.

    Attributes:
        training: The executor that trains, once there is one.
        inference: The executor that evaluates, once there is one.
        device_optimizer: What ``training`` was given.
    """

    def __init__(
        self,
        model: nn.Module,
        placement: Placement,
        forward: DeviceForward,
        optimizer: torch.optim.Optimizer | None,
        settings: Mapping[str, Any],
        poptorch: Any,
    ) -> None:
        self.training: Any = None
        self.inference: Any = None
        self.device_optimizer: Any = None
        self._model = model
        self._placement = placement
        self._forward = forward
        self._optimizer = optimizer
        self._settings = settings
        self._poptorch = poptorch
        # poptorch puts other classes in the place of these.
        things = (model, *model.parameters(), *model.buffers())
        self._own = [(thing, type(thing)) for thing in things]
        self._sent: list[dict[str, Any]] = []
        self._evaluated: frozenset[str] = frozenset()
        self._result_names: list[str] = []

    def train(self, batch: Mapping[str, Any]) -> Any:
        """Run one call of the training program on ``batch`` and return its losses.

        Raises:
            LoweringError: poptorch refuses to compile the model.
        """
        executor = self.attach_training()
        values = group_values(self._required_optimizer())
        if values != self._sent:
            executor.setOptimizer(self._make_optimizer())
            self._sent = values
        return self._call(executor, batch)

    def evaluate(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Run one call of the evaluation program on ``batch`` and return its tensors by name.

        Raises:
            LoweringError: poptorch refuses to compile the model.
        """
        executor = self._attach_inference(frozenset(batch))
        is_new = not executor.isCompiled()
        values = self._call(executor, batch)
        if is_new:  # a compiled program never calls forward again
            self._result_names = list(self._forward.names)
        return dict(zip(self._result_names, values, strict=True))

    def attach_training(self, *, offline_ipu_version: int | None = None) -> Any:
        """Return the executor that trains; if it is compiled, it is on the IPUs.

        Args:
            offline_ipu_version: Compile for these IPUs, which are not here.
        """
        self._detach(self.inference)
        if self.training is None:
            options = make_options(self._settings, self._poptorch)
            options.setExecutionStrategy(self._placement.strategy())
            if offline_ipu_version is not None:
                options.useOfflineIpuTarget(offline_ipu_version)
            self.device_optimizer = self._make_optimizer()
            self._sent = group_values(self._required_optimizer())
            self._hand_over_state()
            self._model.train()
            self.training = self._poptorch.trainingModel(
                self._model, options, self.device_optimizer
            )
        elif self.training.isCompiled() and not self.training.isAttachedToDevice():
            self.training.attachToDevice()
        return self.training

    def optimizer_state(self) -> dict[str, Any]:
        """Return the device's optimizer state by its names; empty before the first step."""
        if self.training is None or not self.training.isCompiled():
            return {}
        return self.device_optimizer.state_dict()["ipu_state"] or {}

    def fetch_weights(self) -> None:
        """Bring the host's weights up to date."""
        if self.training is not None and self.training.isCompiled():
            self.training.copyWeightsToHostIfNeeded()

    def release(self) -> None:
        """Free the IPUs; weights come back, the programs are gone, classes are the user's."""
        for executor in (self.inference, self.training):
            if executor is not None:
                executor.destroy()
        self.training = self.inference = self.device_optimizer = None
        # An executor that was never compiled does not unwrap the model when it is destroyed.
        for thing, kind in self._own:
            thing.__class__ = kind

    def _call(self, executor: Any, batch: Mapping[str, Any]) -> Any:
        if executor.isCompiled():
            return executor(**batch)
        try:
            return executor(**batch)
        except self._poptorch.Error as error:
            self.release()
            raise LoweringError(f"poptorch cannot compile the model: {error}") from error
        except BaseException:
            self.release()
            raise

    def _attach_inference(self, names: frozenset[str]) -> Any:
        self._detach(self.training)
        if self.inference is not None and names != self._evaluated:
            self.inference.destroy()  # compiled for other inputs, such as labels
            self.inference = None
        self._evaluated = names
        if self.inference is None:
            options = make_options(self._settings, self._poptorch, inference=True)
            deep = self._settings["num_stages"]
            pipelined = self._settings["inference_device_iterations"] >= deep
            options.setExecutionStrategy(self._placement.strategy(pipelined=pipelined))
            self._model.eval()
            self.inference = self._poptorch.inferenceModel(self._model, options)
        elif self.inference.isCompiled() and not self.inference.isAttachedToDevice():
            self.inference.attachToDevice()
        return self.inference

    def _detach(self, executor: Any) -> None:
        if executor is not None and executor.isCompiled() and executor.isAttachedToDevice():
            executor.detachFromDevice()

    def _make_optimizer(self) -> Any:
        groups = device_groups(self._required_optimizer())
        return make_optimizer(self._settings, groups, self._poptorch)

    def _hand_over_state(self) -> None:
        state = write_state(self._required_optimizer(), self._model)
        if state:
            own = self.device_optimizer.state_dict()
            scaling = {"lossScaling": self._settings["loss_scaling"]}
            self.device_optimizer.load_state_dict({**own, "ipu_state": state, "ipu_param": scaling})

    def _required_optimizer(self) -> torch.optim.Optimizer:
        if self._optimizer is None:
            raise LoweringError("training needs an optimizer; pass one to compile(optimizer=...)")
        return self._optimizer


@dataclass(frozen=True)
class CallResult:
    """Results of one call of the device, or of the rest of a batch on the host.

    Attributes:
        num_samples: Samples of the call.
        values: Tensors by name; ``loss`` has one entry per microbatch of equal size.
    """

    num_samples: int
    values: Mapping[str, Tensor]


def rows(batch: Mapping[str, Any], start: int, stop: int) -> dict[str, Any]:
    """Return the samples from ``start`` to ``stop``; what has no axis 0 goes whole."""
    return {
        name: value[start:stop] if isinstance(value, Tensor) and value.ndim else value
        for name, value in batch.items()
    }


def join(parts: Sequence[CallResult]) -> EvalResult:
    """Return the results of all calls: outputs joined on axis 0, the loss weighed by samples."""
    total = sum(part.num_samples for part in parts)
    loss = None
    if "loss" in parts[0].values:
        weighed = [float(p.values["loss"].float().mean()) * p.num_samples for p in parts]
        loss = sum(weighed) / total
    outputs = {
        name: torch.cat([part.values[name] for part in parts])
        for name in parts[0].values
        if name != "loss"
    }
    return EvalResult(loss, outputs)
