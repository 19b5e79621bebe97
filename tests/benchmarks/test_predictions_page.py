"""The tables of published systems, from the figures of two benchmarks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import predictions_page
from benchmarks.results import ResultsError

GPUS = {
    "rows": [
        {"source": "a", "time_error": -0.1, "memory_error": 0.02},
        {"source": "b", "time_error": 0.3},
    ],
    "spearman": 0.5,
    "fitted": ["x"],
    "time_mean_of_rows_not_fitted": 0.3,
    "not_judged": [{}],
}
IPUS = {
    "throughput": [
        {"id": "one", "model": "BERT", "published": 1000.0, "predicted": 1100.0, "error": 0.1}
    ],
    "mean_abs_error": 0.1,
    "worst_abs_error": 0.1,
    "fits_share": 1.0,
    "misfits_share": 0.5,
    "judged": {"fits": 3, "misfits": 2},
}


def test_the_tables_are_written_between_the_marks(tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("gpus.json", "ipus.json", "page.md")]
    for path, figures in zip(files, (GPUS, IPUS), strict=False):
        path.write_text(json.dumps(figures))
    files[2].write_text("top\n<!-- benchmarks:begin -->\nold\n<!-- benchmarks:end -->\n")
    predictions_page.main([*map(str, files[:2]), "--page", str(files[2])])
    text = files[2].read_text()
    assert "| a | 1 | 10.0% | 10.0% | 1 | 2.0% | 2.0% |" in text
    assert "| **all** | 2 | 20.0% | 30.0% | 1 |" in text
    assert "| `one` | BERT | 1,000 | 1,100 | +10.0% |" in text
    assert "old" not in text
    files[0].write_text("{")
    with pytest.raises(ResultsError, match="the figures"):
        predictions_page.main([*map(str, files[:2]), "--page", str(files[2])])
