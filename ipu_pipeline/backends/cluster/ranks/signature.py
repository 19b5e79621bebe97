"""Signatures of what the processes of a job write into their store."""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
from typing import Any, TypeVar

import msgspec
from torch.distributed.distributed_c10d import Store

from ipu_pipeline.backends.cluster.launch.spec import SECRET_VARIABLE

T = TypeVar("T")


class Signature:
    """Signs messages with the secret of the job; without one, messages stay as they are.

    Args:
        scope: Where messages count: one that was recorded elsewhere, in an earlier attempt of the
            job or for another use, is not believed here.
    """

    def __init__(self, scope: str) -> None:
        self._scope = scope
        self._secret = os.environ.get(SECRET_VARIABLE, "").encode()

    def signed(self, key: str, body: bytes) -> bytes:
        """Return a message under ``key``, with its signature before it."""
        return self._of(key, body) + body

    def opened(self, key: str, message: bytes) -> bytes | None:
        """Return what was signed under ``key``; ``None`` if it is not this job's."""
        size = 2 * hashlib.sha256().digest_size if self._secret else 0
        body = message[size:]
        return body if hmac.compare_digest(message[:size], self._of(key, body)) else None

    def _of(self, key: str, body: bytes) -> bytes:
        if not self._secret:
            return b""
        text = f"{self._scope}\0{key}\0".encode() + body
        return hmac.new(self._secret, text, hashlib.sha256).hexdigest().encode()


class SignedStore:
    """A store of signed JSON; what is not this job's, or not of its kind, is not there.

    Args:
        store: Where the messages are.
        scope: Where they count.
    """

    def __init__(self, store: Store, scope: str) -> None:
        self._store = store
        self._signature = Signature(scope)

    def set(self, key: str, value: Any) -> None:
        """Write a dataclass or plain data."""
        self._store.set(key, self._text(key, value))

    def get(self, key: str, kind: type[T]) -> T | None:
        """Return what is under ``key``, if it is of ``kind``."""
        if not self.holds(key):
            return None
        return self._read(key, self._store.get(key), kind)

    def holds(self, key: str) -> bool:
        """Whether there is anything under ``key``, a stranger's too."""
        return bool(self._store.check([key]))

    def set_first(self, key: str, value: T) -> T:
        """Write a value unless there is one already; return the one that is there."""
        text = self._text(key, value)
        found = self._read(key, self._store.compare_set(key, "", text), type(value))
        if found is None:
            self._store.set(key, text)  # in place of a stranger's
        return value if found is None else found

    def _text(self, key: str, value: Any) -> str:
        return self._signature.signed(key, msgspec.json.encode(value)).decode()

    def _read(self, key: str, message: bytes, kind: type[T]) -> T | None:
        body = self._signature.opened(key, message)
        with contextlib.suppress(msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            return None if body is None else msgspec.json.decode(body, type=kind)
        return None
