"""Serialized blocks compute what the unsplit model computes: loss and EVERY gradient."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import ipu_pipeline as ipp
from ipu_pipeline.errors import LoweringError, StageError
from ipu_pipeline.ops import extension
from tests.later import every_second, in_turn, one_in, pairs_first
from tests.stages.models import (
    MICROBATCHES,
    MODELS,
    VOCAB,
    assert_equal_gradients,
    built,
    eager,
    gradients,
    reader,
    serialized,
)

pytestmark = pytest.mark.filterwarnings("ignore:the C.. kernels are not used")
FACTOR = 7  # does not divide the 99 rows


def plan_for(name: str, num_stages: int = 1, *, factor: int = FACTOR, **options: Any) -> Any:
    """Return model, batch and serialized plan."""
    model, example, batch, blocks = built(name)
    plan = ipp.plan(model, example, num_stages=num_stages, microbatches=MICROBATCHES, **options)
    return model, batch, serialized(plan, dict.fromkeys(blocks, factor))


RUNS = ((1, "gpipe"), (2, "1f1b"), (4, "1f1b"))


@pytest.mark.parametrize(
    ("name", "num_stages", "schedule"),
    every_second((name, *RUNS[turn % 3]) for turn, name in enumerate(MODELS)),
)
def test_loss_and_every_gradient_equal_eager(name: str, num_stages: int, schedule: str) -> None:
    model, batch, plan = plan_for(name, num_stages, schedule=schedule)
    expected_loss, expected = eager(model, batch)
    keys = list(model.state_dict())
    with ipp.compile(model, plan, self_check=False) as executable:
        loss = executable.forward_backward(batch)
        assert list(executable.state_dict()) == keys

    assert loss == pytest.approx(expected_loss, rel=1e-6)
    assert_equal_gradients(gradients(model), expected)


@pytest.mark.parametrize(
    ("kernels", "schedule", "sequential"),
    pairs_first((True, False), ("1f1b", "gpipe"), (True, False)),
)
def test_kernels_schedules_and_threads(
    kernels: bool, schedule: str, sequential: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kernels and not extension.state().usable:
        pytest.skip(extension.state().detail)
    monkeypatch.setattr(extension, "available", lambda: kernels)
    model, batch, plan = plan_for("gpt2 (tied)", 3, schedule=schedule)
    expected_loss, expected = eager(model, batch)
    runs = []
    with ipp.compile(model, plan, self_check=False, sequential=sequential) as executable:
        for _ in range(3):
            assert executable.forward_backward(batch) == pytest.approx(expected_loss, rel=1e-6)
            runs.append(gradients(model))
    assert_equal_gradients(runs[0], expected)
    for again in runs[1:]:  # bit for bit
        assert all(torch.equal(again[fqn], gradient) for fqn, gradient in runs[0].items())


def test_gradients_accumulate_over_calls_and_optimizers_step() -> None:
    model, batch, plan = plan_for("gpt2 (tied)", 2)
    _, expected = eager(model, batch)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    with ipp.compile(model, plan, optimizer=optimizer, self_check=False) as executable:
        executable.forward_backward(batch)
        executable.forward_backward(batch)
        twice = {fqn: gradient / 2 for fqn, gradient in gradients(model).items()}
        assert_equal_gradients(twice, expected)
        losses = [executable.train_step(batch).loss for _ in range(5)]
    assert losses == sorted(losses, reverse=True)


@pytest.mark.parametrize(
    ("num_stages", "name"),
    every_second(product((1, 2), ("gpt2 (tied)", "bert-mlm (tied)", "mt5 (untied)"))),
)
def test_evaluation_gives_the_model_s_logits(name: str, num_stages: int) -> None:
    model, batch, plan = plan_for(name, num_stages)
    model.eval()
    with torch.no_grad():
        expected = model(**batch).logits
    model.train()
    with ipp.compile(model, plan, self_check=False) as executable:
        result = executable.eval_step(batch)
    torch.testing.assert_close(result.outputs["logits"], expected)


def test_bf16_stays_within_its_rounding() -> None:
    results = []
    for factor in (1, FACTOR):
        model, batch, plan = plan_for("gpt2 (tied)", 2, factor=factor)
        with ipp.compile(model, plan, self_check=False, precision="bf16") as executable:
            results.append((executable.forward_backward(batch), gradients(model)))
    (plain_loss, plain), (loss, found) = results
    assert loss == pytest.approx(plain_loss, rel=2e-3)
    assert_equal_gradients(found, plain, tolerance=2e-2)


def test_fp16_gradients_survive_their_loss_scale() -> None:
    results = []
    for factor in (1, FACTOR):
        model, batch, plan = plan_for("gpt2 (tied)", factor=factor)
        parameters = torch.optim.SGD(model.parameters(), lr=1.0)
        with ipp.compile(
            model, plan, optimizer=parameters, precision="fp16", loss_scaling=1024.0,
            self_check=False,
        ) as executable:  # fmt: skip
            step = executable.train_step(batch)
            assert not step.skipped
            results.append(step.grad_norm)
    assert results[0] == pytest.approx(results[1], rel=1e-2)


class LargestTensor(TorchDispatchMode):
    """Remembers the most elements that any operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.numel = max([self.numel, *(t.numel() for t in tensors if not t.is_meta)])
        return result


