"""All training scripts with a loss or a step of their own; modules put theirs in ``PROGRAMS``."""

from __future__ import annotations

from tests.train import live_losses, live_state, live_steps
from tests.train.live_program import PROGRAMS, cross_entropy, with_loss

__all__ = ["PROGRAMS", "cross_entropy", "live_losses", "live_state", "live_steps", "with_loss"]
