"""Messages between the process that trains and the worker under the SDK's Python.

A message is JSON behind its length, over a Unix socket; tensors lie in a shared mapping beside it,
one mapping per direction, and the message says where. Nothing is pickled, so neither side can make
the other run anything. Every message names the version of this file, and what a command may carry
is checked before it is acted on.
"""

from __future__ import annotations

import json
import mmap
import os
import struct
from typing import Any, Callable, Dict, Iterator, Mapping

import torch
from torch import Tensor

VERSION = 2
# Larger than any plain part of a message; a length beyond it is no message of ours.
_MOST_BYTES = 1 << 28
# Bytes of tensors in one message.
PAGE_BYTES = 1 << 28
_ALIGNMENT = 64
_LENGTH = struct.Struct(">Q")

Test = Callable[[Any], bool]


class MessageError(ValueError):
    """A message is none of this version's."""


def is_text(value: Any) -> bool:
    """Tell whether a value is a text."""
    return isinstance(value, str)


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(map(is_text, value))


def _named(value: Any) -> bool:
    return isinstance(value, dict) and all(map(is_text, value))


def _groups(value: Any) -> bool:
    return isinstance(value, list) and all(
        _named(group) and _texts(group.get("params")) for group in value
    )


def or_none(test: Test) -> Test:
    """Return the test that ``None`` passes, too."""
    return lambda value: value is None or test(value)


# What every command carries.
COMMANDS: dict[str, dict[str, Test]] = {
    "build": {"model": _named, "parameters": _named, "buffers": _named},
    "write": {"tensors": _named},
    "check": {"sample": _named},
    "train": {"batch": _named, "groups": or_none(_groups)},
    "evaluate": {"batch": _named},
    "read": {"page": _count},
    "read_optimizer": {"page": _count},
    "write_optimizer": {"tensors": _named},
    "read_random": {},
    "write_random": {"tensors": _named},
    "release": {},
    "save_executable": {
        "path": is_text,
        "batch": _named,
        "groups": or_none(_groups),
        "ipu_version": or_none(_count),
    },
    "load_executable": {"path": is_text, "groups": or_none(_groups)},
    "close": {},
}


def paged(tensors: Mapping[str, Tensor]) -> Iterator[Dict[str, Tensor]]:
    """Yield the tensors in parts that one message holds: more only fills memory."""
    page: Dict[str, Tensor] = {}
    used = 0
    for name, value in tensors.items():
        size = value.numel() * value.element_size()
        if page and used + size > PAGE_BYTES:
            yield page
            page, used = {}, 0
        page[name] = value.detach()
        used += size
    if page:
        yield page


