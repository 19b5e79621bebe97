"""The executable behind a worker under the SDK's Python: same door as the local target's.

The device holds weights and optimizer state while it trains; they come back for checkpoints,
evaluation on the host and ``state_dict``. Gradients never come back.
"""

from __future__ import annotations

import contextlib
import logging
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ipu_pipeline.backends.ipu.bundle import emit
from ipu_pipeline.backends.ipu.check import is_power_of_two
from ipu_pipeline.backends.ipu.mirror import (
    HostWeights,
    check_labels,
    compare,
    described,
    host_outputs,
    sample_of,
)
from ipu_pipeline.backends.ipu.optimizers import named_groups, read_state, write_state
from ipu_pipeline.backends.ipu.runtime.messages import paged
from ipu_pipeline.backends.ipu.sdk_python import SdkPython
from ipu_pipeline.backends.ipu.settings import PopTorchSettings
from ipu_pipeline.backends.ipu.worker import Worker
from ipu_pipeline.errors import LoweringError, StageError
from ipu_pipeline.ir.plan import Plan
from ipu_pipeline.stages.batch import batch_text
from ipu_pipeline.stages.executable import EvalResult, Executable, StepResult

logger = logging.getLogger(__name__)
# In a checkpoint: states of the random numbers of the IPUs and of the worker's generators.
_RANDOM = "ipu_random.safetensors"
_open: weakref.WeakKeyDictionary[nn.Module, weakref.ref[PopTorchExecutable]] = (
    weakref.WeakKeyDictionary()
)


