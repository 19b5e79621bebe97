"""What the processes of the tests of tensor parallelism do; results are plain data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from tests.backends.cluster.jobs import compiled, digest


def trained(
    name: str, planned: dict[str, Any], steps: int, path: str = "", load: str = "", **options: Any
) -> dict[str, Any]:
    """Load if asked, train with clipping, save if asked, train on; read it as users do."""
    options = {"max_grad_norm": 0.5, "learning_rate": 1e-2, **options}
    made, batch = compiled(name, planned=planned, **options)
    with made:
        if load:
            made.load_checkpoint(load)
        results = [made.train_step(batch) for _ in range(steps)]
        held = sum(p.nbytes for p in made.model.parameters())
        state = {n: digest(t) for n, t in made.state_dict().items()}
        if path:
            made.save_checkpoint(path, blocking=False)
            results += [made.train_step(batch) for _ in range(steps)]
    read = {}
    if path and made.groups.layout.rank == 0:
        model = AutoModelForCausalLM.from_pretrained(path)
        read = {n: digest(t) for n, t in model.state_dict().items()}
        Path(path, "read").touch()
    return {
        "losses": [result.loss for result in results],
        "norms": [result.grad_norm for result in results],
        "held": held,
        "state": state,
        "read": read,
        "shapes": {n: tuple(p.shape) for n, p in made.model.named_parameters()},
    }


def evaluated(name: str, planned: dict[str, Any]) -> list[float]:
    """Return how far logits of batches of several sizes are from the whole model's."""
    made, batch = compiled(name, planned=planned, learning_rate=None)
    batches = [
        {k: v[:size, :length] for k, v in batch.items()} for size, length in [(5, 16), (3, 11)]
    ]
    with made:
        found = [made.eval_step(own) for own in batches]
    made.model.eval()
    with torch.no_grad():
        expected = [made.model(**own) for own in batches]
    return [
        max((a.outputs["logits"] - b.logits).abs().max().item(), abs(a.loss - b.loss.item()))
        for a, b in zip(found, expected, strict=True)
    ]
