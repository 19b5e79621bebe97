"""Signatures of what the processes of a job write into their store."""

from __future__ import annotations

import hashlib
import hmac
import os

from ipu_pipeline.backends.cluster.launch import SECRET_VARIABLE


class Signature:
    """Signs messages with the secret of the job; without one, messages stay as they are."""

    def __init__(self) -> None:
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
        return (
            hmac.new(self._secret, f"{key}\0".encode() + body, hashlib.sha256).hexdigest().encode()
        )
