"""Transformers callbacks: who is called, with which state, in the order of their Trainer.

One event of the Trainer has no counterpart: ``on_substep_end`` says that one microbatch is done
and the next not begun, and in a pipeline several are under way at any moment.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch.optim.lr_scheduler import LRScheduler
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_callback import CallbackHandler, DefaultFlowCallback, ExportableState

from ipu_pipeline.train.arguments import TrainingArguments

logger = logging.getLogger(__name__)


class Events:
    """Calls transformers callbacks and keeps the state and control they read and write.

    Args:
        callbacks: Callbacks, or classes of callbacks, in calling order.
        arguments: Passed to every callback as ``args``.
        model: The unsplit model.
        optimizer: Its ``step`` gives ``on_pre_optimizer_step`` and ``on_optimizer_step``.
        scheduler: Learning-rate schedule.
        tokenizer: Passed on as ``processing_class``.
        train_dataloader: Passed on.
    """

    def __init__(
        self,
        callbacks: Sequence[TrainerCallback | type[TrainerCallback]],
        arguments: TrainingArguments,
        *,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        scheduler: LRScheduler,
        tokenizer: Any = None,
        train_dataloader: Any = None,
    ) -> None:
        created = [c() if isinstance(c, type) else c for c in callbacks]
        if not any(isinstance(c, DefaultFlowCallback) for c in created):
            created.insert(0, DefaultFlowCallback())
        self.arguments = arguments
        self.optimizer = optimizer
        self.handler = CallbackHandler(created, model, tokenizer, optimizer, scheduler)
        self.handler.train_dataloader = train_dataloader
        self.control = TrainerControl()
        self.state = TrainerState(
            is_local_process_zero=arguments.should_save,
            is_world_process_zero=arguments.should_save,
            stateful_callbacks=cast(Any, self._exportable()),
            train_batch_size=arguments.train_batch_size,
        )
        self._stepped = False
        self.fire("on_init_end")

    def fire(self, event: str, **kwargs: Any) -> None:
        """Call ``event`` of every callback."""
        call = getattr(self.handler, event)
        self.control = call(self.arguments, self.state, self.control, **kwargs)

    def log(self, logs: dict[str, Any]) -> None:
        """Add ``logs`` to the history (with the epoch, which is set in ``logs`` too) and tell."""
        logs["epoch"] = self.state.epoch
        self.state.log_history.append({**logs, "step": self.state.global_step})
        self.fire("on_log", logs=logs)

    @contextmanager
    def watching_optimizer(self) -> Iterator[None]:
        """Inside, the optimizer's own steps fire the two events around them."""
        handles = [
            self.optimizer.register_step_pre_hook(self._before_step),
            self.optimizer.register_step_post_hook(self._after_step),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def after_update(self) -> None:
        """Fire both optimizer events if the step was skipped, as the Trainer does."""
        if not self._stepped:
            self._before_step()
            self._after_step()
        self._stepped = False

    def callback_states(self) -> dict[str, Any]:
        """Return the states of callbacks that export one, as JSON data."""
        # The state turns the list it is made with into the mapping it keeps.
        state = TrainerState(stateful_callbacks=cast(Any, self._exportable()))
        return cast("dict[str, Any]", state.stateful_callbacks)

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Take over a saved trainer state, and the states of the callbacks that are here too."""
        self.state = TrainerState(**saved)
        self.state.is_local_process_zero = self.arguments.should_save
        self.state.is_world_process_zero = self.arguments.should_save
        for name, data in cast("dict[str, Any]", self.state.stateful_callbacks).items():
            if name == TrainerControl.__name__:
                continue  # control holds for a moment only
            own = [c for c in self.handler.callbacks if type(c).__name__ == name]
            if not own:
                logger.warning("the checkpoint has a state for %s, which is not used now", name)
            for callback, entry in zip(own, data if isinstance(data, list) else [data]):  # noqa: B905
                for attribute, value in entry["attributes"].items():
                    setattr(callback, attribute, value)

    def _exportable(self) -> list[ExportableState]:
        everyone = [*self.handler.callbacks, self.control]
        return [c for c in everyone if isinstance(c, ExportableState)]

    def _before_step(self, *_: Any) -> None:
        self.fire("on_pre_optimizer_step")

    def _after_step(self, *_: Any) -> None:
        self.fire("on_optimizer_step")
        self._stepped = True
