"""Steps in this process, whose stages are threads of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from ipu_pipeline.backends.local.executable import LocalExecutable
from ipu_pipeline.train.live_steps import LiveSteps


class LocalSteps(LiveSteps):
    """The steps of a trainer whose stages are threads of this process."""

    target = "local"

    def _ready(self, part: Mapping[str, Any]) -> LocalExecutable:
        """Return the executable of the present model (``model_init`` makes new ones)."""
        if not self.has_executable():
            self.close()
            plan = self._trainer.planned(part)
            self.executable = self._trainer.compiled(plan, precision=self._trainer._precision)
        return cast(LocalExecutable, self.executable)
