"""A BERT trained with ``torch.distributed.pipelining`` alone, stages written by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.pipelining as torch_pipelining
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage
from torch.nn import functional
from transformers import BertForQuestionAnswering
from transformers.masking_utils import create_bidirectional_mask

from ipu_pipeline.backends.cluster.layout import torch_schedule

Batch = dict[str, Tensor]


class RawStage(nn.Module):
    """Some layers of a BERT, as one writes them down for ``PipelineStage``.

    Args:
        model: Its modules are used, not copied.
        blocks: Names of the modules of this stage.
        dtype: What is computed in under autocast, and what crosses to the next stage; ``None``
            for no autocast.
    """

    def __init__(
        self,
        model: BertForQuestionAnswering,
        blocks: Sequence[str],
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dtype = dtype
        self.config = model.config
        self.embeddings = model.bert.embeddings if "bert.embeddings" in blocks else None
        layers = {
            f"bert.encoder.layer.{i}": layer for i, layer in enumerate(model.bert.encoder.layer)
        }
        self.layers = nn.ModuleList(layers[name] for name in blocks if name in layers)
        self.head = model.qa_outputs if "qa_outputs" in blocks else None

    def forward(self, x: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> Tensor:
        """Return hidden states ``(B, L, D)``, or logits ``(B, L, 2)`` of the last stage."""
        if self.dtype is None:
            return self._forward(x, attention_mask, token_type_ids)
        with torch.autocast("cpu", self.dtype):
            # Sums and norms of a layer may have been computed in float32.
            return self._forward(x, attention_mask, token_type_ids).to(self.dtype)

    def _forward(self, x: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> Tensor:
        if self.embeddings is not None:
            x = self.embeddings(input_ids=x, token_type_ids=token_type_ids)
        mask = create_bidirectional_mask(
            config=self.config, inputs_embeds=x, attention_mask=attention_mask
        )
        for layer in self.layers:
            x = layer(x, mask)
        return x if self.head is None else self.head(x)


class Raw:
    """Training with torch alone.

    Args:
        model: Cut into stages; trained in place.
        stages: Names of the modules of every stage.
        schedule: Name of the schedule.
        make_optimizer: From parameters to their optimizer.
        dtype: That of autocast; ``None`` for none.
    """

    def __init__(
        self,
        model: BertForQuestionAnswering,
        stages: Sequence[Sequence[str]],
        schedule: str,
        make_optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer],
        dtype: torch.dtype | None = None,
    ) -> None:
        self._kind, count = torch_schedule(schedule), len(stages)
        positions = self._kind.place(count, dist.get_world_size()) or ()
        own = [stage for stage in range(count) if positions[stage] == dist.get_rank()]
        modules = [RawStage(model, stages[index], dtype) for index in own]
        self.modules = nn.ModuleList(modules)
        self._stages = [
            PipelineStage(module, index, count, torch.device("cpu"))
            for module, index in zip(modules, own, strict=True)
        ]
        self._is_last = count - 1 in own
        self._schedules: dict[int, Any] = {}
        self._optimizer = make_optimizer(self.modules.parameters())

    def step(self, batch: Batch, microbatches: int) -> float:
        """Run one optimizer step; return the loss on the rank of the loss, else 0."""
        loss = self.forward_backward(batch, microbatches)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return loss

    def forward_backward(self, batch: Batch, microbatches: int) -> float:
        """Add gradients; return the loss on the rank of the loss, else 0."""
        rest = {name: batch[name] for name in ("attention_mask", "token_type_ids")}
        losses: list[Tensor] = []
        first = (batch["input_ids"],) if dist.get_rank() == 0 else ()
        target = torch.stack([batch["start_positions"], batch["end_positions"]], 1)
        arguments = {"target": target, "losses": losses} if self._is_last else {}
        schedule = self._schedule_of(microbatches)
        schedule.step(*first, return_outputs=False, **arguments, **rest)
        return sum(float(loss.detach()) for loss in losses)

    def _schedule_of(self, microbatches: int) -> Any:
        if microbatches not in self._schedules:
            self._schedules[microbatches] = getattr(torch_pipelining, self._kind.torch_class or "")(
                self._stages[0] if self._kind.stages_per_device == (1,) else self._stages,
                microbatches,
                loss_fn=partial(qa_loss, share=1 / microbatches),
                scale_grads=False,  # the loss has its share already: a pass over them less
            )
        return self._schedules[microbatches]


def qa_loss(logits_BL2: Tensor, target_B2: Tensor, share: float) -> Tensor:
    """Return a microbatch's share of the loss of a batch."""
    starts, ends = logits_BL2.float().unbind(-1)
    both = functional.cross_entropy(starts, target_B2[:, 0]) + functional.cross_entropy(
        ends, target_B2[:, 1]
    )
    return both * (0.5 * share)
