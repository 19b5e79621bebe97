"""Steps of a target that keeps weights and optimizer state where it trains: IPUs.

The inherited loop hands in microbatches, clips gradients, steps the optimizer and saves. On IPUs
one call of the device does the first three: here the optimizer finds no gradients and changes
nothing, but holds the learning rate, which goes to the device with every step. Weights and
optimizer state come back when something reads them: a checkpoint, ``save_model``, the best model,
callbacks that are not transformers' own, and the end of ``train``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import RandomSampler, Sampler
from transformers.utils import logging

from ipu_pipeline import compiler
from ipu_pipeline.backends.ipu.config import IPUConfig
from ipu_pipeline.backends.ipu.executable import PopTorchExecutable, rows
from ipu_pipeline.capture.inputs import NUM_ITEMS
from ipu_pipeline.errors import StageError
from ipu_pipeline.ir.limits import count_of
from ipu_pipeline.train.live_loss import calls_of, generates
from ipu_pipeline.train.steps import CollectedSteps, as_output

if TYPE_CHECKING:
    from ipu_pipeline.train.mixin import PipelineMixin

logger = logging.get_logger(__name__)
_TOLERANCE = 1e-4  # of two losses that are the same but for rounding
_MEAN_OF_MEANS = (
    "IPUs take the mean of the microbatches' means; set trainer.model_accepts_loss_kwargs = False, "
    "with which transformers' Trainer does the same, or use target='local'"
)


class DeviceSteps(CollectedSteps):
    """The steps of a trainer whose stages are IPUs.

    Args:
        trainer: The trainer.
        ipu_config: What to plan with, and what the plan does not say.
        sdk_python: As for :func:`ipu_pipeline.compile`.
    """

    target = "poptorch"
    reads_ahead = has_gradients = False
    inside_step = "which IPUs make in one call"
    runs_alone = "a program on IPUs holds the model alone"

    def __init__(
        self, trainer: PipelineMixin, ipu_config: IPUConfig | None, sdk_python: str | None
    ) -> None:
        super().__init__(trainer)
        self._ipu_config = ipu_config
        self._sdk_python = sdk_python
        self._is_loss_compared = False

    # ---- steps --------------------------------------------------------------------------

    def step(self, parts: Sequence[Mapping[str, Any]], num_items: Any) -> float:
        """Make one optimizer step of all microbatches; return their mean loss.

        Raises:
            ValueError: The loss is another mean, or the microbatches are of different shapes.
            LoweringError: poptorch refuses the model.
            StageError: The worker died.
        """
        trainer, batch = self._trainer, joined(parts)
        if trainer._loss_is_whole(num_items):
            self._check_loss(parts)
        executable = self._ready(parts[0], training=True)
        executable.global_step = trainer.state.global_step
        try:
            return executable.train_step(batch).loss
        except StageError:
            self.close()
            raise

    def _check_loss(self, parts: Sequence[Mapping[str, Any]]) -> None:
        """Refuse a loss over the items of all microbatches that is not the mean of their means."""
        trainer, size = self._trainer, self._trainer.args.per_device_train_batch_size
        copies = self._trainer.args.train_batch_size // size
        own = [rows(part, n * size, (n + 1) * size) for part in parts for n in range(copies)]
        items = [trainer._get_num_items_in_batch([part], trainer.args.device) for part in own]
        counts = [int(count or 0) for count in items]
        if len(set(counts)) > 1:
            raise ValueError(
                f"the labels that count in the microbatches of this step are {counts}, and the "
                f"loss is the mean over all of them, while {_MEAN_OF_MEANS}"
            )
        if self._is_loss_compared:
            return
        self._is_loss_compared = True
        mean, whole = self._losses(own[0], counts[0])
        if abs(mean - whole) > _TOLERANCE * max(abs(mean), 1e-3):
            raise ValueError(
                f"with num_items_in_batch, which transformers' Trainer passes, the loss of a "
                f"microbatch is {whole:.6g}, and {mean:.6g} without it, while {_MEAN_OF_MEANS}"
            )

    def _losses(self, part: Mapping[str, Any], count: int) -> tuple[float, float]:
        """Return the loss of a microbatch as the device computes it, and as transformers does."""
        model, items = self._trainer._whole_model, torch.tensor(count)
        modes = [(module, module.training) for module in model.modules()]
        model.eval()
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                mean, whole = model(**part)["loss"], model(**part, **{NUM_ITEMS: items})["loss"]
        finally:
            for module, mode in modes:
                module.training = mode
        return float(mean), float(whole)

    def train_sampler(self, sampler: Sampler[int] | None) -> Sampler[int] | None:
        """Return a sampler that gives whole steps in the same order.

        Raises:
            ValueError: It cannot be shortened, or there is not one whole step.
        """
        args = self._trainer.args
        size = args.train_batch_size * args.gradient_accumulation_steps
        count = 0 if sampler is None else len(sampler)  # type: ignore[arg-type]
        left_out = count % size
        if sampler is None or not left_out:
            return sampler
        if type(sampler) is not RandomSampler or count < size:
            raise ValueError(
                f"the data holds {count_of(count, 'sample')}, and a step on IPUs takes exactly "
                f"{size} = micro batch x microbatches x replicas; give {count - left_out or size} "
                "samples, or change gradient_accumulation_steps"
            )
        logger.warning(
            "%d of %d samples are left out of each epoch (another random choice every time): a "
            "step on IPUs takes exactly %d",
            left_out,
            count,
            size,
        )
        return RandomSampler(
            sampler.data_source, num_samples=count - left_out, generator=sampler.generator
        )

    # ---- evaluation ---------------------------------------------------------------------

    def predict(self, bodies: Sequence[Callable[[], Any]]) -> list[Any]:
        """Run code that predicts a batch each; its calls of the model run on IPUs."""
        model = self._trainer._whole_model

        def call(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: Any) -> Any:
            own = torch.is_grad_enabled() or any(module.training for module in model.modules())
            if own or generates(kwargs):
                self.fetch()
                return forward(*args, **kwargs)
            inputs = inspect.signature(forward).bind_partial(*args).arguments | kwargs
            return as_output(self._ready(inputs, training=False).eval_step(inputs))

        with calls_of(model, call):
            return [body() for body in bodies]

    # ---- the executable -----------------------------------------------------------------

    def fetch(self, *, optimizer: bool = False) -> None:
        """Bring the weights here up to date, and the optimizer's state if asked."""
        if isinstance(self.executable, PopTorchExecutable):
            self.executable.fetch()
            if optimizer:
                self.executable.fetch_optimizer()

    def _ready(self, part: Mapping[str, Any], *, training: bool) -> PopTorchExecutable:
        """Return the executable of the present model, with the present optimizer to train."""
        optimizer = self._optimizer() if training or self._trainer.is_in_train else None
        made = self.executable
        stale = made is not None and optimizer is not None and made.optimizer is not optimizer
        if stale or not self.has_executable():
            self.close()
            self.executable = self._compile(part, optimizer)
        assert isinstance(self.executable, PopTorchExecutable)
        return self.executable

    def _compile(
        self, part: Mapping[str, Any], optimizer: torch.optim.Optimizer | None
    ) -> PopTorchExecutable:
        trainer, args = self._trainer, self._trainer.args
        with torch.random.fork_rng(devices=[]):
            plan = trainer.planned(rows(part, 0, args.per_device_train_batch_size))
            iterations = self._ipu_config.device_iterations if self._ipu_config else 1
            if iterations > 1:
                raise ValueError(
                    f"device_iterations {iterations} makes several optimizer steps "
                    "in one call, and transformers' loop counts, logs and schedules one; set it to "
                    "1, or use ipu_pipeline.train.train"
                )
            made = compiler.compile(
                trainer._whole_model,
                plan,
                target="poptorch",
                optimizer=optimizer,
                ipu_config=self._ipu_config,
                sdk_python=self._sdk_python,
                max_grad_norm=args.max_grad_norm or None,
                seed=args.seed,
            )
        assert isinstance(made, PopTorchExecutable)
        return made


def joined(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return one batch of all microbatches; what is no tensor is the first one's.

    Raises:
        ValueError: A tensor has another shape than in the first microbatch.
    """
    found: dict[str, Any] = {}
    for name, first in parts[0].items():
        if not isinstance(first, Tensor):
            found[name] = first
            continue
        values = [part[name] for part in parts]
        shapes = {tuple(value.shape) for value in values}
        if len(shapes) > 1:
            raise ValueError(
                f"{name!r} has the shapes {sorted(shapes)} in the microbatches of one step, and a "
                "program on IPUs has one; pad all samples to one length (padding='max_length'), "
                "and let dataloader_drop_last leave out a short last batch"
            )
        found[name] = torch.cat(values)
    return found
