"""Benchmarks: the suite, the solver on public instances, prices against published numbers."""
