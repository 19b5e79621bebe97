"""For BERT-large on a POD16: at least as fast as published configurations of the same batch.

Two groups here; ``benchmarks/tune_published.py`` holds all of them against the tuner.
"""

from __future__ import annotations

import pytest

from benchmarks.tune_published import CONFIGS, compare, published

GROUPS = {
    name: group for name, group in published().items() if name.startswith("256-question-answering")
}


@pytest.mark.acceptance
@pytest.mark.skipif(not GROUPS, reason=f"{CONFIGS} is not here")
@pytest.mark.parametrize("name", GROUPS)
def test_no_published_configuration_is_faster(name: str) -> None:
    compared = compare(*GROUPS[name])
    assert any(comparison.published_fits for comparison in compared)
    for comparison in compared:
        if comparison.published_fits:
            assert comparison.tuned_samples_per_s >= comparison.published_samples_per_s * (1 - 1e-9)
