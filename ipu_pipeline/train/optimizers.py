"""Optimizer and learning-rate schedule, as transformers' Trainer builds them."""

from __future__ import annotations

from typing import Any, cast

import torch
from accelerate import Accelerator  # type: ignore[import-untyped]
from torch.optim.lr_scheduler import LRScheduler
from transformers import get_scheduler

from ipu_pipeline.ops.adamw import StochasticRoundingAdamW
from ipu_pipeline.train.arguments import TrainingArguments


def build_optimizer(model: torch.nn.Module, arguments: TrainingArguments) -> torch.optim.Optimizer:
    """Return AdamW over the model's trainable parameters, each tied parameter once.

    Two groups: weights that transformers decays, then biases and norms with no decay.

    Raises:
        ValueError: No parameter is trainable, or none that is can be rounded stochastically.
    """
    # transformers has the rule as a Trainer method that reads nothing of the Trainer.
    from transformers.trainer import Trainer  # slow to import: only where it is needed

    decayed = set(Trainer.get_decay_parameter_names(cast(Any, None), model))
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if not trainable:
        raise ValueError(
            f"{type(model).__name__} has no trainable parameter; set requires_grad on some"
        )
    dtypes = {p.dtype for _, p in trainable}
    if arguments.stochastic_rounding and torch.bfloat16 not in dtypes:
        raise ValueError(
            f"stochastic_rounding rounds bfloat16 weights, but those of {type(model).__name__} "
            f"are {', '.join(sorted(map(str, dtypes)))}; load the model with dtype=torch.bfloat16, "
            "or leave stochastic_rounding off (bf16=True computes in bfloat16 and keeps float32 "
            "weights)"
        )
    groups = [
        {
            "params": [p for name, p in trainable if name in decayed],
            "weight_decay": arguments.weight_decay,
        },
        {"params": [p for name, p in trainable if name not in decayed], "weight_decay": 0.0},
    ]
    settings: dict[str, Any] = {
        "lr": arguments.learning_rate,
        "betas": (arguments.adam_beta1, arguments.adam_beta2),
        "eps": arguments.adam_epsilon,
    }
    if arguments.stochastic_rounding:
        return StochasticRoundingAdamW(groups, seed=arguments.seed, **settings)
    return torch.optim.AdamW(groups, fused=True, **settings)


def scale_gradients(accelerator: Accelerator, device: torch.device) -> None:
    """Give ``accelerator`` what it has for fp16 on GPUs: a scaler, and gradients unscaled by it.

    Its own mixed precision would wrap ``forward``, and is for GPUs only.
    """
    scaler = accelerator.scaler = torch.amp.GradScaler(device.type)
    scaler.scale(torch.zeros((), device=device))  # which makes its tensors

    def unscale_gradients(optimizer: Any = None) -> None:
        wanted = accelerator._optimizers if optimizer is None else [optimizer]
        for each in wanted:
            scaler.unscale_(getattr(each, "optimizer", each))

    accelerator.unscale_gradients = unscale_gradients


def loss_factor(accelerator: Accelerator) -> float:
    """Return what losses are multiplied by before a backward pass."""
    return 1.0 if accelerator.scaler is None else float(accelerator.scaler.get_scale())


def build_scheduler(
    optimizer: torch.optim.Optimizer, arguments: TrainingArguments, num_training_steps: int
) -> LRScheduler:
    """Return the learning-rate schedule that ``transformers.get_scheduler`` builds."""
    kwargs = cast("dict[str, Any] | None", arguments.lr_scheduler_kwargs)
    return get_scheduler(
        arguments.lr_scheduler_type,
        optimizer=optimizer,
        num_warmup_steps=arguments.get_warmup_steps(num_training_steps),
        num_training_steps=num_training_steps,
        scheduler_specific_kwargs=kwargs,
    )
