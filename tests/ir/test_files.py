"""Files are read whole and checked, and written whole or not at all, where that is allowed."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from ipu_pipeline.errors import DatasetError, OutputError, PlanError
from ipu_pipeline.ir.codec import parse_json, read_json, write_json
from ipu_pipeline.ir.files import (
    check_outputs,
    first_twice,
    make_folder,
    read_table,
    read_text,
    write_text,
)
from tests.ir.plan_example import example_plan

LONG = "x" * 300


def refused(path: Path | str) -> str:
    with pytest.raises(PlanError) as caught:
        read_text(path, "the plan", PlanError, most_bytes=10)
    return str(caught.value)


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_many_names_are_looked_through_once() -> None:
    class Name(str):
        compared = 0

        def __eq__(self, other: object) -> bool:
            Name.compared += 1
            return str.__eq__(self, other)  # type: ignore[arg-type]

        __hash__ = str.__hash__

    names = [Name(f"c{number}") for number in range(2000)]
    assert first_twice([*names, Name("c1999")]) == "c1999"
    assert Name.compared < 10_000


def test_what_is_no_file_is_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "large").write_text("x" * 11)
    (tmp_path / "latin").write_bytes("Müller".encode("latin-1"))
    (tmp_path / "loop").symlink_to("loop")
    assert "none: No such file or directory; check the path" in refused(tmp_path / "none")
    assert f"cannot read the plan {tmp_path}: it is a folder; give" in refused(tmp_path)
    assert "it is a pipe; give the path of a regular file" in refused(tmp_path / "pipe")
    assert "it is a device" in refused("/dev/zero")
    assert "it has 11 bytes, at most 10 are read; split it" in refused(tmp_path / "large")
    assert "invalid start byte at byte 1; save it as UTF-8" in refused(tmp_path / "latin")
    assert "Too many levels of symbolic links" in refused(tmp_path / "loop")
    assert "embedded null" in refused("a\0b")
    assert "choose a shorter one" in refused(tmp_path / LONG)
    assert "a part of the path is a file" in refused(tmp_path / "large" / "x")


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"\xef\xbb\xbfa\r\nb\rc")
    assert read_text(tmp_path / "a", "it", PlanError) == "a\r\nb\rc"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1, "b": {"a": 2, "a": 2}}', "it has the key 'a' twice in one object; remove"),
        ('["\\ud83d"]', "half of a character; write it whole"),
        ("[" * 101 + "]" * 101, "more than 100 levels of lists and objects"),
        ("[" * 50_000, "more than 100 levels of lists and objects"),
        ("9" * 5000, "it holds the number 9999.*not finite or beyond 64 bits"),
        ("[1e400]", "it holds the number 1e400"),
        ("[NaN]", "it holds the number NaN"),
        ("{", "it is no JSON: Expecting property name"),
    ],
)
def test_json_that_has_no_one_meaning_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_json(text)
    (tmp_path / "a.json").write_text(text, encoding="utf-8")
    with pytest.raises(PlanError, match=rf"cannot read the plan .*a\.json: .*{message}"):
        read_json(tmp_path / "a.json", "the plan", PlanError)


def test_json_may_be_deep_enough_and_have_whole_characters() -> None:
    assert parse_json("[" * 100 + "]" * 100)
    assert parse_json('"\\ud83d\\ude00"') == "\U0001f600"
    assert parse_json("-9223372036854775808") == -(2**63)


def test_tables_have_the_rules_of_csv() -> None:
    field = "y" * 200_000
    text = f'a,b\r\n"1\r2\u2028",{field}\r\n\r\n3,"say ""x"""\r\n'
    rows = read_table(text, "t.csv", DatasetError)
    assert rows == [{"a": "1\r2\u2028", "b": field}, {"a": "3", "b": 'say "x"'}]
    assert read_table("a\nx\x85y\x0cz\n", "t.csv", DatasetError) == [{"a": "x\x85y\x0cz"}]
    assert read_table("", "t.csv", DatasetError) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n1\n", r"t\.csv, line 2 has 1 columns, not the 2 of the first line; quote"),
        ("a,a\n1,2\n", r"t\.csv has several columns 'a'; give each its own name"),
        ('a,b\n"1"2,3\n', r"t\.csv, line 2 is no CSV: .*; quote fields"),
    ],
)
def test_tables_that_are_none_are_refused(text: str, message: str) -> None:
    with pytest.raises(DatasetError, match=message):
        read_table(text, "t.csv", DatasetError)
    with pytest.raises(DatasetError, match=r"t\.csv must have the columns c, got"):
        read_table(text, "t.csv", DatasetError, ["c"])


