"""Schedules: which stage does what when. Torch-free functions that build ``ir.Schedule``."""
