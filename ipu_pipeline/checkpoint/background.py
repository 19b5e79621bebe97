"""One job at a time in a thread; its error waits for the next call."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

logger = logging.getLogger(__name__)

_POLL_S = 0.1


class Background:
    """Writes checkpoints while training goes on.

    The thread is no daemon: a process that ends waits for it.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def start(self, job: Callable[[], object]) -> None:
        """Run ``job``; the one before has to be waited for."""
        assert self._thread is None

        def run() -> None:
            try:
                job()
            except BaseException as error:
                logger.error("a checkpoint could not be written: %s", error)
                self._error = error

        self._thread = threading.Thread(target=run, name="checkpoint-writer")
        self._thread.start()

    def wait(self, given_up: Callable[[], None] = lambda: None) -> None:
        """Wait until the job is done, if there is one.

        Args:
            given_up: Called again and again; may raise to wait no longer.

        Raises:
            BaseException: What the job raised; once.
        """
        if self._thread is not None:
            while self._thread.is_alive():
                given_up()
                self._thread.join(_POLL_S)
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error
