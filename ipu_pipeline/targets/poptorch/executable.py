"""The executable behind a poptorch program: same door as the local target's.

The device holds weights and optimizer state while it trains; they come back for checkpoints,
evaluation on the host and ``state_dict``. Gradients never come back.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from ipu_pipeline.errors import LoweringError
from ipu_pipeline.ir.plan import Plan
from ipu_pipeline.targets.base import EvalResult, StepResult
from ipu_pipeline.targets.checkpoint import read_checkpoint, write_checkpoint
from ipu_pipeline.targets.poptorch.annotations import Annotation
from ipu_pipeline.targets.poptorch.optimizers import (
    device_groups,
    group_values,
    read_state,
    write_state,
)
from ipu_pipeline.targets.poptorch.runtime.optimizer import make_optimizer
from ipu_pipeline.targets.poptorch.runtime.options import make_options
from ipu_pipeline.targets.poptorch.runtime.placement import Placement
from ipu_pipeline.targets.poptorch.runtime.static_graph import static_graph
from ipu_pipeline.targets.poptorch.settings import PopTorchSettings


class PopTorchExecutable:
    """Runs a plan on IPUs through poptorch; the first step compiles.

    Args:
        model: The user's model; annotated until :meth:`close`, then as it was.
        plan: The split.
        optimizer: A torch optimizer over the model's parameters; needed to train.
        annotations: Of the plan.
        settings: Of the plan.
        poptorch: The front end.
    """

    batch_divisor: int | None = None

    def __init__(
        self,
        model: nn.Module,
        plan: Plan,
        optimizer: torch.optim.Optimizer | None,
        annotations: tuple[Annotation, ...],
        settings: PopTorchSettings,
        poptorch: Any,
    ) -> None:
        self.model = model
        self.plan = plan
        self.optimizer = optimizer
        self.global_step = 0
        self.settings = settings
        self._flat = settings.to_json()
        self._poptorch = poptorch
        self._class = type(model)
        self._placement = Placement(
            model, [item.to_json() for item in annotations], plan.model.parameters, poptorch
        )
        self._result_names: list[str] = []
        self._plain_forward = model.forward
        model.forward = self._patched_forward()
        self._training: Any = None
        self._inference: Any = None
        self._sent: list[dict[str, Any]] = []
        self._closed = False

    # ---- steps --------------------------------------------------------------------------

    def train_step(self, batch: Mapping[str, Any]) -> StepResult:
        """Run ``device_iterations`` optimizer steps (normally one) in one call of the device.

        Args:
            batch: Tensors with axis 0 = device iterations x microbatches x replicas x micro
                batch, in this order.

        Raises:
            LoweringError: There is no optimizer, or axis 0 has another size.
        """
        self._require_open()
        if self.optimizer is None:
            raise LoweringError("train_step needs an optimizer; pass one to compile(optimizer=...)")
        iterations = self._flat["device_iterations"]
        size = self._check_size(batch, self.plan.total_batch_size * iterations)
        executor = self._attach_training()
        values = group_values(self.optimizer)
        if values != self._sent:
            executor.setOptimizer(self._device_optimizer())
            self._sent = values
        losses = executor(**batch)
        self.global_step += iterations
        return StepResult(float(losses.float().mean()), None, num_samples=size)

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

        Samples that fill no whole call of the device run on the host, with the same weights.
        """
        self._require_open()
        sizes = {v.shape[0] for v in batch.values() if isinstance(v, Tensor) and v.ndim}
        if len(sizes) != 1:
            raise LoweringError(f"axis 0 of the batch's tensors must be equal, got {sorted(sizes)}")
        size, call = sizes.pop(), self._inference_call_size()
        whole = size - size % call
        parts = [self._on_device(batch, start, call) for start in range(0, whole, call)]
        if whole < size:
            parts.append(self._on_host(batch, whole, size))
        return _join(parts)

    # ---- state --------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Tensor]:
        """Return the model's own state dict, fetched from the device."""
        self._fetch_weights()
        return {name: value.detach().clone() for name, value in self.model.state_dict().items()}

    def save_checkpoint(self, path: str | Path, extra: Mapping[str, Any] | None = None) -> Path:
        """Write weights, optimizer, step counter and ``extra`` (JSON data) atomically."""
        self._fetch_weights()
        if self.optimizer is not None and self._training is not None:
            state = self._training_optimizer.state_dict()["ipu_state"]
            read_state(self.optimizer, state or {}, self.model)
        with _OwnClass(self.model, self._class, self._plain_forward):
            return write_checkpoint(
                path,
                model=self.model,
                optimizer=self.optimizer,
                global_step=self.global_step,
                extra=extra,
            )

    def load_checkpoint(self, path: str | Path) -> dict[str, Any]:
        """Restore a checkpoint written by any target; the program is compiled again."""
        self._release()
        with _OwnClass(self.model, self._class, self._plain_forward):
            info = read_checkpoint(path, model=self.model, optimizer=self.optimizer)
        self.global_step = info.global_step
        return info.extra

    def close(self) -> None:
        """Fetch the weights, free the IPUs, and leave the model as it was."""
        if self._closed:
            return
        self._fetch_weights()
        self._release()
        self._placement.undo()
        del self.model.forward
        self._closed = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # ---- the device ---------------------------------------------------------------------

    def _attach_training(self) -> Any:
        if self._training is None:
            self._detach(self._inference)
            options = make_options(self._flat, self._poptorch)
            options.setExecutionStrategy(self._placement.strategy())
            self._training_optimizer = self._device_optimizer()
            assert self.optimizer is not None
            self._sent = group_values(self.optimizer)
            state = write_state(self.optimizer, self.model)
            if state:
                own = self._training_optimizer.state_dict()
                scaling = {"lossScaling": self._flat["loss_scaling"]}
                self._training_optimizer.load_state_dict(
                    {**own, "ipu_state": state, "ipu_param": scaling}
                )
            self.model.train()
            self._training = self._poptorch.trainingModel(
                self.model, options, self._training_optimizer
            )
        elif self._training.isCompiled() and not self._training.isAttachedToDevice():
            self._detach(self._inference)
            self._training.attachToDevice()
        return self._training

    def _attach_inference(self) -> Any:
        if self._training is not None:
            self._detach(self._training)
        if self._inference is None:
            options = make_options(self._flat, self._poptorch, inference=True)
            strategy = self._placement.strategy(
                pipelined=self._flat["inference_device_iterations"] >= self.plan.num_stages
            )
            options.setExecutionStrategy(strategy)
            self._inference = self._poptorch.inferenceModel(self.model.eval(), options)
        elif self._inference.isCompiled() and not self._inference.isAttachedToDevice():
            self._inference.attachToDevice()
        return self._inference

    def _detach(self, executor: Any) -> None:
        if executor is not None and executor.isCompiled() and executor.isAttachedToDevice():
            executor.detachFromDevice()

    def _release(self) -> None:
        for executor in (self._inference, self._training):
            if executor is not None:
                executor.destroy()
        self._training = self._inference = None

    def _fetch_weights(self) -> None:
        if self._training is not None and self._training.isCompiled():
            self._training.copyWeightsToHostIfNeeded()

    def _device_optimizer(self) -> Any:
        assert self.optimizer is not None
        return make_optimizer(self._flat, device_groups(self.optimizer), self._poptorch)

    # ---- evaluation ---------------------------------------------------------------------

    def _inference_call_size(self) -> int:
        flat = self._flat
        copies = flat["inference_device_iterations"] * flat["inference_replication_factor"]
        return int(self.plan.micro_batch_size * copies)

    def _on_device(self, batch: Mapping[str, Any], start: int, call: int) -> _Part:
        executor = self._attach_inference()
        values = executor(**_rows(batch, start, start + call))
        return _Part(call, dict(zip(self._result_names, values, strict=True)))

    def _on_host(self, batch: Mapping[str, Any], start: int, stop: int) -> _Part:
        self._fetch_weights()
        self.model.eval()
        with torch.no_grad():
            values = self.model.forward(**_rows(batch, start, stop))
        return _Part(stop - start, dict(zip(self._result_names, values, strict=True)))

    def _patched_forward(self) -> Any:
        """Return ``forward`` with what the device gives back: the loss, or all tensors."""
        plain, poptorch = self._plain_forward, self._poptorch

        @functools.wraps(plain)
        def forward(*args: Any, **kwargs: Any) -> Any:
            with static_graph(self.model):
                output = plain(*args, **kwargs)
            if self.model.training:
                # A sum of losses must be marked as the one loss.
                return poptorch.identity_loss(output["loss"], reduction="none")
            tensors = {n: value for n, value in output.items() if isinstance(value, Tensor)}
            self._result_names = list(tensors)
            return tuple(tensors.values())

        return forward

    # ---- checks -------------------------------------------------------------------------

    def _check_size(self, batch: Mapping[str, Any], wanted: int) -> int:
        sizes = {n: v.shape[0] for n, v in batch.items() if isinstance(v, Tensor) and v.ndim}
        if any(size != wanted for size in sizes.values()):
            flat = self._flat
            raise LoweringError(
                f"axis 0 of the batch must be {wanted} = device iterations "
                f"{flat['device_iterations']} x microbatches {self.plan.num_microbatches} x "
                f"replicas {self.plan.replicas} x micro batch {self.plan.micro_batch_size}, got "
                f"{sizes}; drop the last short batch (dataloader_drop_last)"
            )
        return wanted

    def _require_open(self) -> None:
        if self._closed:
            raise LoweringError("this executable is closed; compile the model again")


