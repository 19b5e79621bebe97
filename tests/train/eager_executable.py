"""The reference executable of these tests: runs the model eagerly, microbatch by microbatch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import BertConfig, BertForQuestionAnswering

from ipu_pipeline.ir.graph import BlockGraph
from ipu_pipeline.ir.machine import Device, Link, Machine
from ipu_pipeline.ir.plan import ModelIdentity, Plan, PlannedStage
from ipu_pipeline.stages.executable import EvalResult, Executable, StepResult
from ipu_pipeline.stages.training import apply_update

VOCABULARY, LENGTH = 64, 12


def tiny_bert(seed: int = 0, **settings: Any) -> BertForQuestionAnswering:
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=LENGTH,
        **settings,
    )
    return BertForQuestionAnswering(config)


class Questions(torch.utils.data.Dataset):
    """Random token rows whose answer is where a marker token stands: learnable."""

    def __init__(self, num_samples: int = 24, seed: int = 1) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.rows = torch.randint(5, VOCABULARY, (num_samples, LENGTH), generator=generator)
        self.places = torch.randint(0, LENGTH, (num_samples,), generator=generator)
        self.rows[torch.arange(num_samples), self.places] = 3

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        place = int(self.places[index])
        return {
            "input_ids": self.rows[index].tolist(),
            "start_positions": place,
            "end_positions": place,
        }


class EagerExecutable(Executable):
    """Runs the unsplit model in the calling thread."""

    batch_divisor: int | None = None

    def __init__(
        self,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer | None,
        *,
        microbatches: int = 1,
        replicas: int = 1,
        loss_scaling: float = 1.0,
        max_grad_norm: float | None = 1.0,
        seed: int = 42,
    ) -> None:
        super().__init__(model, _plan(model, microbatches, replicas), optimizer)
        self.parts = microbatches * replicas
        self.loss_scaling = loss_scaling
        self.max_grad_norm = max_grad_norm
        self.seed = seed
        self.losses: list[float] = []

    def forward_backward(self, batch: Mapping[str, Tensor]) -> float:
        self.model.train()
        losses = []
        for number, part in enumerate(_split(batch, self.parts)):
            torch.manual_seed(hash((self.seed, self.global_step, number)))
            loss = self.model(**part).loss
            (loss * self.loss_scaling / self.parts).backward()
            losses.append(loss.item())
        return sum(losses) / len(losses)

    def train_step(self, batch: Mapping[str, Tensor]) -> StepResult:
        assert self.optimizer is not None
        loss = self.forward_backward(batch)
        update = apply_update(
            self.optimizer,
            self.model.parameters(),
            loss_scaling=self.loss_scaling,
            max_grad_norm=self.max_grad_norm,
        )
        self.global_step += 1
        self.losses.append(loss)
        return StepResult(
            loss=loss,
            grad_norm=update.grad_norm,
            skipped=update.skipped,
            num_samples=len(next(iter(batch.values()))),
        )

    def eval_step(self, batch: Mapping[str, Tensor]) -> EvalResult:
        self.model.eval()
        with torch.no_grad():
            output = dict(self.model(**batch))
        loss = output.pop("loss", None)
        return EvalResult(None if loss is None else loss.item(), output)


def _split(batch: Mapping[str, Tensor], parts: int) -> list[dict[str, Tensor]]:
    size = len(next(iter(batch.values())))
    assert size % parts == 0, f"{size} samples do not divide into {parts} microbatches"
    chunks = {name: tensor.chunk(parts) for name, tensor in batch.items()}
    return [{name: chunk[i] for name, chunk in chunks.items()} for i in range(parts)]


def _plan(model: torch.nn.Module, microbatches: int, replicas: int) -> Plan:
    shapes = {
        name: f"{'x'.join(map(str, p.shape))} {str(p.dtype).removeprefix('torch.')}"
        for name, p in model.named_parameters()
    }
    device = Device("cpu", 1 << 30, {"float32": 1e9}, 1e9)
    return Plan(
        model=ModelIdentity(type(model).__name__, shapes),
        machine=Machine("here", (device,), Link(1e9)),
        stages=(PlannedStage(0, ()),),
        graph=BlockGraph(type(model).__name__, ()),
        num_microbatches=microbatches,
        replicas=replicas,
    )
