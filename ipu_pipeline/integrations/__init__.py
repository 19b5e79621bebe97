"""Doors for other people's training loops; each module needs the library that it is named after.

``from ipu_pipeline.integrations.transformers import PipelineTrainer``; recipes for Lightning and
accelerate are runnable files under ``examples/``.
"""
