"""Targets: turn a plan into something that runs. Each is found by name in ``registry.py``."""