@pytest.mark.parametrize(("name", "schedule"), one_in(8, product(MODELS, ("1f1b", "gpipe"))))
def test_full_logits_never_exist_in_training(name: str, schedule: str) -> None:
    """16 x 2 tokens and 990 classes: nothing else of these models is as large as the logits."""
    model, example, batch, blocks = built(name, vocab_size=10 * VOCAB, **NARROW[name])
    plan = ipp.plan(model, example, num_stages=1, microbatches=MICROBATCHES)
    sizes = []
    for factor in (1, FACTOR):
        made = serialized(plan, dict.fromkeys(blocks, factor))
        with ipp.compile(model, made, schedule=schedule, self_check=False) as executable:
            executable.forward_backward(batch)  # captures
            with LargestTensor() as largest:
                executable.forward_backward(batch)
        sizes.append(largest.numel)
    plain, sliced = sizes
    assert plain >= 30 * 10 * VOCAB  # decoders without the last token have fewer rows
    assert sliced < 30 * 10 * VOCAB


NARROW: dict[str, dict[str, int]] = {
    name: {
        "gpt2 (tied)": {"n_embd": 8},
        "t5 (tied)": {"d_model": 8, "d_kv": 2},
        "mt5 (untied)": {"d_model": 8, "d_kv": 2},
        "bart (tied, buffer added)": {"d_model": 8},
    }.get(name, {"hidden_size": 8, "head_dim": 2} if "bert" not in name else {"hidden_size": 8})
    for name in MODELS
}


