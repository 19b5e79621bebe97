"""A batch in the making: what its builders share.

Axes, also in the builders: B samples, L tokens, C channels, H height, W width, T frames, N patches.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

ROWS, LENGTH, REGIONS = 2, 16, 6


@dataclass(frozen=True)
class Draft:
    """One batch in the making.

    Attributes:
        model: The model.
        task: Its task, see :mod:`tools.coverage.classes`.
        generator: Draws every value.
        padded: Whether the last tokens of the second sample are padding.
        batch: What has been made so far.
    """

    model: nn.Module
    task: str
    generator: torch.Generator
    padded: bool = True
    batch: Mapping[str, Any] = field(default_factory=dict)

    @property
    def config(self) -> Any:
        """The model's config."""
        return self.model.config

    @property
    def text_config(self) -> Any:
        """The part of the config that is about text."""
        try:
            return self.config.get_text_config(decoder=self.config.is_encoder_decoder)
        except ValueError:  # several parts could be meant
            return self.config

    @property
    def vision_config(self) -> Any:
        """The part of the config that is about images."""
        names = ("vision_config", "image_config", "encoder", "backbone_config")
        parts = (getattr(self.config, name, None) for name in names)
        return next((part for part in parts if hasattr(part, "to_dict")), self.config)

    @property
    def audio_config(self) -> Any:
        """The part of the config that is about sound."""
        names = ("audio_config", "speech_config", "encoder_config", "encoder")
        parts = (getattr(self.config, name, None) for name in names)
        return next((part for part in parts if hasattr(part, "to_dict")), self.config)

    def value(self, *names: str, default: Any = None) -> Any:
        """Return the first of these fields that the config, or a part of it, has."""
        for config in (self.config, self.text_config, self.vision_config, self.audio_config):
            for name in names:
                if getattr(config, name, None) is not None:
                    return getattr(config, name)
        return default

    def accepts(self, name: str) -> bool:
        """Whether ``forward`` has an argument of this name."""
        return name in inspect.signature(self.model.forward).parameters

    def requires(self, name: str) -> bool:
        """Whether ``forward`` cannot be called without it."""
        parameters = inspect.signature(self.model.forward).parameters
        return name in parameters and parameters[name].default is inspect.Parameter.empty

    def plus(self, **values: Any) -> Draft:
        """Return the draft with further inputs."""
        return replace(self, batch={**self.batch, **values})

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        """Draw whole numbers in [low, high)."""
        return torch.randint(low, max(high, low + 1), shape, generator=self.generator)

    def normal(self, *shape: int) -> Tensor:
        """Draw normal numbers."""
        return torch.randn(shape, generator=self.generator)

    def uniform(self, *shape: int) -> Tensor:
        """Draw numbers in [0, 1)."""
        return torch.rand(shape, generator=self.generator)
