"""What a command is doing, for a person at a terminal: the package's log records, on stderr."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.status import Status

LOGGER = logging.getLogger("ipu_pipeline")


class _OneLine(logging.Handler):
    """Shows the newest record in one line that the next one replaces; warnings stay."""

    def __init__(self, status: Status) -> None:
        super().__init__()
        self._status = status

    def emit(self, record: logging.LogRecord) -> None:
        from rich.text import Text

        text = Text(record.getMessage())
        if record.levelno >= logging.WARNING:
            self._status.console.print(text)
        else:
            text.truncate(max(1, self._status.console.width - 4), overflow="ellipsis")
            self._status.update(text)


@contextmanager
def progress_line() -> Iterator[None]:
    """Show what is being done while the block runs; nothing where stderr is no terminal."""
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield
        return
    level = LOGGER.level
    with console.status("") as status:
        handler = _OneLine(status)
        LOGGER.addHandler(handler)
        LOGGER.setLevel(min(level or logging.INFO, logging.INFO))
        try:
            yield
        finally:
            LOGGER.removeHandler(handler)
            LOGGER.setLevel(level)


@contextmanager
def progress_bar() -> Iterator[Callable[[str, int, int], None]]:
    """Show a bar on stderr where that is a terminal; called with what is done, how much, of all."""
    from rich.console import Console
    from rich.progress import Progress as Bar

    console = Console(stderr=True)
    with Bar(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None)
        yield lambda what, done, total: bar.update(
            task, description=what, completed=done, total=total
        )