class SharedTensors:
    """A mapping that one side writes tensors into and the other reads.

    Args:
        file: Descriptor of a file in memory that both processes have; it grows as needed.
    """

    def __init__(self, file: int) -> None:
        self._file = file
        self._map: Any = None
        self._used = 0

    def restart(self) -> None:
        """Begin the next message: what the last one held may be overwritten."""
        self._used = 0

    def put(self, tensor: Tensor) -> dict[str, Any]:
        """Copy ``tensor`` in; return where it lies, as plain data."""
        begin, size = self._used, tensor.numel() * tensor.element_size()
        self._used = begin + -(-size // _ALIGNMENT) * _ALIGNMENT
        dtype = str(tensor.dtype).replace("torch.", "")
        place = {"tensor": dtype, "shape": list(tensor.shape), "begin": begin}
        if os.fstat(self._file).st_size < self._used:
            os.ftruncate(self._file, self._used)
        self.get(place).copy_(tensor.detach())
        return place

    def get(self, place: Mapping[str, Any]) -> Tensor:
        """Return the tensor at ``place``, a view of the mapping until the next message."""
        dtype, shape, begin = getattr(torch, place["tensor"]), place["shape"], place["begin"]
        count = 1
        for size in shape:
            count *= size
        if not count:
            return torch.empty(shape, dtype=dtype)
        end = begin + count * torch.empty(0, dtype=dtype).element_size()
        if self._map is None or len(self._map) < end:
            # Views of the old mapping keep it; both show the same memory.
            self._map = mmap.mmap(self._file, os.fstat(self._file).st_size)
        return torch.frombuffer(self._map, dtype=dtype, count=count, offset=begin).view(shape)


def pack(value: Any, tensors: SharedTensors, name: str = "value") -> Any:
    """Return ``value`` as plain data, its tensors copied into ``tensors``.

    Raises:
        MessageError: It holds something that is neither tensor nor plain.
    """
    if isinstance(value, Tensor):
        return tensors.put(value)
    if isinstance(value, dict):
        return {"dict": [[key, pack(v, tensors, f"{name}.{key}")] for key, v in value.items()]}
    if isinstance(value, (list, tuple)):
        kind = "list" if isinstance(value, list) else "tuple"
        return {kind: [pack(v, tensors, f"{name}[{n}]") for n, v in enumerate(value)]}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise MessageError(
        f"{name} is a {type(value).__name__}; give tensors, numbers, texts, and lists, tuples and "
        "dicts of them"
    )


def unpack(value: Any, tensors: SharedTensors) -> Any:
    """Return what :func:`pack` was given; its tensors are views until the next message."""
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        return tensors.get(value)
    if "dict" in value:
        return {key: unpack(item, tensors) for key, item in value["dict"]}
    kind = "list" if "list" in value else "tuple"
    items = [unpack(item, tensors) for item in value[kind]]
    return items if kind == "list" else tuple(items)


# What comes of reading what is no message.
_NO_MESSAGE = (ValueError, TypeError, LookupError, AttributeError, RuntimeError, OverflowError)


class Channel:
    """One end of the socket, with the two mappings.

    Args:
        socket: Connected.
        outgoing: What this side writes.
        incoming: What the other side writes.
    """

    def __init__(self, socket: Any, outgoing: SharedTensors, incoming: SharedTensors) -> None:
        self._socket = socket
        self._outgoing = outgoing
        self._incoming = incoming

    def send(self, kind: str, values: Mapping[str, Any]) -> None:
        """Send one message.

        Raises:
            MessageError: A value is neither tensor nor plain.
        """
        self._outgoing.restart()
        packed = {name: pack(value, self._outgoing, name) for name, value in values.items()}
        body = json.dumps({"version": VERSION, "kind": kind, "values": packed}).encode()
        self._socket.sendall(_LENGTH.pack(len(body)) + body)

    def receive(self) -> tuple[str, dict[str, Any]]:
        """Wait for one message; return its kind and values.

        Raises:
            EOFError: The other side is gone.
            MessageError: It is of another version, or no message.
        """
        (length,) = _LENGTH.unpack(self._bytes(_LENGTH.size))
        if length > _MOST_BYTES:
            raise MessageError(f"a message of {length} bytes is none of version {VERSION}")
        try:
            message = json.loads(self._bytes(length))
            version, kind, packed = message["version"], message["kind"], message["values"]
            if version == VERSION:
                named = {str(n): unpack(value, self._incoming) for n, value in packed.items()}
                return str(kind), named
        except _NO_MESSAGE as error:
            raise MessageError(
                f"what came is no message of version {VERSION}: {str(error)[:300]}"
            ) from error
        raise MessageError(
            f"the other side speaks version {str(version)[:40]} of the messages, this one "
            f"{VERSION}; compile again, so that the worker's files are written anew"
        )

    def close(self) -> None:
        """Close this end; the other side reads the end of file."""
        self._socket.close()

    def _bytes(self, count: int) -> bytes:
        parts = []
        while count:
            part = self._socket.recv(min(count, 1 << 20))
            if not part:
                raise EOFError("the other side has closed the socket")
            parts.append(part)
            count -= len(part)
        return b"".join(parts)


def check_command(kind: str, values: Mapping[str, Any]) -> None:
    """Compare a message with what its command carries.

    Raises:
        MessageError: It is no command, or a value is missing, unknown or of another type.
    """
    if kind not in COMMANDS:
        raise MessageError(f"{kind!r} is no command; there are {', '.join(COMMANDS)}")
    wanted = COMMANDS[kind]
    wrong = sorted(set(wanted) ^ set(values))
    wrong += [name for name, test in wanted.items() if name in values and not test(values[name])]
    if wrong:
        raise MessageError(f"the command {kind!r} has a wrong or unknown value: {wrong[0]}")
