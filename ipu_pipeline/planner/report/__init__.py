"""Reports about a plan: an HTML page, a trace for Perfetto, and text. Needs no torch.

``plotly`` (the ``report`` extra) is imported by :func:`write_report` only.
"""

from ipu_pipeline.planner.report.page import write_report
from ipu_pipeline.planner.report.text import text_report
from ipu_pipeline.planner.report.trace import write_trace

__all__ = ["text_report", "write_report", "write_trace"]