class _Part:
    """Results of one call: samples, and values by name."""

    def __init__(self, num_samples: int, values: dict[str, Tensor]) -> None:
        self.num_samples = num_samples
        self.values = values


def _rows(batch: Mapping[str, Any], start: int, stop: int) -> dict[str, Any]:
    return {
        name: value[start:stop] if isinstance(value, Tensor) and value.ndim else value
        for name, value in batch.items()
    }


def _join(parts: list[_Part]) -> EvalResult:
    total = sum(part.num_samples for part in parts)
    loss = None
    if "loss" in parts[0].values:
        # A call gives one loss per microbatch; they have equal sizes.
        weighed = [float(p.values["loss"].float().mean()) * p.num_samples for p in parts]
        loss = sum(weighed) / total
    outputs = {
        name: torch.cat([part.values[name] for part in parts])
        for name in parts[0].values
        if name != "loss"
    }
    return EvalResult(loss, outputs)


class _OwnClass:
    """While it lasts, the model has its own class and forward back (poptorch wraps both)."""

    def __init__(self, model: nn.Module, own: type, forward: Any) -> None:
        self.model = model
        self.own = own
        self.forward = forward

    def __enter__(self) -> None:
        self._wrapped = self.model.__class__
        self._patched = self.model.forward
        self.model.__class__ = self.own
        del self.model.forward

    def __exit__(self, *exception: object) -> None:
        self.model.__class__ = self._wrapped
        self.model.forward = self._patched
