"""Evaluation returns what the model returns, nested as it does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import ipu_pipeline as ipp
from ipu_pipeline.capture import capture
from ipu_pipeline.capture.values import named_tensors, nested_by_name
from tests.capture.test_experts import build

SMALL = {
    "vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2,
    "intermediate_size": 16, "max_position_embeddings": 32,
}  # fmt: skip


def assert_equal(found: Any, expected: Any, name: str) -> None:
    if isinstance(expected, Tensor):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5, msg=name)
    elif isinstance(expected, Mapping):
        for key, value in expected.items():
            assert_equal(found[key], value, f"{name}.{key}")
    else:
        assert len(found) == len(expected), name
        for number, value in enumerate(expected):
            assert_equal(found[number], value, f"{name}[{number}]")


def check(model: nn.Module, inputs: dict[str, Any], stages: int = 2) -> set[str]:
    """Compare with the model; return the names of the outputs."""
    model.eval()
    with torch.no_grad():
        expected = {name: value for name, value in model(**inputs).items() if len(value)}
    part = {n: v[:1] if isinstance(v, Tensor) else v for n, v in inputs.items()}
    plan = ipp.plan(model, part, num_stages=stages, microbatches=2)
    with ipp.compile(model, plan, training=False) as executable:
        found = executable.eval_step(inputs).outputs
    assert_equal(found, expected, "outputs")
    assert found.keys() == expected.keys()
    return set(found)


def ids() -> Tensor:
    return torch.randint(1, 60, (2, 8), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("said", ["config", "argument"])
def test_hidden_states_and_attentions(said: str) -> None:
    config = transformers.BertConfig(**SMALL, attn_implementation="eager")
    model, inputs = transformers.BertForSequenceClassification(config), {"input_ids": ids()}
    if said == "config":
        config.output_hidden_states = config.output_attentions = True
    else:
        inputs |= {"output_hidden_states": True, "output_attentions": True}
    assert check(model, inputs) == {"logits", "hidden_states", "attentions"}


def test_attentions_of_a_kernel_that_has_none() -> None:
    model = transformers.BertForSequenceClassification(transformers.BertConfig(**SMALL))
    inputs = {"input_ids": ids(), "output_hidden_states": True, "output_attentions": True}
    assert check(model, inputs) == {"logits", "hidden_states"}


def test_router_logits() -> None:
    model, _ = build("Qwen3Moe")
    model.config.output_router_logits = True
    model.config.use_cache = False
    captured = capture(model.eval(), {"input_ids": ids()})
    with torch.no_grad():
        expected, found = model(input_ids=ids()), captured.run({"input_ids": ids()})
    assert_equal(nested_by_name(found)["router_logits"], expected.router_logits, "router logits")


def test_a_model_with_nested_outputs_of_its_own() -> None:
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
            self.first = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> dict[str, Any]:
            h = self.layers[0](self.first(x))
            return {"a": h, "b": (h + 1, None, {"c": [self.layers[1](h)], "d.e": h * 2})}

    inputs = {"x": torch.randn(2, 4)}
    captured = capture(Nested().eval(), inputs)
    assert set(captured.results) == {"a", "b[0]", "b[2][c][0]", "b[2][d.e]"}
    found = nested_by_name(captured.run(inputs))
    assert found["b"][1] is None
    assert set(found["b"][2]) == {"c", "d.e"}
    assert isinstance(found["b"][2]["c"], tuple)


def test_names_of_tensors_and_back() -> None:
    x, y = torch.zeros(1), torch.ones(1)
    assert dict(named_tensors((x.sum(), [y, (x,)]))) == {
        "loss": x.sum(), "output_1[0]": y, "output_1[1][0]": x,
    }  # fmt: skip
    named = {"a[1]": x, "a[0]": y, "b": y, "c[k][0]": x, "d[": y}
    assert nested_by_name(named) == {"a": (y, x), "b": y, "c": {"k": (x,)}, "d[": y}


class Distilled(nn.Module):
    """Trains on attentions and hidden states of its inner model."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        config = transformers.BertConfig(
            **SMALL, attn_implementation="eager", hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0, num_labels=3,
        )  # fmt: skip
        self.student = transformers.BertForSequenceClassification(config)

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        out = self.student(
            input_ids=input_ids, labels=labels, output_attentions=True, output_hidden_states=True
        )
        flat = [*out.attentions, *out.hidden_states]
        return {"loss": out.loss + sum(value.pow(2).mean() for value in flat)}


def test_losses_over_attentions_and_hidden_states() -> None:
    from tests.capture.toys import assert_trains_in_stages

    assert_trains_in_stages(Distilled(), {"input_ids": ids(), "labels": torch.tensor([0, 2])})
