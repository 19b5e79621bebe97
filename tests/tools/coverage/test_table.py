"""The table of classes as JSON and Markdown."""

from __future__ import annotations

import json
import re
from pathlib import Path

from tools.coverage.record import MEANING, Record, one_line
from tools.coverage.table import markdown, summary, write_json

VERSIONS = {"torch": "2.13.0", "transformers": "5.23.0"}
RECORDS = [
    Record("AForX", "a", "x", "pass", "", 7, (2, 4), 0.0, ("input_ids",), 1.0),
    Record("AForY", "a", "y", "pass", "2 blocks, so at most 2 stages", 2, (2,), 2e-8),
    Record("BForX", "b", "x", "capture-refused", "CaptureError: a | b <c>"),
    Record("CForX", "c", "x", "eager-fails", "ImportError: no timm"),
    Record("DForX", "d", "x", "nondeterministic", "draws"),
]


def test_only_what_can_be_compared_is_counted() -> None:
    numbers = summary(RECORDS)
    assert (numbers["classes"], numbers["counted"], numbers["passed"]) == (5, 3, 2)
    assert numbers["architectures_passed"] == 1
    assert numbers["exact"] == 1
    assert numbers["passed_share"] == 0.6667
    assert set(numbers["results"]) <= set(MEANING)
    assert summary([])["passed_share"] == 0.0


def test_the_page_names_what_did_not_pass_and_why() -> None:
    page = markdown(RECORDS, VERSIONS)
    left = page.split("## Counted, and not passed")[1].split("##")[0]
    assert "| BForX | b | capture-refused | CaptureError: a \\| b &lt;c> |" in left
    assert "CForX" not in left
    assert "**2 of 3 classes pass (66.7 %), of 1 architectures**" in page
    assert "| AForX | a | x | 7 | 2, 4 | 0 | pass |  |" in page
    assert "| AForY | a | y | 2 | 2 | 2e-08 | pass | 2 blocks, so at most 2 stages |" in page


def test_the_page_for_ipus_says_how_much_is_covered_and_which_rules_refuse() -> None:
    place = "StaticGraphError: modeling_x.py:{} (y = f(x, (1))): reads a value; write it"
    records = [
        Record(
            "AForX", "a", "x", "pass", "8 stages: PartitionError: 8 stages need 9; z", 7, (2, 4)
        ),
        Record("BForX", "b", "x", "program-refused", place.format(12), 7, (2,)),
        Record("CForX", "c", "x", "program-refused", place.format(7), 7, (2,)),
        Record("DForX", "d", "x", "eager-fails", "no timm"),
    ]
    page = markdown(records, VERSIONS, "check_emitted", total=943)
    assert re.search(r"\*\*4 of the \d{3,} classes are covered\.\*\*", page)
    assert "| 2 | 3 |\n| 4 | 1 |\n" in page
    assert "| reads a value | 2 |\n| N stages need N | 1 |\n" in page
    assert "covered" not in markdown(records, VERSIONS)


def test_json_gives_the_records_back(tmp_path: Path) -> None:
    path = tmp_path / "new" / "coverage.json"
    write_json(path, RECORDS, VERSIONS)
    data = json.loads(path.read_text())
    assert data["versions"] == VERSIONS
    assert [Record.from_json(entry) for entry in data["records"]] == RECORDS


def test_an_error_is_one_short_line() -> None:
    assert one_line(ValueError("two\n  lines")) == "ValueError: two lines"
    assert len(one_line(ValueError("x" * 999))) == 200
