"""``Options``: everything about a model that is fixed before it is compiled."""

from __future__ import annotations

import copy
import enum
import json
import os
import sys
from pathlib import Path
from typing import Any, Callable

import torch

from . import enums
from .enums import AutoStage, CommGroupType, OutputMode
from .errors import ConfigFileError
from .options_base import OptionsDict, merge, require, require_type, setter
from .options_groups import (
    DistributedOptions,
    PopartOptions,
    PrecisionOptions,
    TrainingOptions,
)
from .options_sessions import DEFAULTS, SessionOptions
from .stages import ExecutionStrategy, PipelinedExecution
from .tensor_locations import TensorLocationOptions


class Options(SessionOptions):
    """All options; takes no arguments. Every setter returns the object it was called on."""

    def __init__(self) -> None:
        super().__init__(
            device_iterations=1,
            replication_factor=1,
            input_group_size=1,
            input_cgt=CommGroupType.Consecutive,
            output_mode=OutputMode.Default,
            output_return_period=1,
            execution_strategy=PipelinedExecution(AutoStage.SameAsIpu),
            anchored_tensors={},
            **copy.deepcopy(DEFAULTS),
        )
        popart = PopartOptions()
        for name, group in (
            ("Precision", PrecisionOptions(popart)),
            ("Training", TrainingOptions(popart)),
            ("TensorLocations", TensorLocationOptions()),
            ("Distributed", DistributedOptions()),
            ("_Popart", popart),
            ("_popart", popart),
        ):
            object.__setattr__(self, name, group)
        self._read_environment()
        defaults = os.environ.get("POPTORCH_DEFAULT_OPTIONS")
        if defaults:
            self.from_json(defaults)

    def _groups(self) -> dict[str, OptionsDict]:
        names = ("Precision", "Training", "TensorLocations", "Distributed", "_Popart")
        return {name: self.__dict__[name] for name in names}

    deviceIterations = setter(
        "device_iterations", "Set how many iterations the device runs in one call."
    )
    replicationFactor = setter("replication_factor", "Set the replicas of this process.")

    def inputReplicaGrouping(self, size: int, group_type: CommGroupType) -> Options:
        """Give all replicas of a group the same input; call after ``replicationFactor``.

        Raises:
            ValueError: The type is All, or the size does not divide the replication factor.
        """
        require_type(size, int, "inputReplicaGrouping")
        require_type(group_type, CommGroupType, "inputReplicaGrouping")
        replicas = self.replication_factor
        if group_type is CommGroupType.All:
            raise ValueError("inputReplicaGrouping does not take CommGroupType.All")
        if size < 1 or size > replicas or replicas % size:
            raise ValueError(
                f"input group size {size} must divide the replication factor {replicas}; "
                "call replicationFactor first"
            )
        self.set(input_group_size=size, input_cgt=group_type)
        return self

    def outputMode(self, mode: OutputMode, output_return_period: int | None = None) -> Options:
        """Choose which micro-batches' outputs come back.

        Raises:
            AssertionError: EveryN without a period above 0.
        """
        self.checkIsFrozen()
        _check_output_mode(mode, output_return_period)
        self.set(output_mode=mode, output_return_period=output_return_period or 1)
        return self

    def anchorTensor(
        self,
        short_name: str,
        long_name: str,
        output_mode: OutputMode | None = None,
        output_return_period: int = 1,
    ) -> None:
        """Keep an internal tensor; read it with ``executor.getAnchoredTensor``."""
        self.checkIsFrozen()
        if output_mode is not None:
            _check_output_mode(output_mode, output_return_period)
        self._values["anchored_tensors"][short_name] = (
            long_name,
            output_mode,
            output_return_period,
        )

    def randomSeed(self, seed: int) -> Options:
        """Seed the device and torch."""
        require_type(seed, int, "randomSeed")
        self.checkIsFrozen()
        self._values["random_seed"] = seed
        torch.manual_seed(seed)
        return self

    def setExecutionStrategy(self, strategy: ExecutionStrategy) -> Options:
        """Choose pipelined, sharded or phased execution.

        Raises:
            AssertionError: A class instead of an instance.
        """
        self.checkIsFrozen()
        require_type(strategy, ExecutionStrategy, "setExecutionStrategy (pass an instance)")
        self._values["execution_strategy"] = strategy
        return self

    def loadFromFile(self, filepath: str) -> Options:
        """Apply one setter per line of a file, written without ``options.``.

        Raises:
            ConfigFileError: A line is not Python.
        """
        self.checkIsFrozen()
        for number, line in enumerate(Path(filepath).read_text().splitlines(), start=1):
            if line.strip() and not line.strip().startswith("#"):
                self._apply_line(f"options.{line.strip()}", f"{filepath}:{number}")
        return self

    def _apply_line(self, code: str, where: str) -> None:
        try:
            compiled = compile(code, where, "exec")
        except SyntaxError as error:
            raise ConfigFileError(f"{where}: {error.msg}: {code}") from error
        # The lines of such a file refer to whatever is installed as poptorch.
        names = {"poptorch": sys.modules.get("poptorch"), "torch": torch, "options": self}
        exec(compiled, names)

    def from_json(self, text: str) -> Options:
        """Apply ``{"Training.gradientAccumulation": 4}``: setters by dotted name."""
        for name, value in json.loads(text).items():
            setter: Callable[..., Any] = self._setter(name)
            setter(*value) if isinstance(value, list) else setter(_enum_named(value))
        return self

    def _setter(self, dotted: str) -> Callable[..., Any]:
        found: Any = self
        for part in dotted.split("."):
            found = getattr(found, part)
        require(callable(found), f"{dotted} is not a setter of Options")
        return found

    def clone(self) -> Options:
        """Return an unfrozen copy."""
        return copy.deepcopy(self)

    def toDict(self) -> dict[str, Any]:
        """Return everything as the back end gets it.

        Raises:
            AssertionError: The output mode is still Default, or a key appears twice.
        """
        require(
            self.output_mode is not OutputMode.Default,
            "OutputMode.Default must be replaced before the options reach the back end",
        )
        values = {key: _plain(value) for key, value in self._values.items()}
        values.pop("anchored_tensors")
        values["execution_mode"] = self.execution_strategy.execution_mode
        values.pop("execution_strategy")
        for group in self._groups().values():
            merge(values, {key: _plain(value) for key, value in group.toDict().items()})
        return values

    def __deepcopy__(self, memo: dict[int, Any]) -> Options:
        made = object.__new__(type(self))
        memo[id(self)] = made
        for name, value in self.__dict__.items():
            object.__setattr__(made, name, copy.deepcopy(value, memo))
        made._freeze(False)
        return made


def _enum_named(value: Any) -> Any:
    """Return the member that a text such as ``OutputMode.All`` names, or the value."""
    first, _, second = value.partition(".") if isinstance(value, str) else ("", "", "")
    found = getattr(enums, first, None) if second else None
    return getattr(found, second) if found is not None else value


def _check_output_mode(mode: OutputMode, period: int | None) -> None:
    require_type(mode, OutputMode, "outputMode")
    if mode is OutputMode.EveryN:
        require(
            isinstance(period, int) and period > 0,
            f"OutputMode.EveryN needs an output_return_period above 0, got {period}",
        )


def _plain(value: Any) -> Any:
    return value.value if isinstance(value, enum.Enum) else value
