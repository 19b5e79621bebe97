"""The executable behind a poptorch program: same door as the local target's.

The device holds weights and optimizer state while it trains; they come back for checkpoints,
evaluation on the host and ``state_dict``. Gradients never come back.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ipu_pipeline.backends.ipu.annotations import Annotation
from ipu_pipeline.backends.ipu.check import is_power_of_two
from ipu_pipeline.backends.ipu.optimizers import (
    device_groups,
    group_values,
    read_state,
    write_state,
)
from ipu_pipeline.backends.ipu.runtime.device import make_optimizer, make_options, mean_loss
from ipu_pipeline.backends.ipu.runtime.placement import Placement
from ipu_pipeline.backends.ipu.runtime.static_graph import DeviceForward, is_changed
from ipu_pipeline.backends.ipu.settings import PopTorchSettings
from ipu_pipeline.errors import LoweringError
from ipu_pipeline.ir.plan import Plan
from ipu_pipeline.stages.executable import EvalResult, Executable, StepResult


class PopTorchExecutable(Executable):
    """Runs a plan on IPUs through poptorch; the first step compiles.

    Args:
        model: The user's model; annotated until :meth:`close`, then as it was.
        plan: The split.
        optimizer: A torch optimizer over the model's parameters; needed to train.
        annotations: Of the plan.
        settings: Of the plan.
        poptorch: The front end.

    Raises:
        LoweringError: Another executable of the model is open.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: Plan,
        optimizer: torch.optim.Optimizer | None,
        annotations: tuple[Annotation, ...],
        settings: PopTorchSettings,
        poptorch: Any,
    ) -> None:
        if is_changed(model):
            raise LoweringError(
                "the model is compiled already; close() that executable before compiling it again"
            )
        super().__init__(model, plan, optimizer)
        self.settings = settings
        self._flat = settings.to_json()
        self.batch_divisor = plan.total_batch_size * self._flat["device_iterations"]
        self._poptorch = poptorch
        self._class = type(model)
        self._modes = [(module, module.training) for module in model.modules()]
        self._placement = Placement(
            model, [item.to_json() for item in annotations], plan.model.parameters, poptorch
        )
        self._forward = DeviceForward(model, poptorch)
        self._sessions = Sessions(
            model, self._placement, self._forward, optimizer, self._flat, poptorch
        )
        self._closed = False

    # ---- steps --------------------------------------------------------------------------

    def train_step(self, batch: Mapping[str, Any]) -> StepResult:
        """Run ``device_iterations`` optimizer steps (normally one) in one call of the device.

        ``StepResult.loss`` is the mean over the microbatches of every replica under the output
        modes ``all`` and ``sum``; under ``final`` and ``default`` the device gives back only the
        last microbatch of every replica, and the loss is the mean of these. The weights are the
        same under every mode.

        Args:
            batch: Tensors with axis 0 = device iterations x microbatches x replicas x micro
                batch, in this order.

        Raises:
            LoweringError: There is no optimizer, axis 0 has another size, or poptorch refuses to
                compile the model.
        """
        self._require_open()
        optimizer = self.trained_optimizer()
        size = self._check_size(batch)
        loss = mean_loss(self._sessions.train(batch), self._flat)
        # The device stepped; torch's schedulers look for this mark before they warn.
        optimizer._opt_called = True  # type: ignore[attr-defined]
        result = StepResult(loss, None, num_samples=size)
        return self.stepped(result, self._flat["device_iterations"])

    def forward_backward(self, batch: Mapping[str, Any]) -> float:  # noqa: ARG002
        """Refuse: gradients stay on the device.

        Raises:
            LoweringError: Always.
        """
        raise LoweringError(
            "gradients stay on the IPU, so forward_backward cannot leave them on the model; use "
            "train_step, or the local target"
        )

    def eval_step(self, batch: Mapping[str, Any]) -> EvalResult:
        """Run the model in evaluation mode.

        Samples that fill no whole call of the device run on the host, with the same weights. The
        loss is the mean over the samples, each with the loss of its microbatch: where a model
        weighs tokens instead of samples, another cut of the batch gives a slightly other mean.

        Raises:
            LoweringError: Axis 0 differs between tensors, or poptorch refuses to compile.
        """
        self._require_open()
        sizes = {v.shape[0] for v in batch.values() if isinstance(v, Tensor) and v.ndim}
        if len(sizes) != 1:
            raise LoweringError(f"axis 0 of the batch's tensors must be equal, got {sorted(sizes)}")
        size, flat = sizes.pop(), self._flat
        copies = flat["inference_device_iterations"] * flat["inference_replication_factor"]
        call = self.plan.micro_batch_size * copies
        whole = size - size % call
        parts = [
            (call, self._sessions.evaluate(rows(batch, start, start + call)))
            for start in range(0, whole, call)
        ]
        if whole < size:
            parts.append((size - whole, self._on_host(rows(batch, whole, size))))
        return join(parts).nested()

    def data_loader(self, dataset: Any, **options: Any) -> Any:
        """Return a ``poptorch.DataLoader`` whose batches are what :meth:`train_step` takes.

        Args:
            dataset: Rows as dicts of tensors.
            **options: Of ``poptorch.DataLoader`` (``shuffle``, ``num_workers``, ``mode``, ...).
        """
        return self._poptorch.DataLoader(
            make_options(self._flat, self._poptorch),
            dataset,
            batch_size=self.plan.micro_batch_size,
            **options,
        )

    # ---- state --------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Tensor]:
        """Return the model's own state dict, fetched from the device."""
        self._sessions.fetch_weights()
        return {name: value.detach().clone() for name, value in self.model.state_dict().items()}

    def save_checkpoint(self, path: str | Path, *args: Any, **options: Any) -> Path:
        """Write a checkpoint of what the device holds, as :class:`Executable` says."""
        self._require_open()
        self.wait_for_checkpoint()
        self._sessions.fetch_weights()
        if self.optimizer is not None:
            read_state(self.optimizer, self._sessions.optimizer_state(), self.model)
        with self._as_made():
            return super().save_checkpoint(path, *args, **options)

    def load_checkpoint(self, path: str | Path) -> dict[str, Any]:
        """Restore a checkpoint written by any target; the program is compiled again."""
        self._require_open()
        self.wait_for_checkpoint()
        self._sessions.release()
        with self._as_made():
            return super().load_checkpoint(path)

    def save_executable(
        self, path: str | Path, batch: Mapping[str, Any], *, offline_ipu_version: int | None = None
    ) -> Path:
        """Compile the training program for the shapes of ``batch`` and write it to ``path``.

        The model itself is not in the file.

        Args:
            path: File for the executable.
            batch: As for :meth:`train_step`; its values are not used.
            offline_ipu_version: Compile for IPUs that are not here (2: Mk2, 21: Bow); the program
                is then only written, not kept.

        Raises:
            LoweringError: The folder does not exist; compiled already for IPUs that are here; the
                offline compiler cannot round up the number of IPUs.
        """
        self._require_open()
        self._check_size(batch)
        if not Path(path).parent.is_dir():  # said now, not after an hour of compiling
            raise LoweringError(f"{Path(path).parent} is no folder; make it first")
        if offline_ipu_version is not None:
            self._check_offline()
        executor = self._sessions.attach_training(offline_ipu_version=offline_ipu_version)
        try:
            executor.compileAndExport(str(path), export_model=False, **batch)
        except BaseException:
            self._sessions.release()
            raise
        if offline_ipu_version is not None:
            self._sessions.release()
        return Path(path)

    def load_executable(self, path: str | Path) -> None:
        """Take the training program from ``path`` instead of compiling it.

        Raises:
            LoweringError: It is compiled already, or the file is of another version of poptorch.
        """
        self._require_open()
        executor = self._sessions.attach_training()
        if executor.isCompiled():
            raise LoweringError("the model is compiled already; load the executable before it runs")
        try:
            executor.loadExecutable(str(path))
        except self._poptorch.Error as error:
            self._sessions.release()
            raise LoweringError(f"poptorch cannot load {path}: {error}") from error

    def close(self) -> None:
        """Fetch the weights, free the IPUs, and leave the model as it was."""
        if self._closed:
            return
        self._closed = True
        try:
            self._sessions.fetch_weights()
        finally:  # also when the device is lost
            self._sessions.release()
            self._forward.restore()
            self._placement.undo()
            for module, mode in self._modes:
                module.training = mode
        self.wait_for_checkpoint()

    @contextlib.contextmanager
    def _as_made(self) -> Iterator[None]:
        """While it lasts, the model has its own class and forward (poptorch wraps both)."""
        wrapped = self.model.__class__
        self.model.__class__ = self._class
        try:
            with self._forward.restored():
                yield
        finally:
            self.model.__class__ = wrapped

    # ---- evaluation ---------------------------------------------------------------------

    def _on_host(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        self._sessions.fetch_weights()
        self.model.eval()
        with torch.no_grad():
            values = self.model(**batch)
        return dict(zip(self._forward.names, values, strict=True))

    # ---- checks -------------------------------------------------------------------------

    def _check_size(self, batch: Mapping[str, Any]) -> int:
        flat, wanted = self._flat, self.plan.total_batch_size * self._flat["device_iterations"]
        sizes = {n: v.shape[0] for n, v in batch.items() if isinstance(v, Tensor) and v.ndim}
        if any(size != wanted for size in sizes.values()):
            raise LoweringError(
                f"axis 0 of the batch must be {wanted} = device iterations "
                f"{flat['device_iterations']} x microbatches {self.plan.num_microbatches} x "
                f"replicas {self.plan.replicas} x micro batch {self.plan.micro_batch_size}, got "
                f"{sizes}; drop the last short batch (dataloader_drop_last)"
            )
        return int(wanted)

    def _check_offline(self) -> None:
        if self._sessions.training is not None:
            raise LoweringError(
                "the training program is made already for IPUs that are here; save an executable "
                "for others before the first step"
            )
        total = self._flat["ipus_per_replica"] * self._flat["replication_factor"]
        if not is_power_of_two(total):
            raise LoweringError(
                f"an offline compilation does not round up the number of IPUs, and {total} = "
                f"{self._flat['ipus_per_replica']} x {self._flat['replication_factor']} replicas "
                "is no power of two; change the IPUs of a replica"
            )

    def _require_open(self) -> None:
        if self._closed:
            raise LoweringError("this executable is closed; compile the model again")


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


def rows(batch: Mapping[str, Any], start: int, stop: int) -> dict[str, Any]:
    """Return the samples from ``start`` to ``stop``; what has no axis 0 goes whole."""
    return {
        name: value[start:stop] if isinstance(value, Tensor) and value.ndim else value
        for name, value in batch.items()
    }


def join(parts: Sequence[tuple[int, Mapping[str, Tensor]]]) -> EvalResult:
    """Return the results of all calls: outputs joined on axis 0, the loss weighed by samples.

    Args:
        parts: Samples of each call, and its tensors by name; ``loss`` has one entry per microbatch
            of equal size.
    """
    loss = None
    if "loss" in parts[0][1]:
        weighed = [float(values["loss"].float().mean()) * samples for samples, values in parts]
        loss = sum(weighed) / sum(samples for samples, _ in parts)
    outputs = {
        name: torch.cat([values[name] for _, values in parts])
        for name in parts[0][1]
        if name != "loss"
    }
    return EvalResult(loss, outputs)