def test_a_file_is_replaced_whole_with_its_mode_and_through_links(tmp_path: Path) -> None:
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_text("old")
    target.chmod(0o640)
    link.symlink_to("target")
    write_text(link, "new")
    assert link.is_symlink()
    assert target.read_text() == "new"
    assert stat.S_IMODE(target.stat().st_mode) == 0o640
    link.unlink()
    link.symlink_to("later")
    write_text(link, "made")
    assert (tmp_path / "later").read_text() == "made"
    assert names_in(tmp_path) == ["later", "link", "target"]


def test_devices_and_pipes_are_written_and_stay(tmp_path: Path) -> None:
    example_plan().save("/dev/null")
    assert stat.S_ISCHR(Path("/dev/null").stat().st_mode)
    with pytest.raises(OutputError, match=r"cannot write /dev/full: No space left.*make room"):
        example_plan().save("/dev/full")
    os.mkfifo(tmp_path / "pipe")
    read: list[str] = []
    reader = threading.Thread(target=lambda: read.append((tmp_path / "pipe").read_text()))
    reader.start()
    write_text(tmp_path / "pipe", "text")
    reader.join()
    assert read == ["text"]


def test_many_threads_may_write_one_file(tmp_path: Path) -> None:
    def write(number: int) -> None:
        for _ in range(20):
            write_json(tmp_path / "a.json", {"number": [number] * 500})

    threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(read_json(tmp_path / "a.json", "it", PlanError)["number"])) == 1
    assert names_in(tmp_path) == ["a.json"]


FULL = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
from ipu_pipeline.ir.files import write_text
write_text(sys.argv[1], "x" * 5000)
"""


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    """A limit on the size of files stands for a full disk."""
    path = tmp_path / "a"
    path.write_text("old")
    done = subprocess.run([sys.executable, "-c", FULL, str(path)], capture_output=True, text=True)
    assert f"OutputError: cannot write {path}: File too large" in done.stderr
    assert names_in(tmp_path) == ["a"]
    assert path.read_text() == "old"


def test_outputs_are_checked_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")
    (tmp_path / "empty").write_text("")
    (tmp_path / "loop").symlink_to("loop")

    def said(path: Path | str, *, force: bool = False) -> str:
        with pytest.raises(OutputError) as caught:
            check_outputs({"--output": Path(path)}, force=force)
        return str(caught.value)

    assert said(tmp_path) == f"--output {tmp_path}: it is a folder; give the path of a file"
    assert "it exists; choose another path, or replace it with --force" in said(tmp_path / "file")
    assert "there is no such folder; make it first" in said(tmp_path / "none" / "a")
    assert "a part of the path is a file" in said(tmp_path / "file" / "a")
    assert "Too many levels of symbolic links" in said(tmp_path / "loop")
    assert "choose a shorter one" in said(tmp_path / LONG)
    assert "null" in said("a\0b")
    assert "/proc/x: " in said("/proc/x")
    with pytest.raises(OutputError, match=r"--b .*: --a names the same file; give two paths"):
        check_outputs({"--a": tmp_path / "x", "--b": tmp_path / "." / "x"}, force=True)
    check_outputs({"--output": tmp_path / "file"}, force=True)
    fine = [tmp_path / "new", tmp_path / LONG[:255], tmp_path / "empty", Path("/dev/null"), None]
    check_outputs({f"--{number}": path for number, path in enumerate(fine)}, force=False)
    assert names_in(tmp_path) == ["empty", "file", "loop"]
    assert (tmp_path / "file").read_text() == "old"


def test_a_place_that_may_not_be_written_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").write_text("old")
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write everywhere
    with pytest.raises(OutputError, match="it may not be written; change the permissions"):
        check_outputs({"--output": tmp_path / "a"}, force=True)


def test_folders_for_outputs_are_made(tmp_path: Path) -> None:
    assert make_folder("--output_dir", tmp_path / "a" / "b").is_dir()
    (tmp_path / "a" / "file").write_text("x")
    make_folder("--output_dir", tmp_path / "a")
    with pytest.raises(OutputError, match=r"--output_dir .*/a: it is not empty; choose another"):
        make_folder("--output_dir", tmp_path / "a", force=False)
    with pytest.raises(OutputError, match="it is a file; give a folder"):
        make_folder("--output_dir", tmp_path / "a" / "file")
    for bad, why in (("a\0b", "null"), (tmp_path / LONG, "shorter"), ("/proc/x", "/proc/x")):
        with pytest.raises(OutputError, match=why):
            make_folder("--output_dir", bad)
