"""The measurement behind the memory benchmarks."""

from __future__ import annotations

import shutil

import pytest

from benchmarks.memory_probe import resident_bytes, run_child

SIZE = 32_000_000


def test_the_peak_is_at_least_what_is_resident() -> None:
    assert resident_bytes("VmHWM") >= resident_bytes("VmRSS") > 0


def test_unknown_figures_are_refused() -> None:
    with pytest.raises(LookupError, match=r"/proc/self/status has no Nothing"):
        resident_bytes("Nothing")


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_a_child_counts_every_allocation() -> None:
    found = run_child("tests.benchmarks.probe_child", [str(SIZE)])
    assert found["peak"] == pytest.approx(2 * SIZE, rel=0.01)
    assert found["after"] == pytest.approx(SIZE, rel=0.01)
    assert found["resident"] == pytest.approx(2 * SIZE, rel=0.05)


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_a_failing_child_is_an_error() -> None:
    with pytest.raises(RuntimeError, match=r"tests\.benchmarks\.probe_child many failed"):
        run_child("tests.benchmarks.probe_child", ["many"])
