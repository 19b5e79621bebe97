"""Microbatches that the caller has cut; executables for evaluation only."""

from __future__ import annotations

import pytest
import torch

import ipu_pipeline as ipp
from ipu_pipeline.errors import LoweringError
from tests.backends.local.helpers import compiled
from tests.tiny_models import TINY


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_parts_of_several_shapes_and_any_weights() -> None:
    executable, _ = compiled(dropout=False, learning_rate=None)
    model = executable.model
    parts = [
        TINY["bert-qa"].batch(batch_size=size, seq_length=length, seed=size)
        for size, length in ((2, 16), (1, 12), (3, 8))
    ]
    weights = [0.5, 2.0, 1.0]
    model.train()
    expected = [model(**part).loss for part in parts]
    sum(w * loss for w, loss in zip(weights, expected, strict=True)).backward()
    reference = gradients(model)
    model.zero_grad()
    with executable:
        losses = executable.forward_backward_parts(parts, weights)
        results = executable.eval_parts(parts)
    assert losses == pytest.approx([loss.item() for loss in expected], rel=1e-6)
    found = gradients(model)
    assert found.keys() == reference.keys()
    for name, gradient in reference.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-6)
    model.eval()
    for part, result in zip(parts, results, strict=True):
        with torch.no_grad():
            output = model(**part)
        assert result.loss == pytest.approx(float(output.loss), rel=1e-6)
        torch.testing.assert_close(result.outputs["start_logits"], output.start_logits)


def test_parts_without_a_weight_each_are_refused() -> None:
    executable, batch = compiled()
    with executable:
        with pytest.raises(LoweringError, match=r"2 microbatches with 1 weight .* one weight for"):
            executable.forward_backward_parts([batch, batch], [1.0])
        with pytest.raises(LoweringError, match=r"0 microbatches with 0 weights .* at least one"):
            executable.eval_parts([])


def without_labels(name: str = "bert-qa") -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    model, batch = TINY[name].build(dropout=True)
    return model.eval(), {n: v for n, v in batch.items() if "positions" not in n and n != "labels"}


@pytest.mark.parametrize("name", ["bert-qa", "gpt2-lm", "vit"])
def test_inference_from_a_plan_made_without_labels(name) -> None:
    model, batch = without_labels(name)
    plan = ipp.plan(model, batch, num_stages=2, microbatches=4)
    assert "loss" not in [block.name for block in plan.blocks]
    big = {n: torch.cat([v, v.flip(0), v[:1]]) for n, v in batch.items()}
    with torch.no_grad():
        expected = model(**big)
    with ipp.compile(model, plan, training=False) as executable:
        found = executable.eval_step(big)
        assert found.loss is None
        for key, value in found.outputs.items():
            torch.testing.assert_close(value, expected[key], rtol=1e-5, atol=1e-5)
        refusal = "compiled with training=False, for eval_step only; compile it again"
        with pytest.raises(LoweringError, match=refusal):
            executable.train_step(big)
        with pytest.raises(LoweringError, match=refusal):
            executable.forward_backward(big)
    assert not model.training


def test_a_plan_made_with_labels_serves_inference_too() -> None:
    model, batch = TINY["bert-qa"].build()
    plan = ipp.plan(model, batch, num_stages=2)
    with ipp.compile(model, plan, training=False) as executable:
        assert executable.eval_step(batch).loss is not None
        rest = {name: value for name, value in batch.items() if "positions" not in name}
        assert executable.eval_step(rest).loss is None


def test_a_plan_made_without_labels_trains_in_its_stages_too() -> None:
    model, batch = without_labels()
    plan = ipp.plan(model, batch, num_stages=2)
    labelled = TINY["bert-qa"].batch()
    with ipp.compile(model, plan) as executable:
        loss = executable.forward_backward(labelled)
    assert loss == pytest.approx(model(**labelled).loss.item())
    assert all(parameter.grad is not None for parameter in model.bert.encoder.parameters())


def test_an_optimizer_without_training_is_refused() -> None:
    model, batch = without_labels()
    plan = ipp.plan(model, batch, num_stages=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="training=False leaves nothing to an optimizer"):
        ipp.compile(model, plan, training=False, optimizer=optimizer)
