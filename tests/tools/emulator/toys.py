"""Small models for the stand-in's tests, and the plain PyTorch loop that is their reference."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

WIDTH, CLASSES = 6, 3


class Mlp(nn.Module):
    """Two linear layers; returns logits and, with targets, the loss."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, 8)
        self.dropout = nn.Dropout(dropout)
        self.last = nn.Linear(8, CLASSES)

    def forward(self, x, target=None):
        logits = self.last(self.dropout(torch.relu(self.first(x))))
        if target is None:
            return logits
        return logits, functional.cross_entropy(logits, target)


def mlp(seed: int = 0, dropout: float = 0.0) -> Mlp:
    torch.manual_seed(seed)
    return Mlp(dropout)


def batch(size: int, seed: int = 1):
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(size, WIDTH, generator=generator),
        torch.randint(0, CLASSES, (size,), generator=generator),
    )


def two_ipus(poptorch, model: Mlp) -> Mlp:
    poptorch.BeginBlock(model.first, "first", ipu_id=0)
    poptorch.BeginBlock(model.last, "last", ipu_id=1)
    return model


def reference_step(model, optimizer, inputs, *, micro_batches: int, mean=True, clip=None) -> None:
    """One optimizer step of plain PyTorch with accumulation over micro-batches."""
    optimizer.zero_grad()
    size = inputs[0].shape[0] // micro_batches
    for index in range(micro_batches):
        part = [value[index * size : (index + 1) * size] for value in inputs]
        loss = model(*part)[1]
        (loss / micro_batches if mean else loss).backward()
    if clip is not None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimizer.step()


def largest_difference(first: nn.Module, second: nn.Module) -> float:
    pairs = zip(first.parameters(), second.parameters())
    return max(float((a.detach() - b.detach()).abs().max()) for a, b in pairs)
