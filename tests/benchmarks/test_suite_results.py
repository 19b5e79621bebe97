"""From pytest-benchmark's JSON to rows, tables, a page of the site; and comparing."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from benchmarks import numbers_page, run
from benchmarks.results import (
    ResultsError,
    Row,
    compare,
    flatten,
    read_csv,
    worse_percent,
    write_csv,
)
from benchmarks.suite.replay import metric, ratio_to, seconds_of
from benchmarks.tables import sections, show


def _benchmark(group, contestant, metrics) -> dict:
    info = {"workload": "bert, float32", "contestant": contestant, "metrics": metrics}
    return {"group": group, "extra_info": info}


RESULTS = {
    "commit_info": {"id": "0123456789abcdef", "dirty": True},
    "datetime": "2026-01-02T03:04:05+00:00",
    "machine_info": {
        "cpu": {"brand_raw": "Some CPU"}, "threads": 2, "python_version": "3.11.1",
        "torch": "2.13.0", "transformers": "5.23",
    },
    "benchmarks": [
        _benchmark("throughput", "eager", [
            seconds_of([2.0, 2.0]), metric("samples_per_s", "samples/s", [16.0, 16.0])]),
        _benchmark("throughput", "ours", [
            seconds_of([1.0, 1.0]), metric("samples_per_s", "samples/s", [32.0, 32.0]),
            ratio_to("eager", [2.0, 2.0], [1.0, 1.0])]),
        _benchmark("memory", "ours", [metric("peak_mb", "MB", [900.0])]),
        _benchmark("memory", "ours", [metric("model_mb", "MB", [880.0], "predicted")]),
    ],
}  # fmt: skip


@pytest.fixture
def rows() -> list[Row]:
    return flatten(RESULTS)


def _with(rows, contestant, name, median) -> list[Row]:
    wanted = (contestant, name)
    return [replace(r, median=median) if r.key[2:] == wanted else r for r in rows]


def test_one_row_per_number(rows) -> None:
    assert len(rows) == 7
    assert rows[4] == Row(
        "throughput", "bert, float32", "ours", "ratio_to_eager", "x", 2.0, 2.0, 2.0, 2, "measured",
        "0123456789ab-dirty", "2026-01-02",
    )  # fmt: skip


def test_csv_keeps_every_row(rows, tmp_path) -> None:
    path = tmp_path / "r.csv"
    write_csv(rows, path)
    assert read_csv(path) == rows
    header = path.read_text(encoding="utf-8").splitlines()[0]
    assert header.startswith("group,workload,contestant,metric,unit,median,low,high,rounds,kind")


def test_files_that_are_no_results_are_refused(tmp_path) -> None:
    with pytest.raises(ResultsError, match=r"cannot read the results .*none\.csv: No such file"):
        read_csv(tmp_path / "none.csv")
    path = tmp_path / "r.csv"
    path.write_text("a,b\n1,2\n", encoding="utf-8")
    with pytest.raises(ResultsError, match="must have the columns group, workload"):
        read_csv(path)
    write_csv([replace(flatten(RESULTS)[0], median="fast")], path)  # type: ignore[arg-type]
    with pytest.raises(
        ResultsError, match="line 2, median: Expected `float`, got `str`, the value is 'fast'"
    ):
        read_csv(path)


def test_the_same_is_no_regression(rows) -> None:
    assert compare(rows, rows, 0.0) == []


def test_a_regression_is_named(rows) -> None:
    now = _with(rows, "ours", "ratio_to_eager", 1.5)
    assert compare(rows, now, 30) == []
    (found,) = compare(rows, now, 20)
    assert found == (
        "throughput, bert, float32, ours, ratio_to_eager: was 2 x, is 1.5: 25.0 % worse, "
        "allowed are 20 %"
    )
    (found,) = compare(rows, _with(rows, "ours", "peak_mb", 1200.0), 20)
    assert "memory, bert, float32, ours, peak_mb: was 900 MB, is 1200: 33.3 % worse" in found


def test_a_slower_machine_is_no_regression_where_there_is_a_ratio(rows) -> None:
    assert compare(rows, _with(rows, "ours", "seconds", 9.0), 10) == []
    assert compare(rows, _with(rows, "eager", "samples_per_s", 1.0), 10) == []
    (found,) = compare(rows, _with(rows, "eager", "seconds", 9.0), 10)
    assert "eager, seconds: was 2 s" in found


def test_what_is_not_measured_any_more_counts_if_its_workload_ran(rows) -> None:
    without = [row for row in rows if row.metric != "ratio_to_eager"]
    (found,) = [line for line in compare(rows, without, 10) if "ratio" in line]
    assert found.endswith("was 2 x, is not measured now")
    assert compare(rows, [*without[:2], *without[4:]], 10, whole=False) == []
    assert compare(rows, [row for row in rows if row.group == "memory"], 10) == []
    with pytest.raises(ResultsError, match="the two results have no workload in common; compare"):
        compare(rows, [replace(rows[0], workload="other")], 10)


def test_more_is_worse_only_of_what_should_be_small(rows) -> None:
    seconds, ratio = rows[0], rows[4]
    assert worse_percent(seconds, replace(seconds, median=3.0)) == pytest.approx(50)
    assert worse_percent(ratio, replace(ratio, median=3.0)) == pytest.approx(-50)
    error = replace(seconds, metric="mean_error_percent")
    assert worse_percent(error, replace(error, median=3.0)) == pytest.approx(1)
    zero = replace(seconds, median=0.0)
    assert (worse_percent(zero, zero), worse_percent(zero, seconds)) == (0.0, float("inf"))


def test_measured_and_predicted_are_never_in_one_table(rows) -> None:
    found = list(sections(rows))
    assert [(each.group, each.kind) for each in found] == [
        ("throughput", "measured"), ("memory", "measured"), ("memory", "predicted"),
    ]  # fmt: skip
    assert all({row.kind for row in each.rows} <= {each.kind} for each in found)
    console = Console(record=True, width=120)
    show(rows, console)
    assert "2.00 (2.00 to 2.00)" in console.export_text()


@pytest.fixture
def results(rows, tmp_path) -> Path:
    write_csv(rows, tmp_path / "latest.csv")
    (tmp_path / "latest.json").write_text(json.dumps(RESULTS), encoding="utf-8")
    return tmp_path


def test_the_section_is_written_between_the_marks(results) -> None:
    path = results / "numbers.md"
    path.write_text(
        f"top\n{numbers_page.BEGIN}\nold\n{numbers_page.END}\nbottom\n", encoding="utf-8"
    )
    numbers_page.main(["--page", str(path), "--results", str(results)])
    text = path.read_text(encoding="utf-8")
    assert text.startswith(f"top\n{numbers_page.BEGIN}\n**Training steps")
    assert "| bert, float32 | ours | 32.00 | 2.00 (2.00 to 2.00) |" in text
    assert "Some CPU, 2 cores used in all" in text
    assert "2026-01-02, commit 0123456789ab-dirty" in text
    assert "old" not in text
    assert text.endswith(f"{numbers_page.END}\nbottom\n")


def test_a_page_without_marks_is_refused() -> None:
    with pytest.raises(ResultsError, match="the page must hold <!-- benchmarks:begin -->"):
        numbers_page.replaced("no marks", "numbers")


def test_the_page_holds_what_the_command_writes() -> None:
    text = numbers_page.PAGE.read_text(encoding="utf-8")
    assert numbers_page.replaced(text, numbers_page.section()) == text


def test_a_part_does_not_overwrite_the_whole() -> None:
    assert run.name_of([], quick=False) == "latest"
    assert run.name_of([], quick=True) == "quick"
    assert run.name_of(["solver", "memory"], quick=True) == "memory-solver-quick"
    files = [part for part in run.command(Path("x.json"), ["ipu"], quick=False) if "bench_" in part]
    assert files[0].endswith("bench_ipu.py")
    assert "--suite-quick" not in files


def test_measured_groups_replace_those_of_the_whole(rows, monkeypatch, tmp_path) -> None:
    solver = replace(rows[0], group="solver")
    whole = tmp_path / "latest.csv"
    write_csv([*rows, solver], whole)
    now = [replace(rows[5], median=800.0, commit="later")]
    monkeypatch.setattr(run, "measure", lambda _: now)
    assert run.main(["--only", "memory", "--update", "--output-dir", str(tmp_path)]) == 0
    assert read_csv(whole) == [*rows[:5], *now, solver]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--threshold", "nan"], "--threshold must be at least 0 and finite, got nan"),
        (["--threshold=-5"], "--threshold must be at least 0 and finite, got -5.0"),
        (["--update"], "--update goes with --only"),
        (["--update", "--only", "ipu", "--quick"], "and not with --quick"),
        (["--update", "--only", "ipu"], "cannot read the results"),
    ],
)
def test_an_update_of_nothing_is_refused(tmp_path, capsys, arguments, said) -> None:
    assert run.main([*arguments, "--output-dir", str(tmp_path)]) == 1
    assert said in capsys.readouterr().err


def test_every_group_has_a_file() -> None:
    assert {f"bench_{group}.py" for group in run.GROUPS} == {
        path.name for path in run.SUITE.glob("bench_*.py")
    }


def test_the_exit_code_of_a_comparison(rows, capsys) -> None:
    assert run.report(rows, rows, 10) == 0
    assert run.report(rows, _with(rows, "ours", "ratio_to_eager", 1.0), 10) == 1
    assert "regression: throughput, bert, float32, ours, ratio_to_eager" in capsys.readouterr().out
    assert run.report(rows, [replace(rows[0], group="x")], 10) == 1
    assert "no workload in common" in capsys.readouterr().out


def test_a_missing_baseline_is_told_before_anything_is_measured(tmp_path, capsys) -> None:
    assert run.main(["--compare", str(tmp_path / "none.csv")]) == 1
    assert "benchmarks: cannot read the results" in capsys.readouterr().err


@pytest.mark.parametrize("leave", [None, "results"])
def test_failing_benchmarks_are_errors(monkeypatch, tmp_path, capsys, leave) -> None:
    def pytest_main(arguments) -> int:
        if leave:
            (path,) = [a.partition("=")[2] for a in arguments if a.startswith("--benchmark-json")]
            Path(path).write_text(json.dumps(RESULTS), encoding="utf-8")
        return 1

    monkeypatch.setattr(run.pytest, "main", pytest_main)
    assert run.main(["--output-dir", str(tmp_path)]) == 1
    wanted = "a benchmark failed, see above; what was" if leave else "nothing was measured (pytest"
    assert wanted in capsys.readouterr().err
    assert (tmp_path / "latest.csv").is_file() == bool(leave)


def test_results_without_rows_are_refused(tmp_path) -> None:
    write_csv([], tmp_path / "r.csv")
    with pytest.raises(ResultsError, match=r"r\.csv holds no result; write some"):
        read_csv(tmp_path / "r.csv")
