"""Messages and shared tensors: what goes in comes out, and what is none is refused."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from ipu_pipeline.backends.ipu.runtime.messages import (
    Channel,
    MessageError,
    SharedTensors,
    check_command,
)


@pytest.fixture
def ends() -> Iterator[tuple[Channel, Channel, socket.socket]]:
    left, right = socket.socketpair()
    there, back = os.memfd_create("there"), os.memfd_create("back")
    one = Channel(left, SharedTensors(there), SharedTensors(back))
    other = Channel(right, SharedTensors(back), SharedTensors(there))
    yield one, other, left
    one.close()
    other.close()
    os.close(there)
    os.close(back)


def test_values_arrive_as_they_were(ends: Any) -> None:
    one, other, _ = ends
    values = {
        "whole": torch.arange(6).reshape(2, 3).t(),
        "types": [torch.ones(3, dtype=d) for d in (torch.float16, torch.bool, torch.float64)],
        "odd": {"a": (1, 2.5, None, "text"), "none": torch.empty(0, 4), "scalar": torch.tensor(7)},
        "nan": float("nan"),
    }
    for size in (1, 100_000):  # the mapping grows between messages
        values["large"] = torch.randn(size)
        one.send("kind", values)
        kind, found = other.receive()
        assert kind == "kind"
        assert found["odd"]["a"] == (1, 2.5, None, "text")
        assert found["nan"] != found["nan"]
        torch.testing.assert_close(found["whole"], values["whole"])
        assert len(found["types"]) == len(values["types"])
        for index, right in enumerate(values["types"]):
            left = found["types"][index]
            assert torch.equal(left, right)
            assert left.dtype == right.dtype
        assert torch.equal(found["large"], values["large"])
        assert found["odd"]["none"].shape == (0, 4)
        assert found["odd"]["scalar"] == 7
    other.send("back", {"x": torch.ones(2)})
    assert torch.equal(one.receive()[1]["x"], torch.ones(2))


def test_what_is_not_plain_is_refused_by_name(ends: Any) -> None:
    with pytest.raises(MessageError, match=r"batch\.rows\[1\] is a set; give tensors, numbers"):
        ends[0].send("train", {"batch": {"rows": [1, {2}]}})


def test_the_other_side_is_gone(ends: Any) -> None:
    ends[0].close()
    with pytest.raises(EOFError, match="closed the socket"):
        ends[1].receive()


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"{", "what came is no message of version 2"),
        (b"[1]", "what came is no message of version 2"),
        (json.dumps({"version": 2, "kind": "x", "values": 3}).encode(), "no message of version 2"),
        (
            json.dumps({"version": 3, "kind": "x", "values": {}}).encode(),
            "speaks version 3 of the messages, this one 2; compile again",
        ),
    ],
)
def test_no_message(body: bytes, message: str, ends: Any) -> None:
    ends[2].sendall(len(body).to_bytes(8, "big") + body)
    with pytest.raises(MessageError, match=message):
        ends[1].receive()


def test_a_length_that_is_none(ends: Any) -> None:
    ends[2].sendall((1 << 40).to_bytes(8, "big"))
    with pytest.raises(MessageError, match=r"a message of 1099511627776 bytes is none of version"):
        ends[1].receive()


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        ("run", {}, r"'run' is no command; there are build, write"),
        ("read", {}, r"the command 'read' has a wrong or unknown value: page"),
        ("read", {"page": -1}, r"wrong or unknown value: page"),
        ("read", {"page": 0, "more": 1}, r"wrong or unknown value: more"),
        ("train", {"batch": {}, "groups": [{}]}, r"wrong or unknown value: groups"),
        ("write", {"tensors": {1: 2}}, r"wrong or unknown value: tensors"),
    ],
)
def test_a_command_with_other_values(kind: str, values: dict[str, Any], message: str) -> None:
    with pytest.raises(MessageError, match=message):
        check_command(kind, values)
