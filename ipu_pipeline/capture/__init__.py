"""Capture: a model becomes a block graph (plain data) and programs over its own modules.

Read in this order: ``captured.py`` (the flow), ``leaves.py``, ``trace.py``, ``coarsen.py``,
``programs.py``, ``check.py``, ``operations.py``.
"""

from ipu_pipeline.capture.captured import CapturedModel, capture, model_identity

__all__ = ["CapturedModel", "capture", "model_identity"]
