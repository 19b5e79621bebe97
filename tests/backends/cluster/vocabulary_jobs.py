"""What the processes of the tests of a spread vocabulary do; results are plain data."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn

import ipu_pipeline as ipp
from ipu_pipeline.backends.cluster.pipeline import _NotedStage
from ipu_pipeline.stages.chunked_loss import DeferredLogits
from tests.backends.cluster import jobs


def own_gradients(name: str, planned: dict[str, Any], **options: Any) -> dict[str, Any]:
    """Compare this rank's gradients, of tables those of its rows, with plain torch's.

    Those of a call before are added to, and a short microbatch is a run of its own.
    """
    made, batch = jobs.compiled(name, planned=planned, learning_rate=None, **options)
    batch = {key: value[:-1] for key, value in batch.items()}
    with made:
        made.forward_backward(batch)
        loss = made.forward_backward(batch)
        named = [(n, p) for n, p in made.model.named_parameters() if p.grad is not None]
        found = {n: p.grad.clone() / 2 for n, p in named}
        tables = {n for n, p in named if made._slices.is_cut(p)}
        rows = slice(*(made._slices.rows or (0, 0)))
    made.model.zero_grad()
    number = len(next(iter(batch.values())))
    expected_loss = 0.0
    for first in range(0, number, 2):
        part = {key: value[first : first + 2] for key, value in batch.items()}
        share = len(next(iter(part.values()))) / number
        own = made.model(**part).loss
        (own * share).backward()
        expected_loss += own.item() * share
    expected = {n: p.grad for n, p in made.model.named_parameters() if p.grad is not None}
    scale = max(gradient.abs().max().item() for gradient in expected.values())
    errors = {
        n: (g - (expected[n][rows] if n in tables else expected[n])).abs().max().item() / scale
        for n, g in found.items()
    }
    return {
        "loss": loss,
        "expected_loss": expected_loss,
        "error": max(errors.values()),
        "found": set(found),
        "expected": set(expected),
        "tables": tables,
        "rows": (rows.start, rows.stop),
    }


def train_and_reload(planned: dict[str, Any], path: str, **options: Any) -> dict[str, Any]:
    """Train, save and go on; load under whole blocks, and spread otherwise, and go on likewise."""
    name, common = "gpt2-lm", {"max_grad_norm": 0.5, **options}
    made, batch = jobs.compiled(name, planned={"dropout": True, **planned}, **common)
    with made:
        before = [made.train_step(batch) for _ in range(2)]
        held = sum(p.numel() for p in made.model.parameters() if jobs.held(made, p))
        moments = jobs.num_moments(made)
        made.save_checkpoint(path)
        after = [made.train_step(batch).loss for _ in range(2)]
        state = {n: jobs.digest(t) for n, t in made.state_dict().items()}
        wte = tuple(made.state_dict()["transformer.wte.weight"].shape)
    found = {}
    for vocabulary in (None, [1, 2]):
        other = {"dropout": True, **planned, "vocabulary": vocabulary}
        again, _ = jobs.compiled(name, planned=other, **common)
        with again:
            again.load_checkpoint(path)
            found[str(vocabulary)] = [again.train_step(batch).loss for _ in range(2)]
    return {
        "losses": [step.loss for step in before],
        "norms": [step.grad_norm for step in before],
        "after": after,
        "again": found,
        "held": held,
        "moments": moments,
        "state": state,
        "shape": wte,
    }


def evaluated(name: str, planned: dict[str, Any]) -> dict[str, float]:
    """Evaluate with rows apart; return the largest difference from plain torch of each output."""
    options = {"learning_rate": None, "loss_weights": None, "self_check": True}  # as by default
    made, batch = jobs.compiled(name, planned=planned, **options)
    whole = mock.patch.object(DeferredLogits, "materialised", side_effect=AssertionError("whole"))
    with made, whole:
        made.forward_backward(batch)
        result = made.eval_step(batch)
    with torch.no_grad():
        expected = made.model.eval()(**batch)
    errors = {n: (v - expected[n]).abs().max().item() for n, v in result.outputs.items()}
    assert result.loss is not None
    return {**errors, "loss": abs(result.loss - expected.loss.item())}


def from_meta(planned: dict[str, Any], folder: str) -> dict[str, Any]:
    """Let each process read its own rows; save what it has trained."""
    model, plan, batch = jobs.built("gpt2-lm", **planned)
    source = Path(folder) / "source"
    if dist.get_rank() == 0:
        model.save_pretrained(source)
    dist.barrier()
    empty: Any = ipp.on_meta(source)
    optimizer = torch.optim.AdamW(empty.parameters(), lr=1e-3)
    with ipp.compile(
        empty, plan, target="distributed", optimizer=optimizer, weights=source,
        loss_weights="samples",
    ) as made:  # fmt: skip
        losses = [made.train_step(batch).loss for _ in range(2)]
        table = empty.transformer.wte.weight
        shape = tuple(table.shape)
        made.save_checkpoint(Path(folder) / "saved")
    whole = load_all(Path(folder) / "saved")["transformer.wte.weight"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with ipp.compile(model, plan, optimizer=optimizer, loss_weights="samples") as local:
        expected = [local.train_step(batch).loss for _ in range(2)]
    error = (whole - model.transformer.wte.weight).abs().max().item()
    return {"losses": losses, "expected": expected, "shape": shape, "error": error}


def load_all(folder: Path) -> dict[str, Tensor]:
    """Return the tensors of all files of a model."""
    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("model*.safetensors")):
        found.update(load_file(file))
    return found


def in_flight(planned: dict[str, Any]) -> dict[int, int]:
    """Return the most microbatches that each stage here keeps."""
    made, batch = jobs.compiled("gpt2-lm", planned=planned, learning_rate=None)
    kept: dict[int, int] = {}
    forward = _NotedStage.forward_one_chunk

    def noted(stage: _NotedStage, *args: Any, **options: Any) -> Any:
        found = forward(stage, *args, **options)
        kept[stage.stage_index] = max(kept.get(stage.stage_index, 0), len(stage.fwd_cache))
        return found

    with made, mock.patch.object(_NotedStage, "forward_one_chunk", noted):
        made.forward_backward(batch)
    return kept


class Rowwise(torch.optim.SGD):
    """Divides a gradient by its norm, which rows of it do not have."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad /= parameter.grad.norm()
        super().step()


