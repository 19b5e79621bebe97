"""Measure: what this machine can do, and how long the blocks of a model take on it.

Results are kept on disk (``cache.py``), so that each thing is measured once per machine.
"""

from ipu_pipeline.backends.local.measure.blocks import profile_blocks
from ipu_pipeline.backends.local.measure.machine import local_machine

__all__ = ["local_machine", "profile_blocks"]
