"""Mixtures of experts with their load-balancing losses: the same weights as with ``Trainer``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers import Trainer

from ipu_pipeline.train import PipelineTrainer
from tests.capture.test_experts import FAMILIES, SIZES
from tests.later import every_second, now
from tests.train.test_trainer_losses import both

LENGTH = 8


def model(family: str) -> Any:
    config = getattr(transformers, f"{family}Config")(**SIZES, **FAMILIES[family])
    if family != "DeepseekV3":  # balances by a bias of its router
        config.output_router_logits = True
        config.router_aux_loss_coef = 0.5
    torch.manual_seed(0)
    return getattr(transformers, f"{family}ForCausalLM")(config)


def rows() -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    found = []
    for number in range(8):
        length = LENGTH - number % 4
        ids = torch.randint(1, 60, (length,), generator=generator).tolist()
        padding = LENGTH - length
        found.append(
            {
                "input_ids": [*ids, *[0] * padding],
                "attention_mask": [1] * length + [0] * padding,
                "labels": [*ids, *[-100] * padding],
            }
        )
    return found


@pytest.mark.parametrize("family", now(("Mixtral", "DeepseekV3"), FAMILIES))
def test_three_steps_and_an_evaluation(family: str, tmp_path: Path) -> None:
    theirs, ours = both(
        (Trainer, PipelineTrainer), lambda: model(family), tmp_path, rows(), {"max_steps": 3}
    )
    for name, value in theirs.model.state_dict().items():
        torch.testing.assert_close(ours.model.state_dict()[name], value, rtol=1e-4, atol=1e-5)
    expected, found = (trainer.evaluate(rows())["eval_loss"] for trainer in (theirs, ours))
    assert found == pytest.approx(expected, rel=1e-5)


def tensors(value: Any) -> list[np.ndarray]:
    return [value] if isinstance(value, np.ndarray) else [a for v in value for a in tensors(v)]


@pytest.mark.parametrize("implementation", every_second(["eager", "sdpa"]))
def test_predict_returns_hidden_states_and_attentions(implementation: str, tmp_path: Path) -> None:
    def bert() -> Any:
        config = transformers.BertConfig(
            vocab_size=64, hidden_size=16, num_hidden_layers=3, num_attention_heads=2,
            intermediate_size=16, max_position_embeddings=16, num_labels=3,
            hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
            output_hidden_states=True, attn_implementation=implementation,
        )  # fmt: skip
        config.output_attentions = implementation == "eager"
        torch.manual_seed(0)
        return transformers.BertForSequenceClassification(config)

    dataset = [{**row, "labels": n % 3} for n, row in enumerate(rows())]
    theirs, ours = both((Trainer, PipelineTrainer), bert, tmp_path, dataset, {"max_steps": 1})
    expected, found = (tensors(t.predict(dataset).predictions) for t in (theirs, ours))
    assert len(found) == len(expected) == (8 if implementation == "eager" else 5)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
