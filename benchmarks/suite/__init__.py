"""The benchmark suite: ``bench_*.py`` run by pytest-benchmark through ``benchmarks.run``."""
