"""The programs on the IPUs: one that trains, one that evaluates, made when they are needed."""

from __future__ import annotations

import contextlib
from typing import Any, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from .device import make_optimizer, make_options, mean_loss
from .host_draws import host_random, seed_host, set_host_random
from .placement import Placement
from .static_graph import DeviceForward

Groups = Sequence[Mapping[str, Any]]


class CompileError(ValueError):
    """poptorch refuses the program, or it cannot be used as it was asked to."""


class Sessions:
    """Makes the executors when they are needed, and has at most one on the IPUs.

    Args:
        model: The model, annotated until :meth:`close`.
        annotations: Its blocks, as :class:`Placement` takes them.
        planned_parameters: See :func:`find_modules`.
        settings: The flat object of ``settings.json``.
        poptorch: The front end.

    Attributes:
        placement: The annotations on the model.
        training: The executor that trains, once there is one.
        inference: The executor that evaluates, once there is one.
        device_optimizer: What ``training`` was given.
        next_state: Optimizer state by the device's names that the next ``training`` begins with.
        next_random: States of random numbers, of the device and the host, that it begins with.
    """

    def __init__(
        self,
        model: nn.Module,
        annotations: Sequence[Mapping[str, Any]],
        planned_parameters: Mapping[str, str],
        settings: Mapping[str, Any],
        poptorch: Any,
    ) -> None:
        self.placement = Placement(model, annotations, planned_parameters, poptorch)
        self.training: Any = None
        self.inference: Any = None
        self.device_optimizer: Any = None
        self.next_state: dict[str, Tensor] = {}
        self.next_random: dict[str, Tensor] = {}
        self._model = model
        self._forward = DeviceForward(model, poptorch, settings)
        self._settings = settings
        self._poptorch = poptorch
        self._parameters = dict(model.named_parameters())
        seed_host(settings["seed"])
        # poptorch puts other classes in the place of these.
        things = (model, *model.parameters(), *model.buffers())
        self._own = [(thing, type(thing)) for thing in things]
        self._groups: Groups = ()
        self._evaluated: frozenset[str] = frozenset()
        self._result_names: list[str] = []

    def train(self, batch: Mapping[str, Any], groups: Groups | None) -> float:
        """Run one call of the training program on ``batch`` and return its mean loss.

        Args:
            batch: Inputs of the model.
            groups: Of the optimizer, ``params`` by name; ``None`` for no change.

        Raises:
            CompileError: poptorch refuses to compile the model.
        """
        executor = self.attach_training(groups)
        return mean_loss(self._call(executor, batch), self._settings)

    def evaluate(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Run one call of the evaluation program on ``batch`` and return its tensors by name.

        Raises:
            CompileError: poptorch refuses to compile the model.
        """
        executor = self._attach_inference(frozenset(batch))
        is_new = not executor.isCompiled()
        values = self._call(executor, batch)
        if is_new:  # a compiled program never calls forward again
            self._result_names = list(self._forward.names)
        return dict(zip(self._result_names, values))

    def attach_training(self, groups: Groups | None, *, ipu_version: int | None = None) -> Any:
        """Return the executor that trains; if it is compiled, it is on the IPUs.

        Args:
            groups: As for :meth:`train`.
            ipu_version: Compile for these IPUs, which are not here.
        """
        self._detach(self.inference)
        wanted = self._groups if groups is None else groups
        if self.training is None:
            self.device_optimizer = self._make_optimizer(wanted)
            options = make_options(self._settings, self._poptorch)
            pipelined = not self._settings["num_io_tiles"]
            options.setExecutionStrategy(self.placement.strategy(pipelined=pipelined))
            if ipu_version is not None:
                options.useOfflineIpuTarget(ipu_version)
            self._hand_over_state()
            self._model.train()
            self.training = self._poptorch.trainingModel(
                self._model, options, self.device_optimizer
            )
            self._groups = wanted
            return self.training
        if self.training.isCompiled() and not self.training.isAttachedToDevice():
            self.training.attachToDevice()
        if wanted != self._groups:
            self._change_optimizer(wanted)
            self._groups = wanted
        return self.training

    def save_executable(
        self, path: str, batch: Mapping[str, Any], groups: Groups | None, ipu_version: int | None
    ) -> None:
        """Compile the training program for the shapes of ``batch`` and write it to ``path``.

        Args:
            path: File for the executable; the model itself is not in it.
            batch: As for :meth:`train`.
            groups: As for :meth:`train`.
            ipu_version: Compile for these IPUs, which are not here; the program is not kept.

        Raises:
            CompileError: poptorch refuses to compile it; compiled already for IPUs that are here.
        """
        if ipu_version is not None and self.training is not None:
            raise CompileError(
                "the training program is made already for IPUs that are here; save an executable "
                "for others before the first step"
            )
        executor = self.attach_training(groups, ipu_version=ipu_version)
        with self._released_on_error("compile the model"):
            given = self._inputs(executor, batch)
            executor.compileAndExport(path, export_model=False, **given)
        if ipu_version is not None:
            self.release()

    def load_executable(self, path: str, groups: Groups | None) -> None:
        """Take the training program from ``path`` instead of compiling it.

        Raises:
            CompileError: It is compiled already, or the file is of another version of poptorch.
        """
        executor = self.attach_training(groups)
        if executor.isCompiled():
            raise CompileError("the model is compiled already; load the executable before it runs")
        with self._released_on_error(f"load {path}"):
            executor.loadExecutable(path)

    def optimizer_state(self) -> dict[str, Tensor]:
        """Return the optimizer's state by the device's names; before the first step, what waits."""
        if self.training is None or not self.training.isCompiled():
            return self.next_state
        found = dict(self.device_optimizer.state_dict()["ipu_state"] or {})
        for name, parts in self.placement.parts.items():
            kinds = [key[: -len(parts[0])] for key in found if key.endswith("___" + parts[0])]
            for kind in kinds:
                values = [found.pop(kind + part) for part in parts]
                found[kind + name] = torch.cat(values) if values[0].dim() else values[0]
        return found

    def random_state(self) -> dict[str, Tensor]:
        """Return the states of random numbers, the device's once it has a program that trains."""
        return self.next_random or {**host_random(), **self._device_random()}

    def fetch_weights(self) -> None:
        """Bring the host's weights up to date."""
        if self.training is not None and self.training.isCompiled():
            self.training.copyWeightsToHostIfNeeded()

    def weights_changed(self) -> None:
        """Give the device the host's weights, which somebody has written to."""
        for executor in (self.training, self.inference):
            if executor is not None and executor.isCompiled() and executor.isAttachedToDevice():
                executor.copyWeightsToDevice()

    def release(self) -> None:
        """Free the IPUs; weights and optimizer state come back, the programs are gone."""
        kept = {name: value.clone() for name, value in self.optimizer_state().items()}
        random = self.next_random or self._device_random()
        for executor in (self.inference, self.training):
            if executor is not None:
                executor.destroy()
        self.training = self.inference = self.device_optimizer = None
        self.next_state, self.next_random = kept, random
        # An executor that was never compiled does not unwrap the model when it is destroyed.
        for thing, kind in self._own:
            thing.__class__ = kind

    def close(self) -> None:
        """Release, and leave the model as it was."""
        self.release()
        self._forward.restore()
        self.placement.undo()

    def _inputs(self, executor: Any, batch: Mapping[str, Any]) -> dict[str, Any]:
        return self._forward.inputs(
            batch,
            self._settings["micro_batch_size"],
            training=executor is self.training,
            build=not executor.isCompiled(),
        )

    def _call(self, executor: Any, batch: Mapping[str, Any]) -> Any:
        if executor is self.training and self.next_random:
            self._begin_with_random(batch)
        if executor.isCompiled():
            return executor(**self._inputs(executor, batch))
        with self._released_on_error("compile the model"):
            return executor(**self._inputs(executor, batch))

    def _device_random(self) -> dict[str, Tensor]:
        if self.training is None or not self.training.isCompiled():
            return {}
        return {"device": torch.tensor(self.training.rng_state, dtype=torch.int64)}

    def _begin_with_random(self, batch: Mapping[str, Any]) -> None:
        """Make the training program, and let its random numbers go on where they were."""
        if not self.training.isCompiled():
            with self._released_on_error("compile the model"):
                self.training.compile(**self._inputs(self.training, batch))
        states, self.next_random = self.next_random, {}
        device = states.get("device")
        # That of other replicas, or of another SDK, has another length: the seed's are drawn then.
        if device is not None and len(device) == len(self.training.rng_state):
            self.training.rng_state = device.tolist()
        set_host_random(states)

    @contextlib.contextmanager
    def _released_on_error(self, what: str) -> Iterator[None]:
        """Free the IPUs where a program does not come into being; say what poptorch cannot do."""
        try:
            yield
        except self._poptorch.Error as error:
            self.release()
            raise CompileError(f"poptorch cannot {what}: {error}") from error
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
            deep = self._settings["inference_num_stages"]
            pipelined = self._settings["inference_device_iterations"] >= deep
            pipelined &= not self._settings["num_io_tiles"]
            options.setExecutionStrategy(self.placement.strategy(pipelined=pipelined))
            self._model.eval()
            self.inference = self._poptorch.inferenceModel(self._model, options)
        elif self.inference.isCompiled() and not self.inference.isAttachedToDevice():
            self.inference.attachToDevice()
        return self.inference

    def _detach(self, executor: Any) -> None:
        if executor is not None and executor.isCompiled() and executor.isAttachedToDevice():
            executor.detachFromDevice()

    def _make_optimizer(self, named: Groups) -> Any:
        groups = [
            {
                **group,
                "params": [
                    self._parameters[part]
                    for name in group["params"]
                    for part in self.placement.parts.get(name, [name])
                ],
            }
            for group in named
        ]
        return make_optimizer(self._settings, groups, self._poptorch)

    def _change_optimizer(self, wanted: Groups) -> None:
        """Change the numbers in place: the state on the device is that of this very object."""
        if [g["params"] for g in wanted] != [g["params"] for g in self._groups]:
            raise CompileError(
                "the optimizer's groups have other parameters than when the program was compiled; "
                "close this executable and compile the model again"
            )
        for own, new in zip(self.device_optimizer.param_groups, wanted):
            own.update(
                (key, tuple(value) if isinstance(value, list) else value)
                for key, value in new.items()
                if key != "params"
            )
        self.training.setOptimizer(self.device_optimizer)

    def _in_parts(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return state with that of spread tables by the names of their parts."""
        found = dict(state)
        for name, parts in self.placement.parts.items():
            sizes = [len(self._parameters[part]) for part in parts]
            for key in [key for key in state if key.endswith("___" + name)]:
                value, kind = found.pop(key), key[: -len(name)]
                values = [value] * len(parts) if not value.dim() else value.split(sizes)
                found.update((kind + part, v.clone()) for part, v in zip(parts, values))
        return found

    def _hand_over_state(self) -> None:
        if self.next_state:
            own = self.device_optimizer.state_dict()
            scaling = {"lossScaling": self._settings["loss_scaling"]}
            given = {**own, "ipu_state": self._in_parts(self.next_state), "ipu_param": scaling}
            self.device_optimizer.load_state_dict(given)
        self.next_state = {}
