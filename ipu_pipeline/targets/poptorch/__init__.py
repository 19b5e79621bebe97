"""Graphcore: a plan becomes a poptorch program (the SDK is imported inside functions only)."""
