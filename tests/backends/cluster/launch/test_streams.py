"""One stream out of many: what is shown of the messages of every rank."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from ipu_pipeline.backends.cluster.launch.streams import Follower, Merger

TRACEBACK = """\
[rank1]: Traceback (most recent call last):
[rank1]:   File "a.py", line 3, in <module>
[rank1]:     1 / 0
[rank1]:     ~~^~~
[rank1]: ZeroDivisionError: division by zero

[rank1]: The above exception was the direct cause of the following exception:

[rank1]: Traceback (most recent call last):
[rank1]:   File "a.py", line 5, in <module>
[rank1]: ValueError: mine
"""


@pytest.fixture
def shown() -> list[str]:
    return []


@pytest.fixture
def merger(shown: list[str]) -> Merger:
    return Merger(shown.append, patience_s=2.0)


def test_the_first_rank_passes_through_as_it_is(merger: Merger, shown: list[str]) -> None:
    for text in ("half", " a line\n\r10 %\r20 %", "\n"):
        merger.take(0, text, 0.0)
    assert shown == ["half", " a line\n\r10 %\r20 %", "\n"]
    assert merger.last_words(0) == "half a line"


def test_others_say_only_what_is_new(merger: Merger, shown: list[str]) -> None:
    merger.take(1, "all\nsecond\n\n", 0.0)
    merger.take(2, "second\n\rprogress 10 %\r20 %\nthi", 0.0)
    merger.take(0, "all\n", 1.0)
    merger.show_due(1.9)
    assert shown == ["all\n"]
    merger.take(2, "rd\n", 2.0)
    merger.show_due(2.1)
    assert shown == ["all\n", "[rank 1] second\n"]
    merger.show_due(4.0)
    assert shown[2:] == ["[rank 2] third\n"]


def test_of_a_traceback_its_last_lines_remain(merger: Merger, shown: list[str]) -> None:
    merger.take(1, TRACEBACK, 0.0)
    merger.end(0.0)
    assert shown == [
        "[rank 1] ZeroDivisionError: division by zero\n",
        "[rank 1] ValueError: mine\n",
    ]
    assert merger.last_words(1) == "ValueError: mine"


def test_the_end_shows_what_is_left_and_forgets(merger: Merger, shown: list[str]) -> None:
    merger.take(0, "said", 0.0)
    merger.take(1, "no end of line", 0.0)
    merger.take(2, "said", 0.0)
    merger.end(0.0)
    assert shown == ["said", "[rank 1] no end of line\n"]
    merger.take(2, "said\n", 1.0)
    merger.end(1.0)
    assert shown[2:] == ["[rank 2] said\n"]
    assert merger.last_words(3) == ""


def test_files_are_followed_while_they_grow(tmp_path: Path) -> None:
    seen = threading.Event()
    shown: list[str] = []

    def write(text: str) -> None:
        shown.append(text)
        seen.set()

    first, second = tmp_path / "0", tmp_path / "1"
    follower = Follower(Merger(write, patience_s=60.0))
    follower.follow({1: second, 0: first})
    with first.open("wb") as file:
        file.write("größer".encode()[:3])
        file.flush()
        assert seen.wait(30)
        file.write("größer\n".encode()[3:])
    second.write_text("and more\n")
    follower.stop()
    follower.stop()
    assert "".join(shown) == "größer\n[rank 1] and more\n"


def test_a_next_start_has_files_of_its_own(tmp_path: Path) -> None:
    shown: list[str] = []
    follower = Follower(Merger(shown.append))
    for attempt in ("a", "b"):
        path = tmp_path / attempt
        path.write_text(f"{attempt}\n")
        follower.follow({0: path})
    follower.stop()
    assert shown == ["a\n", "b\n"]
