"""Pipelines of other frameworks: read, priced, written."""
