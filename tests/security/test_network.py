"""What the processes of a job make of what they are sent; where they listen: test_start.py."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import msgspec
import pytest
import torch.distributed as dist

from ipu_pipeline.backends.cluster.launch.spec import SECRET_VARIABLE
from ipu_pipeline.backends.cluster.ranks.heartbeat import (
    BEAT_S,
    Activity,
    Beat,
    Failure,
    Heartbeats,
)
from ipu_pipeline.backends.cluster.ranks.rendezvous import StoreGather, meet
from ipu_pipeline.backends.cluster.ranks.waiting import Waiter
from ipu_pipeline.errors import LoweringError
from tests.security.test_hostile_plans import Attack


@pytest.mark.parametrize(
    ("secret", "message"),
    [
        ("", pickle.dumps(Attack())),
        ("", b""),
        ("of this job", pickle.dumps(Attack())),
        ("of this job", msgspec.msgpack.encode([None, "not signed"])),
        ("of this job", bytes(32) + msgspec.msgpack.encode([None, "signed with nothing"])),
        ("", b"\x91" * 100_000 + b"\xc0"),
        ("", msgspec.msgpack.encode(["another", "kind"])),
        ("", msgspec.msgpack.encode("half of it")[:-3]),
    ],
)
def test_a_stranger_in_the_store_runs_nothing_and_is_not_believed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, secret: str, message: bytes
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(SECRET_VARIABLE, secret)
    store = dist.HashStore()
    store.set("1/1", message)
    ranks = StoreGather(store, 0, 2, Waiter(Activity(), lambda: False))
    with pytest.raises(LoweringError, match=r"message of rank 1 .* is not this job's"):
        ranks.gather("hello", str)
    assert not Path("PWNED").exists()


def test_a_message_counts_in_its_own_place_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SECRET_VARIABLE, "of this job")
    store, waiter = dist.HashStore(), Waiter(Activity(), lambda: False)
    alone = StoreGather(store, 0, 1, waiter)
    assert alone.gather({"step": [1, None, Path("a")]}) == [{"step": [1, None, "a"]}]
    store.set("1/1", store.get("1/0"))
    with pytest.raises(LoweringError, match="is not this job's"):
        StoreGather(store, 0, 2, waiter).gather("hello")


def test_a_message_that_was_recorded_counts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not in another attempt of the job, nor for another use, nor after a later one."""
    monkeypatch.setenv(SECRET_VARIABLE, "of this job")
    store, waiter = dist.HashStore(), Waiter(Activity(), lambda: False)
    StoreGather(store, 0, 1, waiter, "first/ranks").gather("hello")
    store.set("1/1", store.get("1/0"))
    with pytest.raises(LoweringError, match="is not this job's"):
        StoreGather(store, 0, 2, waiter, "second/ranks").gather("hello")
    old, new = Beat(3, "forward pass"), Beat(4, "forward pass")
    assert new.follows(old)
    assert not old.follows(new)
    assert not old.follows(Beat(0, "closed", closed=True))


@pytest.mark.parametrize("message", ["[", "[]", '{"text": 3}', "[" * 100_000, "\x00\ud7ff"])
def test_what_is_no_heartbeat_stops_none(message: str) -> None:
    store = dist.HashStore()
    store.set("failed", message)
    store.set("alive/1", message)
    beats = Heartbeats(store, 0, [1], Activity())
    try:
        while beats.rounds < 3:
            assert not beats.known.wait(BEAT_S)
    finally:
        beats.close()


@pytest.mark.parametrize("key", ["here/1", "answer"])
@pytest.mark.parametrize("secret", ["", "of this job"])
def test_a_stranger_at_the_meeting_is_refused(
    monkeypatch: pytest.MonkeyPatch, key: str, secret: str
) -> None:
    monkeypatch.setenv(SECRET_VARIABLE, secret)
    store = dist.HashStore()
    store.set(key, '{"not": "a name"}')
    with pytest.raises(LoweringError, match=r"rank . in the job's store is not this job's"):
        meet(store, 0 if key == "here/1" else 1, 2, 5.0)


@pytest.mark.parametrize("secret", ["", "of this job"])
def test_a_stranger_ends_no_job_by_a_failure_of_its_own(
    monkeypatch: pytest.MonkeyPatch, secret: str
) -> None:
    monkeypatch.setenv(SECRET_VARIABLE, secret)
    store = dist.HashStore()
    beats = Heartbeats(store, 0, [1], Activity())
    store.set("failed", json.dumps({"text": "rank 1 died", "stalled": False, "hung": -1}))
    last = beats.rounds + 2  # one that begins now
    while beats.rounds < last and not beats.known.wait(BEAT_S):
        pass
    assert beats.known.is_set() is not bool(secret)
    told = beats.tell(Failure("rank 0 raised"))
    assert told.text == ("rank 0 raised" if secret else "rank 1 died")
    beats.close()


def test_ranks_tell_each_other_plain_data_only() -> None:
    alone = StoreGather(dist.HashStore(), 0, 1, Waiter(Activity(), lambda: False))
    with pytest.raises(TypeError, match="plain data only, got Attack"):
        alone.gather(Attack())
