"""Benchmarks: the solver on public instances, its scaling, and our splits against baselines."""