class PopTorchExecutable(Executable):
    """Runs a plan on IPUs, in a worker process under the SDK's Python; the first step compiles.

    The model here keeps the weights that were fetched last: by :meth:`state_dict`, a checkpoint,
    evaluation of samples that fill no call of the device, or :meth:`close`.

    Args:
        model: The user's model; nothing of it is changed but its weights.
        plan: The split.
        optimizer: A torch optimizer over the model's parameters; needed to train.
        settings: Of the plan.
        python: What runs the worker.
        self_check: Whether both sides compute a sample before anything is compiled.

    Raises:
        LoweringError: Another executable of the model is open, or the worker cannot run it.
        StageError: The worker died.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: Plan,
        optimizer: torch.optim.Optimizer | None,
        settings: PopTorchSettings,
        python: SdkPython,
        *,
        self_check: bool = True,
    ) -> None:
        other = _open.get(model)
        if other is not None and other() is not None:
            raise LoweringError(
                "the model is compiled already; close() that executable before compiling it again"
            )
        description = described(model)
        super().__init__(model, plan, optimizer)
        self.settings = settings
        self._flat = settings.to_json()
        self.batch_divisor = plan.total_batch_size * self._flat["device_iterations"]
        self._weights = HostWeights(model)
        self._sent: list[dict[str, Any]] | None = None
        self._device_is_newer = False
        self._has_program = False
        # Names and text of what a program was compiled for, by its command.
        self._compiled_for: dict[str, tuple[set[str], str]] = {}
        self._state_is_newer = False  # the optimizer's here: somebody has loaded one
        self._closed = False
        self._folder = TemporaryDirectory(prefix="ipu-")
        try:
            emit(plan, settings, self._folder.name)
            self._worker = Worker(python, Path(self._folder.name))
            try:
                self._build(description, self_check=self_check)
            except BaseException:
                self._worker.end()
                raise
        except BaseException:
            self._folder.cleanup()
            raise
        me = _open[model] = weakref.ref(self)
        self._handles = (
            []
            if optimizer is None
            else [optimizer.register_load_state_dict_post_hook(lambda _: _state_loaded(me))]
        )

    def _build(self, description: Mapping[str, Any], *, self_check: bool) -> None:
        self._worker.call("build", **description)
        for page in paged(self._weights.tensors()):
            self._worker.call("write", tensors=page)
        sample = sample_of(self.plan, self.model)
        answer = self._worker.call("check", sample=sample)
        if self_check or answer["has_guesses"]:
            versions = self._worker.versions
            compare(
                host_outputs(self.model, sample),
                answer["outputs"],
                f"transformers {versions['transformers']} and torch {versions['torch']} there",
            )
        self._weights.same()

    # ---- steps --------------------------------------------------------------------------

    def train_step(self, batch: Mapping[str, Any]) -> StepResult:
        """Run ``device_iterations`` optimizer steps (normally one) in one call of the device.

        ``StepResult.loss`` is the mean over the microbatches of every replica under the output
        modes ``all`` and ``sum``; under ``final`` and ``default`` the device gives back only the
        last microbatch of every replica, and the loss is the mean of these. Without an IPU
        configuration the mode is ``all``. The weights are the same under every mode.

        Args:
            batch: Tensors with axis 0 = device iterations x microbatches x replicas x micro
                batch, in this order.

        Raises:
            LoweringError: There is no optimizer, axis 0 has another size, the batch is not of the
                shapes of the first, or poptorch refuses to compile the model.
            StageError: The step failed in the worker, or the worker died.
        """
        self._require_open()
        optimizer = self.trained_optimizer()
        size = self._check_size(batch)
        shapes = self._check_inputs("train", batch)
        self._send_weights()
        groups = self._changed_groups()
        loss = self._worker.call("train", batch=dict(batch), groups=groups)["loss"]
        self._sent = groups or self._sent
        self._device_is_newer = self._has_program = True
        self._compiled_for["train"] = shapes
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
            LoweringError: Axis 0 differs between tensors, shapes are not those of before,
                or poptorch refuses to compile.
            StageError: It failed in the worker, or the worker died.
        """
        self._require_open()
        check_labels(self.model, batch)
        sizes = {v.shape[0] for v in batch.values() if isinstance(v, Tensor) and v.ndim}
        if len(sizes) != 1:
            raise LoweringError(f"axis 0 of the batch's tensors must be equal, got {sorted(sizes)}")
        size, flat = sizes.pop(), self._flat
        copies = flat["inference_device_iterations"] * flat["inference_replication_factor"]
        call = self.plan.micro_batch_size * copies
        whole = size - size % call
        self._send_weights()
        parts: list[tuple[int, Mapping[str, Tensor]]] = []
        for start in range(0, whole, call):
            part = rows(batch, start, start + call)
            shapes = self._check_inputs("evaluate", part)
            found = self._worker.call("evaluate", batch=part)["outputs"]
            self._compiled_for["evaluate"] = shapes
            parts.append((call, {name: value.clone() for name, value in found.items()}))
        if whole < size:
            self._fetch()
            parts.append((size - whole, host_outputs(self.model, rows(batch, whole, size))))
        return join(parts).nested()

    # ---- state --------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Tensor]:
        """Return the model's own state dict, fetched from the device."""
        if not self._closed:
            self._fetch()
        return {name: value.detach().clone() for name, value in self.model.state_dict().items()}

    def fetch(self) -> None:
        """Bring the model's weights here up to date, if the device has newer ones."""
        self._require_open()
        self._fetch()

    def fetch_optimizer(self) -> None:
        """Bring the optimizer's state here up to date."""
        self._require_open()
        if self.optimizer is not None and self._has_program and not self._state_is_newer:
            state = {name: v.clone() for name, v in self._worker.pages("read_optimizer")}
            read_state(self.optimizer, state, self.model)

    def save_checkpoint(self, path: str | Path, *args: Any, **options: Any) -> Path:
        """Write a checkpoint of what the device holds, as :class:`Executable` says."""
        self._require_open()
        self.wait_for_checkpoint()
        self._fetch()
        self.fetch_optimizer()
        states = {n: v.clone() for n, v in self._worker.call("read_random")["tensors"].items()}
        others = options.pop("attach", None)

        def attach(folder: Path) -> None:
            save_file(states, folder / _RANDOM)
            if others is not None:
                others(folder)

        return super().save_checkpoint(path, *args, attach=attach, **options)

    def load_checkpoint(self, path: str | Path) -> dict[str, Any]:
        """Restore a checkpoint written by any target; the program is compiled again.

        Random numbers go on where they were if the program has as many replicas.
        """
        self._require_open()
        extra = super().load_checkpoint(path)
        self._worker.call("release")
        self._device_is_newer = self._has_program = False
        self._compiled_for.clear()
        self._weights.forget()
        if (file := Path(path) / _RANDOM).is_file():
            self._worker.call("write_random", tensors=load_file(file))
        return extra

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
        self._send_weights()
        groups = self._changed_groups()
        self._worker.call(
            "save_executable",
            path=str(Path(path).absolute()),
            batch=dict(batch),
            groups=groups,
            ipu_version=offline_ipu_version,
        )
        if offline_ipu_version is None:
            self._sent, self._has_program = groups or self._sent, True
        return Path(path)

    def load_executable(self, path: str | Path) -> None:
        """Take the training program from ``path`` instead of compiling it.

        Raises:
            LoweringError: It is compiled already, or the file is of another version of poptorch.
        """
        self._require_open()
        self._send_weights()
        groups = self._changed_groups()
        self._worker.call("load_executable", path=str(Path(path).absolute()), groups=groups)
        self._sent, self._has_program = groups or self._sent, True

    def close(self) -> None:
        """Fetch the weights, free the IPUs and end the worker; the model keeps its class.

        Raises:
            StageError: The worker died after the last fetch, which nobody was told yet.
        """
        if self._closed:
            return
        self._closed = True
        try:
            self._leave()
        finally:  # also when the worker or the device is lost
            _open.pop(self.model, None)
            for handle in self._handles:
                handle.remove()
            self._worker.end()
            self._folder.cleanup()
        self.wait_for_checkpoint()

    def _leave(self) -> None:
        """Fetch the weights and let the worker free the IPUs, unless it is known to be dead."""
        if not self._worker.is_dead:
            self._fetch()
            with contextlib.suppress(StageError):  # nothing is lost any more
                self._worker.call("close")
        elif self._device_is_newer:
            logger.warning("the worker is gone: the weights are those that were fetched last")

    def _fetch(self) -> None:
        """Bring the weights here up to date."""
        if self._device_is_newer:
            if changed := self._weights.changed():
                logger.warning("what was changed here in %s gives way to the device's",
                               ", ".join(changed))  # fmt: skip
            self._weights.take(self._worker.pages("read"))
            self._device_is_newer = False

    def _send_weights(self) -> None:
        """Give the worker what was changed here, and the optimizer's state before it trains."""
        changed = self._weights.changed()
        if changed and self._device_is_newer:
            raise LoweringError(
                f"{next(iter(changed))!r} was changed here while the device has newer weights; "
                "call state_dict(), which fetches them, and change the weights then"
            )
        if changed:
            for page in paged(changed):
                self._worker.call("write", tensors=page)
            self._weights.same()

    def _changed_groups(self) -> list[dict[str, Any]] | None:
        """Return the optimizer's groups if the worker has others; hand over its state at first."""
        optimizer = self._required_optimizer()
        groups = named_groups(optimizer, self.model)
        if self._state_is_newer and self._has_program:
            self._fetch()
            self._worker.call("release")
            self._has_program = False
            self._compiled_for.clear()
        self._state_is_newer = False
        if not self._has_program:
            for page in paged(write_state(optimizer, self.model)):
                self._worker.call("write_optimizer", tensors=page)
            return groups
        return groups if groups != self._sent else None

    # ---- checks -------------------------------------------------------------------------

    def _required_optimizer(self) -> torch.optim.Optimizer:
        if self.optimizer is None:
            raise LoweringError("training needs an optimizer; pass one to compile(optimizer=...)")
        return self.optimizer

    def _check_size(self, batch: Mapping[str, Any]) -> int:
        check_labels(self.model, batch)
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

    def _check_inputs(self, command: str, batch: Mapping[str, Any]) -> tuple[set[str], str]:
        """Return what the batch is; refuse one that is not of the shapes that were compiled.

        Evaluation with other inputs, such as labels, is compiled again.
        """
        found = set(batch), batch_text(dict(sorted(batch.items())))
        names, known = self._compiled_for.get(command, found)
        if known != found[1] and (command == "train" or names == found[0]):
            raise LoweringError(
                f"the batch is {found[1]}, and the IPU has a program for {known}; pad every "
                "batch to one length and give every batch the same inputs, or close() the "
                "executable and compile again"
            )
        return found

    def _check_offline(self) -> None:
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


def _state_loaded(executable: weakref.ref[PopTorchExecutable]) -> None:
    if (found := executable()) is not None:
        found._state_is_newer = True


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
        if name != "loss" and all(name in values for _, values in parts)
    }
    return EvalResult(loss, outputs)
