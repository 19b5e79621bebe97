"""Setters of ``Options`` that choose the device, logging and caching."""

from __future__ import annotations

import os
from typing import Any

from .enums import ConnectionType, SyncPattern
from .options_base import OptionsDict, require, require_type
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

    def autoRoundNumIPUs(self, enabled: bool = True) -> SessionOptions:
        """Reserve the next power of two of IPUs."""
        self.set(auto_round_num_ipus=enabled)
        return self

    def connectionType(self, connection: ConnectionType) -> SessionOptions:
        """Choose when the device is acquired; ``Never`` allows compilation only."""
        self.set(connection_type=connection)
        return self

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

    def syncPattern(self, pattern: SyncPattern) -> SessionOptions:
        """Choose how IPUs synchronise."""
        self.set(sync_pattern=pattern)
        return self

    def logCycleCount(self, enabled: bool) -> SessionOptions:
        """Count the device's cycles."""
        self.set(log_cycle_count=enabled)
        return self

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

    def enableSyntheticData(self, enabled: bool) -> SessionOptions:
        """Feed the device with made-up data."""
        self.set(synthetic_data=enabled)
        return self

    def enableStableNorm(self, enabled: bool) -> SessionOptions:
        """Use the stable algorithm of group norm."""
        self.set(stable_norm=enabled)
        return self

    def broadcastBuffers(self, enabled: bool = True) -> SessionOptions:
        """Start all replicas from the same buffers."""
        self.set(broadcast_buffers=enabled)
        return self

    def logDir(self, path: str) -> SessionOptions:
        """Set the folder of logs."""
        self.set(log_dir=path)
        return self

    def modelName(self, name: str) -> SessionOptions:
        """Set the name in profiles."""
        self.set(model_name=name)
        return self

    def maxRepeatLogs(self, count: int) -> SessionOptions:
        """Show an identical message at most so often."""
        self.set(max_repeat_logs=count)
        return self

    def disableModuleNamescope(self) -> SessionOptions:
        """Leave module names out of operation names."""
        self.set(module_namescope_enabled=False)
        return self

    def updatableNamedBuffers(self, names: list[str]) -> SessionOptions:
        """Name the buffers that ``copyNamedBuffersToDevice`` may change."""
        self.set(updatable_named_buffers=names)
        return self

    def showCompilationProgressBar(self, show: bool = True) -> SessionOptions:
        """Show progress while compiling."""
        self.set(show_compilation_progress_bar=show)
        return self

    def relaxOptimizerAttributesChecks(self, relax: bool = True) -> SessionOptions:
        """Do not warn about attributes of an optimizer that the device ignores."""
        self.set(relax_optimizer_checks=relax)
        return self

    def sourceLocationExcludes(self, excludes: list[str]) -> SessionOptions:
        """Leave these files out of source locations."""
        self.set(source_location_excludes=excludes)
        return self

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
