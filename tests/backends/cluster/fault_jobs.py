"""Processes in which a rank fails; what they return is what their errors said."""

from __future__ import annotations

import ctypes
import os
import signal
import time
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch import Tensor

import ipu_pipeline as ipp
from ipu_pipeline.backends.cluster.ranks import heartbeat, watchdog
from tests.backends.cluster.jobs import compiled

LONG_S = 1000.0


def lower_limits() -> None:
    watchdog.SILENT_S, watchdog.REASON_S, watchdog.REACT_S = 4.0, 8.0, 1.0
    heartbeat.HANG_S, heartbeat.HANG_FACTOR = 4.0, 1.0


def _raise() -> None:
    raise ValueError("the disk is on fire")


def _spin() -> None:
    end = time.monotonic() + LONG_S
    while time.monotonic() < end:
        pass


def _stop() -> None:
    time.sleep(6 * heartbeat.BEAT_S)  # so that the others have seen a beat
    os.kill(os.getpid(), signal.SIGSTOP)


HOW: dict[str, Callable[[], Any]] = {
    "raises": _raise,
    "dies": lambda: os._exit(9),
    "sleeps": lambda: time.sleep(LONG_S),
    "spins": _spin,
    # Holds Python's lock, so no other thread of the process runs.
    "freezes": lambda: ctypes.PyDLL(None).sleep(int(LONG_S)),
    "is stopped": _stop,
}


def failure(how: str, where: str, planned: dict[str, Any], rank: int = 1, **options: Any) -> str:
    """Train until ``rank`` fails in step 1; return the error that its or another rank raised."""
    lower_limits()
    made, batch = compiled("bert-qa", planned=planned, **options)
    layer = made.model.bert.encoder.layer[-1 if rank else 0]
    calls = []

    def act(*_: Any, nth: int = 2) -> None:
        calls.append(made.global_step)
        if made.global_step == 1 and calls.count(1) == nth and dist.get_rank() == rank:
            HOW[how]()

    def watch(value: Tensor) -> None:
        value.register_hook(act)

    if where == "forward":
        layer.register_forward_pre_hook(act)
    elif where == "backward":
        inside = layer.attention
        inside.register_forward_hook(lambda *seen: watch(_first(seen[-1])))
    else:
        made.optimizer.register_step_pre_hook(lambda *_: act(nth=1))
    try:
        for _ in range(3):
            made.train_step(batch)
    except ipp.errors.StageError as error:
        found = f"{type(error).__name__}: {error}"
    try:
        made.train_step(batch)
    except ipp.errors.StageError as error:
        found += f"; then: {error}"
    made.close()
    return found


def _first(output: Any) -> Any:
    return output[0] if isinstance(output, tuple) else output


def desertion(planned: dict[str, Any]) -> str:
    """The last rank never comes back from the caller's code."""
    lower_limits()
    made, batch = compiled("bert-qa", planned=planned, stall_timeout_s=5.0)
    try:
        for _ in range(3):
            made.train_step(batch)
            if dist.get_rank() and made.global_step == 2:
                time.sleep(LONG_S)
    except ipp.errors.StallError as error:
        made.close()
        return str(error)
    return "trained"


def absent_at_the_start(planned: dict[str, Any]) -> str:
    """The last rank dies before it has compiled the model; the others wait for it."""
    lower_limits()
    if dist.get_rank():
        os._exit(9)
    try:
        compiled("bert-qa", planned=planned, stall_timeout_s=5.0)
    except ipp.errors.StageError as error:
        return str(error)
    return "started"


def after_an_error(planned: dict[str, Any], where: str, rank: int) -> list[float]:
    """Let a rank fail in a second step; return the losses of another executable that follows."""
    made, batch = compiled("bert-qa", planned=planned)

    def fail(*_: Any) -> None:
        if made.global_step == 1 and dist.get_rank() == rank:
            _raise()

    def backward(*seen: Any) -> None:
        _first(seen[-1]).register_hook(fail)

    for layer in made.model.bert.encoder.layer:
        if where == "forward":
            layer.register_forward_pre_hook(fail)
        elif where == "backward":
            layer.register_forward_hook(backward)
    if where == "optimizer":
        made.optimizer.register_step_pre_hook(fail)
    made.train_step(batch)
    try:
        made.train_step(batch)
    except ipp.errors.StageError:
        made.close()
    again, batch = compiled("bert-qa", planned=planned)
    with again:
        return [again.train_step(batch).loss for _ in range(3)]
