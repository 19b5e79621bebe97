"""Capture: a model becomes a block graph (plain data) and programs over its own modules.

Read in this order: ``captured.py`` (the flow), ``leaves.py``, ``tracer.py``, ``coarsen.py``,
``programs.py``, ``check.py``, ``operations.py``; what is patched meanwhile: ``patches.py``.
"""

import sys
from types import ModuleType
from typing import Any

from ipu_pipeline.capture.captured import CapturedModel, capture, model_identity

__all__ = ["CapturedModel", "capture", "model_identity"]


class _CallablePackage(ModuleType):
    """Calling the package calls the function of its name.

    Once this package is imported, Python binds ``ipu_pipeline.capture`` to it and not to the
    public function: either way ``ipu_pipeline.capture(model, batch)`` works.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> CapturedModel:
        return capture(*args, **kwargs)


sys.modules[__name__].__class__ = _CallablePackage
