"""A real model through the stand-in: BERT for question answering on four IPUs."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from ipu_pipeline.capture.patches import tracing_patches
from tests.tiny_models import TINY

ACCUMULATION, STEPS = 8, 5


class WithLoss(nn.Module):
    """Returns the loss as one independent loss, as every model for poptorch has to."""

    def __init__(self, poptorch, model):
        super().__init__()
        self.inner = model
        self.poptorch = lambda loss: poptorch.identity_loss(loss, "none")

    def forward(self, **inputs):
        output = self.inner(**inputs)
        return self.poptorch(output.loss), output.start_logits


def bert(dropout=False):
    model, inputs = TINY["bert-qa"].build(batch_size=2 * ACCUMULATION, dropout=dropout)
    return model, inputs


def place(poptorch, model) -> None:
    poptorch.BeginBlock(model.bert.embeddings, "embeddings", ipu_id=0)
    for index, layer in enumerate(model.bert.encoder.layer):
        poptorch.BeginBlock(layer, f"layer{index}", ipu_id=index // 2 + 1)
        layer.register_forward_hook(lambda _m, _i, out: poptorch.recomputationCheckpoint(out))
    poptorch.BeginBlock(model.qa_outputs, "head", ipu_id=3)


def options_for(poptorch):
    options = poptorch.Options()
    options.Training.gradientAccumulation(ACCUMULATION)
    options.outputMode(poptorch.OutputMode.All)
    return options


# A bias shared by all positions has a gradient of exactly 0 in exact arithmetic (softmax does not
# see it), and Adam with a small eps turns that rounding noise into whole steps: eps is large here.
OPTIMIZERS = {
    "SGD": ({"lr": 0.05, "momentum": 0.9, "weight_decay": 0.01}, torch.optim.SGD),
    "AdamW": ({"lr": 1e-3, "weight_decay": 0.01, "eps": 1e-3}, torch.optim.AdamW),
}


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_bert_trains_as_in_plain_torch(poptorch, name) -> None:
    model, inputs = bert()
    plain = copy.deepcopy(model)
    place(poptorch, model)
    values, torch_class = OPTIMIZERS[name]
    own_class = getattr(poptorch.optim, name)
    optimizer = own_class(model.parameters(), **values, loss_scaling=16.0)
    with tracing_patches(model):
        wrapped = WithLoss(poptorch, model)
        executor = poptorch.trainingModel(wrapped, options_for(poptorch), optimizer)
        losses = [executor(**inputs)[0] for _ in range(STEPS)]
    plain_optimizer = torch_class(plain.parameters(), **values)
    for step in range(STEPS):
        plain_optimizer.zero_grad()
        for index in range(ACCUMULATION):
            part = {k: v[2 * index : 2 * index + 2] for k, v in inputs.items()}
            loss = plain(**part).loss
            assert float(losses[step][index]) == pytest.approx(loss.item(), abs=1e-5)
            (loss / ACCUMULATION).backward()
        plain_optimizer.step()
    own = executor.model.inner.state_dict()
    for key, value in plain.state_dict().items():
        torch.testing.assert_close(own[key], value, rtol=0, atol=1e-6)


def test_the_program_of_bert(poptorch) -> None:
    model, inputs = bert()
    place(poptorch, model)
    with tracing_patches(model):
        executor = poptorch.trainingModel(
            WithLoss(poptorch, model),
            options_for(poptorch),
            torch.optim.AdamW(model.parameters(), lr=1e-3),
        )
        executor.compile(**inputs)
    program = executor.program
    blocks = [block for block in program.blocks if block.id]
    assert [(b.id, b.ipu) for b in blocks] == [
        ("embeddings", 0),
        ("layer0", 1),
        ("layer1", 1),
        ("layer2", 2),
        ("layer3", 2),
        ("head", 3),
    ]
    assert [block.checkpoints for block in blocks] == [0, 1, 1, 1, 1, 0]
    assert (program.num_forward_stages, program.num_stages, program.num_ipus) == (4, 7, 4)
    used = set(program.stages_of_variables())
    assert {f"inner.{name}" for name, _ in model.named_parameters()} <= used
    assert all(len(places) == 1 for places in program.ipus_of_variables().values())


def test_bert_without_identity_loss_has_two_losses(poptorch) -> None:
    model, inputs = bert()
    with (
        tracing_patches(model),
        pytest.raises(poptorch.Error, match=r"Multiple independent losses found \(2\)"),
    ):
        poptorch.trainingModel(model, options_for(poptorch))(**inputs)


def test_transformers_reads_the_mask_on_the_host(poptorch) -> None:
    """transformers 5 looks at the mask's values unless told that it is traced: refused."""
    model, inputs = bert()
    with pytest.raises(poptorch.Error, match=r"intercepted in __bool__\(\)"):
        poptorch.trainingModel(model, options_for(poptorch))(**inputs)


def test_outputs_keep_the_models_own_type(poptorch) -> None:
    model, inputs = bert()
    model.eval()
    inputs = {k: v[:2] for k, v in inputs.items() if "positions" not in k}
    with tracing_patches(model):
        found = poptorch.inferenceModel(model)(**inputs)
    assert type(found).__name__ == "QuestionAnsweringModelOutput"
    torch.testing.assert_close(found.start_logits, model(**inputs).start_logits.detach())


def test_dropout_is_drawn_for_each_micro_batch(poptorch) -> None:
    model, inputs = bert(dropout=True)
    model.train()
    inputs = {k: v[:1].repeat(2 * ACCUMULATION, *[1] * (v.dim() - 1)) for k, v in inputs.items()}
    with tracing_patches(model):
        executor = poptorch.trainingModel(
            WithLoss(poptorch, model),
            options_for(poptorch),
            torch.optim.SGD(model.parameters(), lr=0.0),
        )
        executor.setSeedHook(lambda update, step, replica: 1000 * update + 10 * step + replica)
        first, second = executor(**inputs)[0], executor(**inputs)[0]
    assert first.unique().numel() == ACCUMULATION
    assert not torch.equal(first, second)