def flat(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    return logits.reshape(-1, logits.shape[-1]), labels.reshape(-1)


LOSSES = {
    "mean": lambda y, t, m: functional.cross_entropy(*flat(y, t)),
    "module": lambda y, t, m: torch.nn.CrossEntropyLoss(m.class_weight)(*flat(y, t)),
    "smoothed": lambda y, t, m: functional.cross_entropy(*flat(y, t), label_smoothing=0.1),
    "weighted": lambda y, t, m: functional.cross_entropy(
        *flat(y, t), m.class_weight, label_smoothing=0.2
    ),
    "sum": lambda y, t, m: functional.cross_entropy(*flat(y, t), reduction="sum") / 7,
    "none": lambda y, t, m: functional.cross_entropy(*flat(y, t), reduction="none").square().mean(),
    "ignored": lambda y, t, m: functional.cross_entropy(*flat(y, t.abs() % 50), ignore_index=5),
    "shifted": lambda y, t, m: functional.cross_entropy(
        *flat(y[..., :-1, :].contiguous(), t[:, 1:])
    ),
    "last token": lambda y, t, m: functional.cross_entropy(y[:, -1], t[:, -1]),
    "scaled": lambda y, t, m: functional.cross_entropy(*flat(y / 3.0 * 0.5, t)),
    "biased": lambda y, t, m: functional.cross_entropy(*flat(y + m.class_weight, t)),
    "capped": lambda y, t, m: functional.cross_entropy(*flat(torch.tanh(y / 2.0) * 2.0, t)),
    "by axis": lambda y, t, m: functional.cross_entropy(y.transpose(1, 2), t),
    "probabilities": lambda y, t, m: functional.cross_entropy(
        y.flatten(0, 1), functional.one_hot(t.abs().flatten() % 50, 50).float()
    ),
    "own": lambda y, t, m: -y.log_softmax(-1).gather(-1, t.abs().unsqueeze(-1) % 50).mean(),
    "two": lambda y, t, m: functional.cross_entropy(*flat(y, t)) + y.square().mean(),
    "written": lambda y, t, m: functional.cross_entropy(*flat(y.add_(1.0).mul(2), t)),
}


@pytest.mark.parametrize(("loss", "bias"), in_turn(LOSSES, (True, False)))
def test_every_way_from_logits_to_loss(
    loss: str, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every loss is met with and without recomputation and kernels."""
    model, example, batch = reader(LOSSES[loss], bias=bias)
    expected_loss, expected = eager(model, batch)
    plan = ipp.plan(model, example, num_stages=2, microbatches=MICROBATCHES)
    plan = serialized(plan, {"embed": 3, "head": 3})
    usable = extension.available()
    # A mean over labels that a block counts, beside another one: nothing says how they weigh.
    options = {"self_check": False, "loss_weights": "samples" if loss == "two" else None}
    for recompute, kernels in ((None, bias), ("all", not bias)):
        monkeypatch.setattr(extension, "available", lambda on=kernels and usable: on)
        with ipp.compile(model, plan, recompute=recompute, **options) as executable:
            found_loss = executable.forward_backward(batch)
        assert found_loss == pytest.approx(expected_loss, rel=1e-6)
        assert_equal_gradients(gradients(model), expected)


def test_padding_rows_get_no_gradient() -> None:
    model, example, batch = reader(LOSSES["mean"])
    plan = serialized(ipp.plan(model, example, num_stages=1, microbatches=1), {"embed": 5})
    with ipp.compile(model, plan, self_check=False) as executable:
        executable.forward_backward(batch)
    assert model.embed.weight.grad is not None
    assert not model.embed.weight.grad[3].any()
    assert model.embed.weight.grad[int(batch["ids"][0, 0])].any()


def test_frozen_tables_get_no_gradient() -> None:
    model, example, batch = reader(LOSSES["mean"])
    model.embed.weight.requires_grad_(False)
    model.head.weight.requires_grad_(False)
    expected_loss, expected = eager(model, batch)
    plan = ipp.plan(model, example, num_stages=2, microbatches=MICROBATCHES)
    with ipp.compile(model, serialized(plan, {"embed": 2, "head": 2}), self_check=False) as run:
        assert run.forward_backward(batch) == pytest.approx(expected_loss, rel=1e-6)
    assert_equal_gradients(gradients(model), expected)


def test_a_projection_away_from_the_loss_is_only_sliced() -> None:
    model, example, batch = reader(LOSSES["mean"])
    expected_loss, expected = eager(model, batch)
    plan = ipp.plan(model, example, num_stages=1, microbatches=MICROBATCHES)
    first = replace(plan.stages[0], blocks=plan.stages[0].blocks[:-1], serialize={"head": 4})
    assert plan.stages[0].blocks[-1] == "loss"
    stages = (first, replace(plan.stages[0], blocks=("loss",)))
    with ipp.compile(model, replace(plan, stages=stages), self_check=False) as executable:
        assert executable.forward_backward(batch) == pytest.approx(expected_loss, rel=1e-6)
    assert_equal_gradients(gradients(model), expected)


# ---- refusals ---------------------------------------------------------------------------


def test_blocks_without_parameters_are_refused_when_compiled() -> None:
    model, example, _ = reader(LOSSES["mean"])
    plan = ipp.plan(model, example, num_stages=1, microbatches=1)
    with pytest.raises(LoweringError, match=r"block 'loss' cannot be serialized: it has no table"):
        ipp.compile(model, serialized(plan, {"loss": 2}))


def test_logits_read_without_gradients_are_refused() -> None:
    def loss(logits: Tensor, labels: Tensor, model: Any) -> Tensor:
        with torch.no_grad():
            accuracy = logits.argmax(-1).eq(labels).float().mean()
        return functional.cross_entropy(*flat(logits, labels)) + 0 * accuracy

    model, example, batch = reader(loss)
    plan = ipp.plan(model, example, num_stages=1, microbatches=1)
    with (
        ipp.compile(model, serialized(plan, {"head": 2}), self_check=False) as executable,
        pytest.raises(StageError, match="are read where gradients are switched off"),
    ):
        executable.forward_backward(batch)
