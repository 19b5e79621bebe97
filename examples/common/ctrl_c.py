"""Imported first by every script: Ctrl-C is one line and exit code 130, also while it starts."""

from __future__ import annotations

import sys
from types import TracebackType

_otherwise = sys.excepthook


def _hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if not issubclass(kind, KeyboardInterrupt):
        _otherwise(kind, error, trace)
        return
    print("interrupted", file=sys.stderr)
    sys.exit(130)  # 128 + SIGINT, as shells have it


sys.excepthook = _hook
