"""What the processes of the tests of generation do; results are plain data."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from transformers import LogitsProcessor, set_seed
from transformers.generation import StoppingCriteria
from transformers.generation.streamers import BaseStreamer

import ipu_pipeline as ipp
from ipu_pipeline.backends.cluster.inference import positions_of_weights
from ipu_pipeline.errors import PipelineError
from tests.backends.cluster.jobs import built, compiled
from tests.tiny_models import TINY

LENGTHS = {"max_new_tokens": 6, "min_new_tokens": 6}
_INPUTS = ("input_ids", "attention_mask", "input_features", "pixel_values")


def inputs_of(batch: dict[str, Any], rows: slice = slice(3)) -> dict[str, Any]:
    return {name: batch[name][rows] for name in _INPUTS if name in batch}


def generated(name: str, planned: dict[str, Any], steps: int = 1) -> list[Any]:
    """Train, then generate in all ways; compare with the trained model alone, of the same seed."""
    made, batch = compiled(name, planned=planned)
    given = inputs_of(batch)
    with made:
        for _ in range(steps):
            made.train_step(batch)
        alone = copy.deepcopy(made.model).eval()
        alone.load_state_dict(made.state_dict())
        _spoil(made)
        found, seed = [], 7 + dist.get_rank()  # that of the first rank counts
        for way in ({"num_beams": 2}, {"do_sample": True, "top_k": 20}):
            set_seed(seed)
            tokens = made.generate(**given, **LENGTHS, **way)
            after = torch.rand(())
            set_seed(7)
            found.append(torch.equal(tokens, alone.generate(**given, **LENGTHS, **way)))
            found.append(bool(after == torch.rand(())))
        parts = [inputs_of(batch, slice(n, n + 2)) for n in range(3)]
        set_seed(seed)
        tokens = made.generate_parts(parts, do_sample=True, **LENGTHS)
        for part, own in zip(parts, tokens, strict=True):
            set_seed(7)
            found.append(torch.equal(own, alone.generate(**part, do_sample=True, **LENGTHS)))
        logits = made.forward(**{n: v[:2] for n, v in batch.items()}).logits
        with torch.no_grad():
            expected = alone(**{n: v[:2] for n, v in batch.items()}).logits
        found.append(torch.allclose(logits, expected, atol=1e-5))
        found.append(
            not any(m._forward_hooks or m._forward_pre_hooks for m in made.model.modules())
        )
        found.append(made.model.training)
    return found


def _spoil(made: Any) -> None:
    """Make what this rank does not hold NaN, so that it cannot be used unseen."""
    layout = made.groups.layout
    for parameter, where in positions_of_weights(made.model, made.plan, layout).items():
        if not where >> layout.position & 1:
            parameter.data.fill_(torch.nan)


def from_meta(weights: str) -> Any:
    """Generate with a model on meta, in float32 and where it is refused."""
    _, plan, batch = built("gpt2-lm", num_stages=2)
    model, _ = TINY["gpt2-lm"].build(device="meta")
    refused = []
    with ipp.compile(model, plan, target="distributed", training=False, weights=weights) as made:
        tokens = made.generate(**inputs_of(batch), **LENGTHS).tolist()
        for options in ({"past_key_values": object()}, {"nothing": 1}):
            with pytest.raises((PipelineError, ValueError)) as caught:
                made.generate(**inputs_of(batch), **options)
            refused.append(str(caught.value))
    return tokens, refused


def refused(planned: dict[str, Any], **options: Any) -> str:
    """Return why a plan or an option does not generate."""
    made, batch = compiled("gpt2-lm", planned=planned, learning_rate=None, **options)
    with made, pytest.raises(PipelineError) as caught:
        made.generate(**inputs_of(batch))
    return str(caught.value)


class _Stops(StoppingCriteria):
    """Stops behind a length that is another one on every rank, as a clock would."""

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        length = input_ids.shape[1]
        return torch.full((len(input_ids),), length >= (10 if dist.get_rank() == 0 else 99))


class _Heard(BaseStreamer):
    """Keeps what it is given."""

    def __init__(self) -> None:
        self.tokens: list[Any] = []

    def put(self, value: torch.Tensor) -> None:
        self.tokens.append(value.tolist())

    def end(self) -> None:
        self.tokens.append("end")


class _Favours(LogitsProcessor):
    """Favours a token that is another one on every rank."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores + 1e3 * torch.eye(scores.shape[1])[3 + dist.get_rank()]


def served(cases: list[str]) -> list[Any]:
    """Return what pipelines over the ranks give, and those of the model alone."""
    from tests.test_task_pipeline import served

    return [served(case, target="distributed") for case in cases]


def decided_otherwise() -> dict[str, Any]:
    """Generate with what is not the same on all ranks, or not the same for every token."""
    made, batch = compiled("gpt2-lm", planned={"num_stages": 2}, learning_rate=None)
    ids, found = batch["input_ids"][:2, :8], {}
    with made:
        found["stopped"] = made.generate(input_ids=ids, stopping_criteria=[_Stops()], **LENGTHS)
        heard, alone = _Heard(), _Heard()
        parts = [{"input_ids": ids[n : n + 1]} for n in range(2)]
        made.generate_parts(parts, streamer=heard, **LENGTHS)
        for part in parts:
            made.generate(**part, streamer=alone, **LENGTHS)
        found["in_turn"] = heard.tokens == alone.tokens
        with pytest.raises(PipelineError) as caught:
            made.generate(  # the first rank draws the end, the others do not
                input_ids=ids, logits_processor=[_Favours()], eos_token_id=3, max_new_tokens=6
            )
        found["refused"] = str(caught.value)
        again = made.generate(input_ids=ids, stopping_criteria=[_Stops()], **LENGTHS)
        found["again"] = torch.equal(again, found["stopped"])
        found["left"] = [name for name in vars(made.model) if "criteria" in name]
    return {**found, "stopped": found["stopped"].shape[1]}
