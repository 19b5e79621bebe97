"""Setters of ``Options`` that choose the device, logging and caching."""

from __future__ import annotations

import os
from typing import Any

from .enums import ConnectionType, SyncPattern
from .options_base import OptionsDict, require, require_type, setter
from .options_groups import PopartOptions

DEFAULTS: dict[str, Any] = {
    "auto_round_num_ipus": False,
    "connection_type": ConnectionType.Always,
    "sync_pattern": SyncPattern.Full,
    "log_cycle_count": False,
    "synthetic_data": False,
    "stable_norm": False,
    "broadcast_buffers": True,
    "log_dir": ".",
    "model_name": "",
    "max_repeat_logs": 4,
    "module_namescope_enabled": True,
    "show_compilation_progress_bar": True,
    "relax_optimizer_checks": False,
    "available_memory_proportion": {},
    "source_location_excludes": [],
    "updatable_named_buffers": [],
}
"""Declared names with their defaults; the type of a default is the type a setter takes."""


class SessionOptions(OptionsDict):
    """The setters of ``Options`` about devices, caching and logging."""

    _Popart: PopartOptions

    autoRoundNumIPUs = setter("auto_round_num_ipus", "Reserve the next power of two of IPUs.", True)
    connectionType = setter(
        "connection_type", "Choose when the device is acquired; ``Never`` allows compilation only."
    )

    def useOfflineIpuTarget(self, ipu_version: int = 2) -> SessionOptions:
        """Compile without a device.

        Raises:
            AssertionError: Not a known version.
        """
        require(ipu_version in (1, 2, 21), f"ipu_version must be 1, 2 or 21, got {ipu_version}")
        self.connectionType(ConnectionType.Never)
        self._values["ipu_version"] = ipu_version
        return self

    def useIpuModel(self, enabled: bool) -> SessionOptions:
        """Use Graphcore's simulator."""
        return self._put_typed("use_model", enabled, bool)

    def useIpuId(self, ipu_id: int) -> SessionOptions:
        """Use one given device."""
        return self._put_typed("ipu_id", ipu_id, int)

    syncPattern = setter("sync_pattern", "Choose how IPUs synchronise.")
    logCycleCount = setter("log_cycle_count", "Count the device's cycles.")

    def enableExecutableCaching(self, path: str | None) -> SessionOptions:
        """Keep compiled programs in a folder; ``None`` disables that."""
        self.checkIsFrozen()
        if path is None:
            self._values.pop("cachePath", None)
            return self
        return self._put_typed("cachePath", path, str)

    def setAvailableMemoryProportion(self, proportions: dict[str, float]) -> SessionOptions:
        """Set the share of memory that operations may use on each IPU of a replica.

        Raises:
            AssertionError: A key does not start with "IPU".
        """
        require_type(proportions, dict, "setAvailableMemoryProportion")
        for key in proportions:
            require(
                isinstance(key, str) and key.startswith("IPU"),
                f"Keys of setAvailableMemoryProportion must look like IPU0, got {key!r}",
            )
        numbered = {int(key[3:]): value for key, value in proportions.items()}
        self.set(available_memory_proportion=numbered)
        return self

    def enableProfiling(self, profile_dir: str | None = None) -> SessionOptions:
        """Add the engine options that write a profile."""
        present = dict(self._Popart.options.get("engineOptions", {}))
        present["autoReport.all"] = "true"
        if profile_dir is not None:
            present["autoReport.directory"] = profile_dir
        self._Popart.setEngineOptions(present)
        return self

    enableSyntheticData = setter("synthetic_data", "Feed the device with made-up data.")
    enableStableNorm = setter("stable_norm", "Use the stable algorithm of group norm.")
    broadcastBuffers = setter(
        "broadcast_buffers", "Start all replicas from the same buffers.", True
    )
    logDir = setter("log_dir", "Set the folder of logs.")
    modelName = setter("model_name", "Set the name in profiles.")

    def maxRepeatLogs(self, max_lines: int | None) -> SessionOptions:
        """Show an identical message at most so often; ``None`` for always."""
        self.set(max_repeat_logs=(1 << 64) - 1 if max_lines is None else max_lines)
        return self

    def disableModuleNamescope(self) -> SessionOptions:
        """Leave module names out of operation names."""
        self.set(module_namescope_enabled=False)
        return self

    updatableNamedBuffers = setter(
        "updatable_named_buffers", "Name the buffers that ``copyNamedBuffersToDevice`` may change."
    )
    showCompilationProgressBar = setter(
        "show_compilation_progress_bar", "Show progress while compiling.", True
    )
    relaxOptimizerAttributesChecks = setter(
        "relax_optimizer_checks", "Do not warn about what the device ignores of an optimizer.", True
    )
    sourceLocationExcludes = setter(
        "source_location_excludes", "Leave these files out of source locations."
    )

    def appendToLocationExcludes(self, *excludes: str) -> SessionOptions:
        """Leave more files out of source locations."""
        self.set(source_location_excludes=[*self.source_location_excludes, *excludes])
        return self

    def _put_typed(self, key: str, value: Any, kind: type) -> SessionOptions:
        require_type(value, kind, key)
        self.checkIsFrozen()
        self._values[key] = value
        return self

    def _read_environment(self) -> None:
        if os.environ.get("POPTORCH_CACHE_DIR"):
            self._values["cachePath"] = os.environ["POPTORCH_CACHE_DIR"]
        if os.environ.get("POPTORCH_IPU_MODEL", "") not in ("", "0"):
            self._values["use_model"] = True