REFUSED: dict[str, dict[str, Any]] = {
    "compiled": {"compile_blocks": True},
    "an optimizer": {"optimizer_class": Rowwise},
}


def refusal(what: str, planned: dict[str, Any]) -> str:
    """Return what is said to something that cannot run with spread rows."""
    options = dict(REFUSED.get(what, {}))
    if what == "sharded":
        options["replicated_tensor_sharding"] = True
    try:
        made, _ = jobs.compiled("gpt2-lm", planned=planned, **options)
    except ipp.errors.LoweringError as error:
        return str(error)
    made.close()
    return "started"


class Pooled(nn.Module):
    """Uses its table in another way than models do."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.EmbeddingBag(40, 8)
        self.layer = nn.Linear(8, 8)
        self.head = nn.Linear(8, 40, bias=False)

    def forward(self, ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.head(self.layer(self.embed(ids)))
        return {"loss": nn.functional.cross_entropy(logits, labels)}


def another_use() -> str:
    """Return what is said when a table is used by a function that knows nothing of rows."""
    model = Pooled()
    batch = {"ids": torch.arange(16).reshape(4, 4), "labels": torch.arange(4)}
    example = {name: value[:2] for name, value in batch.items()}
    plan = ipp.plan(model, example, num_stages=2, microbatches=2, vocabulary="even")
    made = ipp.compile(model, plan, target="distributed", self_check=False)
    try:
        with made:
            made.forward_backward(batch)
    except ipp.errors.PipelineError as error:
        return str(error)
    return "ran"


def wrong_label(planned: dict[str, Any]) -> str:
    """Return what is said to a label that is no class: it is found by the process of the loss."""
    made, batch = jobs.compiled("gpt2-lm", planned=planned, learning_rate=None)
    batch["labels"][-1, -1] = 10_000
    try:
        made.forward_backward(batch)
    except ipp.errors.StageError as error:
        made.close()
        return str(error)
    return "ran"
