"""The loss of a batch does not depend on stages or microbatches: it is plain torch's."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional

import ipu_pipeline as ipp
from ipu_pipeline.errors import LoweringError
from ipu_pipeline.stages.loss_shares import MixedSamplesError
from tests.later import every_second

WORDS, WIDTH, SAMPLES, LENGTH, IGNORED = 12, 8, 8, 6, -100


class Body(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.linear(x))


class Model(nn.Module):
    """Embedding, layers, head; the loss is given as a function of logits and inputs."""

    def __init__(self, loss: Callable[..., Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(WORDS, WIDTH)
        self.layers = nn.ModuleList([Body() for _ in range(3)])
        self.head = nn.Linear(WIDTH, WORDS)
        self.register_buffer("weights", torch.arange(1.0, WORDS + 1))
        self.loss = loss
        self.own_loss = OwnLoss()

    def forward(self, ids: Tensor, labels: Tensor, **more: Any) -> dict[str, Tensor]:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        logits = self.head(x) * 3
        return {"loss": self.loss(self, logits, labels, **more), "logits": logits}


def cross_entropy(logits: Tensor, labels: Tensor, **options: Any) -> Tensor:
    return functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), **options)


def per_label(logits: Tensor, labels: Tensor) -> Tensor:
    return cross_entropy(logits, labels.clamp(0), reduction="none").view_as(labels)


def per_label_sum(logits: Tensor, labels: Tensor) -> Tensor:
    return cross_entropy(logits, labels, reduction="sum")


def token_mean(model: nn.Module, logits: Tensor, labels: Tensor) -> Tensor:
    return cross_entropy(logits, labels)


def shifted(model: nn.Module, logits: Tensor, labels: Tensor) -> Tensor:
    return nn.CrossEntropyLoss()(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def class_weights(model: nn.Module, logits: Tensor, labels: Tensor) -> Tensor:
    return cross_entropy(logits, labels, weight=model.weights, label_smoothing=0.1)


def negative_log_likelihood(model: nn.Module, logits: Tensor, labels: Tensor) -> Tensor:
    return functional.nll_loss(logits.log_softmax(-1).flatten(0, 1), labels.flatten())


def other_ignored(model: nn.Module, logits: Tensor, labels: Tensor) -> Tensor:
    return cross_entropy(logits, labels.masked_fill(labels == IGNORED, 0), ignore_index=0)


def own_mask(model: nn.Module, logits: Tensor, labels: Tensor) -> Tensor:
    mask = (labels != IGNORED).float()
    each = cross_entropy(logits, labels.clamp(0), reduction="none").view_as(mask)
    return (each * mask).sum() / mask.sum().clamp(min=1)


def summed(model: nn.Module, logits: Tensor, labels: Tensor) -> Tensor:
    return cross_entropy(logits, labels, reduction="sum")


def sum_over_samples(model: nn.Module, logits: Tensor, labels: Tensor) -> Tensor:
    return cross_entropy(logits, labels, reduction="sum") / len(labels)


def sum_over_constant(model: nn.Module, logits: Tensor, labels: Tensor) -> Tensor:
    return cross_entropy(logits, labels, reduction="sum") / 7


def two_equal_terms(model: nn.Module, logits: Tensor, labels: Tensor) -> Tensor:
    return (cross_entropy(logits, labels) + cross_entropy(2 * logits, labels)) / 2


def sample_mean(model: nn.Module, logits: Tensor, labels: Tensor) -> Tensor:
    return functional.cross_entropy(logits.mean(1), labels.abs()[:, 0].clamp(max=5))


def selected(model: nn.Module, logits: Tensor, labels: Tensor) -> Tensor:
    mask = labels != IGNORED
    return functional.mse_loss(logits[mask].tanh(), functional.one_hot(labels[mask], WORDS).float())


def selected_by_hand(model: nn.Module, logits: Tensor, labels: Tensor) -> Tensor:
    each = cross_entropy(logits, labels, reduction="none").view_as(labels)
    return each[labels != IGNORED].mean()


class OwnLoss(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.each = nn.CrossEntropyLoss(reduction="none")

    def forward(self, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        labels = labels.flatten()
        each = self.each(logits.flatten(0, 1), labels)
        return {"words": each[labels != IGNORED].mean(), "size": logits.square().sum()}


def modules_of_losses(model: nn.Module, logits: Tensor, labels: Tensor) -> Tensor:
    parts = model.own_loss(logits, labels)
    return parts["words"] + 0.01 * parts["size"]


def dot_product(model: nn.Module, logits: Tensor, labels: Tensor) -> Tensor:
    return torch.dot(logits.flatten(), logits.flatten())


def divergence(model: nn.Module, logits: Tensor, labels: Tensor) -> Tensor:
    return functional.kl_div(logits.log_softmax(-1), logits.detach().sigmoid(), reduction="sum")


def a_loss_per_row(model: nn.Module, logits: Tensor, labels: Tensor) -> Tensor:
    rows = [token_mean(model, logits[i : i + 1], labels[i : i + 1]) for i in range(len(labels))]
    return sum(rows) / len(labels)


def sum_and_penalty(model: nn.Module, logits: Tensor, labels: Tensor) -> Tensor:
    return summed(model, logits, labels) + model.head.weight.square().sum()


def sum_and_means(model: nn.Module, logits: Tensor, labels: Tensor) -> Tensor:
    size = 0.1 * logits.square().sum()
    parts = [token_mean(model, logits, labels), size, size.sqrt().detach() * 0]
    return sum(parts) + own_mask(model, logits[:, :3], labels[:, :3])


def sums_over_samples_and_numbers(model: nn.Module, logits: Tensor, labels: Tensor) -> Tensor:
    parts = logits.square().sum() + summed(model, logits, labels)
    divided = parts / len(labels) + logits.tanh().sum() * 0.01
    weights = torch.tensor([0.3, 0.7])
    return torch.stack([divided, token_mean(model, logits, labels)]) @ weights


def mean_of_a_mean(model: nn.Module, logits: Tensor, labels: Tensor) -> Tensor:
    mask = (labels != IGNORED).float()
    each = cross_entropy(logits, labels, reduction="none").view_as(mask)
    return (each * mask).mean() / mask.mean()


def focal_mean(model: nn.Module, logits: Tensor, labels: Tensor) -> Tensor:
    each = per_label(logits, labels)
    return ((1 - torch.exp(-each)).square() * each * (labels != IGNORED)).sum() / len(labels)


def margins(model: nn.Module, logits: Tensor, labels: Tensor) -> Tensor:
    return functional.multi_margin_loss(logits.mean(1), labels.clamp(0)[:, 0])


def weighted_labels(model: nn.Module, logits: Tensor, labels: Tensor) -> Tensor:
    weights = (labels.clamp(0) + 1).float()
    return (per_label(logits, labels) * weights).sum() / weights.sum()


def nearly_nothing(model: nn.Module, logits: Tensor, labels: Tensor) -> Tensor:
    return logits.mean() - logits.mean((1, 2)).mean().detach() + 1e-4 * logits.square().mean()


def mean_of_each_sample(model: nn.Module, logits: Tensor, labels: Tensor) -> Tensor:
    mask = (labels != IGNORED).float()
    return ((per_label(logits, labels) * mask).sum(1) / mask.sum(1)).mean()


def counted_in_python(model: nn.Module, logits: Tensor, labels: Tensor) -> Tensor:
    return summed(model, logits, labels) / max(1, int((labels != IGNORED).sum()))


def divided_by_a_number_read_in_python(model: nn.Module, logits: Tensor, labels: Tensor) -> Tensor:
    return summed(model, logits, labels) / float((labels > -1000).sum() * 0 + 2.5)


LOSSES = [
    mean_of_a_mean,
    selected, selected_by_hand,
    token_mean, shifted, class_weights, negative_log_likelihood, other_ignored, own_mask, summed,
    sum_over_samples, sum_over_constant, two_equal_terms, sample_mean,
    modules_of_losses, dot_product, divergence, a_loss_per_row, sum_and_penalty, sum_and_means,
    sums_over_samples_and_numbers,
    focal_mean, margins, weighted_labels, nearly_nothing, mean_of_each_sample,
    counted_in_python, divided_by_a_number_read_in_python,
]  # fmt: skip


def uneven_batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, WORDS, (SAMPLES, LENGTH), generator=generator)
    labels = ids.clone()
    for row in range(SAMPLES):
        labels[row, : (row * 3) % (LENGTH - 1)] = IGNORED
    return {"ids": ids, "labels": labels}


def truth(model: nn.Module, batch: dict[str, Any]) -> tuple[float, dict[str, Tensor]]:
    model = copy.deepcopy(model)
    loss = model(**batch)["loss"]
    loss.backward()
    return float(loss.detach()), {
        n: p.grad for n, p in model.named_parameters() if p.grad is not None
    }


def check(model: nn.Module, batch: dict[str, Any], executable: Any) -> None:
    loss, gradients = truth(model, batch)
    model.zero_grad()
    assert executable.forward_backward(batch) == pytest.approx(loss, rel=1e-5)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=1e-6, msg=name)
    assert executable.eval_step(batch).loss == pytest.approx(loss, rel=1e-5)


def planned(model: nn.Module, batch: dict[str, Any], microbatches: int, **options: Any) -> Any:
    size = SAMPLES // microbatches
    micro = {n: v[:size] if getattr(v, "ndim", 0) else v for n, v in batch.items()}
    options = {"num_stages": 2, **options}
    return ipp.plan(model.train(), micro, microbatches=microbatches, **options)


@pytest.mark.parametrize("loss", every_second(LOSSES))
def test_every_loss_is_that_of_the_whole_batch(loss: Callable[..., Tensor]):
    model, batch = Model(loss), uneven_batch()
    with ipp.compile(model, planned(model, batch, 4)) as executable:
        check(model, batch, executable)


def test_rounding_in_sixteen_bits_is_no_mixing():
    model, batch = Model(token_mean).to(torch.bfloat16), uneven_batch()
    with ipp.compile(model, planned(model, batch, 4)) as executable:
        loss = model(**batch)["loss"].item()
        assert executable.forward_backward(batch) == pytest.approx(loss, rel=2e-2)


@pytest.mark.parametrize(("stages", "microbatches"), [(1, 8), (2, 2), (3, 1), (3, 8)])
def test_stages_and_microbatches_change_nothing(stages: int, microbatches: int):
    model, batch = Model(token_mean), uneven_batch()
    plan = planned(model, batch, microbatches, num_stages=stages)
    with ipp.compile(model, plan) as executable:
        check(model, batch, executable)


@pytest.mark.parametrize("number", [int, torch.tensor])
def test_the_number_of_items_in_the_batch_divides_the_sum_once(number: Callable[[int], Any]):
    def loss(model: nn.Module, logits: Tensor, labels: Tensor, num_items_in_batch: Any) -> Tensor:
        return summed(model, logits, labels) / num_items_in_batch

    model, batch = Model(loss), uneven_batch()
    batch = {**batch, "num_items_in_batch": number(int((batch["labels"] != IGNORED).sum()))}
    with ipp.compile(model, planned(model, batch, 4)) as executable:
        check(model, batch, executable)
        assert len(executable._cache._shapes) == 2  # one capture for training, one for evaluation


def test_a_causal_language_model_of_transformers():
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=WORDS, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
            intermediate_size=16, max_position_embeddings=16,
        )
    )  # fmt: skip
    batch = uneven_batch()
    batch = {"input_ids": batch["ids"], "labels": batch["labels"]}
    with ipp.compile(model, planned(model, batch, 4)) as executable:
        check(model, batch, executable)


@pytest.mark.parametrize("loss", [token_mean, selected_by_hand, own_mask, sum_and_means])
def test_a_microbatch_without_labels_counts_nothing(loss: Callable[..., Tensor]):
    model, batch = Model(loss), uneven_batch()
    batch["labels"][:2] = IGNORED
    with ipp.compile(model, planned(model, batch, 4)) as executable:
        check(model, batch, executable)


def test_means_over_different_labels_have_weights_of_their_own():
    def loss(model: nn.Module, logits: Tensor, labels: Tensor) -> Tensor:
        first = token_mean(model, logits[:, :3], labels[:, :3])
        return 0.3 * first + sample_mean(model, logits, labels) + shifted(model, logits, labels)

    model, batch = Model(loss), uneven_batch()
    batch["labels"][:2, :3] = IGNORED  # a mean over nothing in the first microbatch
    with ipp.compile(model, planned(model, batch, 4)) as executable:
        check(model, batch, executable)
        labels = batch["labels"].clamp(min=0)
        check(model, {**batch, "labels": labels}, executable)


def test_a_term_for_each_sample_is_refused_where_a_microbatch_has_fewer():
    model, batch = Model(a_loss_per_row), uneven_batch()
    with ipp.compile(model, planned(model, batch, 4)) as executable:
        check(model, batch, executable)
        with pytest.raises(MixedSamplesError, match="has 1 terms here and 2 there, as if it had"):
            executable.forward_backward({name: value[:7] for name, value in batch.items()})


def test_means_are_divided_by_a_temperature_of_the_batch():
    def loss(model: nn.Module, logits: Tensor, labels: Tensor, temperature: Tensor) -> Tensor:
        return token_mean(model, logits, labels) / temperature

    model, batch = Model(loss), {**uneven_batch(), "temperature": torch.tensor(2.0)}
    with ipp.compile(model, planned(model, batch, 4)) as executable:
        check(model, batch, executable)


def test_terms_that_depend_on_the_number_of_samples_are_refused_in_training():
    def loss(model: nn.Module, logits: Tensor, labels: Tensor) -> Tensor:
        return a_loss_per_row(model, logits, labels) + summed(model, logits, labels)

    model, batch = Model(loss), uneven_batch()
    plan = planned(model, batch, 4)
    with ipp.compile(model, plan) as executable:
        with pytest.raises(MixedSamplesError, match="terms that count in different ways: sums"):
            executable.forward_backward(batch)
        expected = model.eval()(**batch)["loss"].item()
        assert executable.eval_step(batch).loss == pytest.approx(expected, rel=1e-6)
    model.train()
    with ipp.compile(model, plan, loss_weights="samples") as executable:
        parts = [{n: v[i : i + 2] for n, v in batch.items()} for i in range(0, SAMPLES, 2)]
        expected = sum(model(**part)["loss"].item() for part in parts) / 4
        assert executable.forward_backward(batch) == pytest.approx(expected, rel=1e-6)


def test_labels_that_a_block_counts_are_refused():
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(1.5))

        def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
            return cross_entropy(self.scale * logits, labels)

    model = Model(lambda model, logits, labels: model.scaled(logits, labels))
    model.scaled = Scaled()
    batch = uneven_batch()
    message = "is a mean over labels that a block of its own counts, so that no weights"
    with (
        ipp.compile(model, planned(model, batch, 4)) as executable,
        pytest.raises(LoweringError, match=message),
    ):
        executable.forward_backward(batch)


@pytest.mark.parametrize("weights", [[0.1, 0.2, 0.3, 0.4], lambda part: part["ids"][:, 0].sum()])
def test_weights_of_the_users_own(weights: Any):
    model, batch = Model(token_mean), uneven_batch()
    parts = [{n: v[i : i + 2] for n, v in batch.items()} for i in range(0, SAMPLES, 2)]
    shares = weights if isinstance(weights, list) else [float(weights(part)) for part in parts]
    losses = [model(**part)["loss"].item() for part in parts]
    expected = sum(w * x for w, x in zip(shares, losses, strict=True)) / sum(shares)
    with ipp.compile(model, planned(model, batch, 4), loss_weights=weights) as executable:
        assert executable.forward_backward(batch) == pytest.approx(expected, rel=1e-6)


def test_wrong_weights_and_an_unknown_word_are_refused():
    model, batch = Model(token_mean), uneven_batch()
    plan = planned(model, batch, 4)
    wrong: list[tuple[Any, str]] = [
        ([0.5, 0.5], "loss_weights has 2 weights, the batch 4 microbatches"),
        (
            lambda _: 0.0,
            r"loss_weights returned \[0.0, 0.0, 0.0, 0.0\] .*leave out a batch in which",
        ),
    ]
    for weights, message in wrong:
        with (
            ipp.compile(model, plan, loss_weights=weights) as executable,
            pytest.raises(LoweringError, match=message),
        ):
            executable.forward_backward(batch)
    with pytest.raises(ValueError, match="loss_weights 'tokens' is unknown; use 'samples', a list"):
        ipp.compile(model, plan, loss_weights="tokens")


class Tracing(Model):
    """Counts its runs, keeps statistics, draws and reads values in evaluation."""

    def __init__(self, what: str) -> None:
        super().__init__(token_mean)
        self.what, self.runs = what, 0
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, ids: Tensor, labels: Tensor, **more: Any) -> dict[str, Tensor]:
        result = super().forward(ids, labels, **more)
        if self.training:
            return result
        factor: float | Tensor = 1.0
        if self.what == "counts":
            self.runs += 1
        elif self.what == "statistics":
            self.seen.add_(result["loss"].detach())
        elif self.what == "draws":
            factor = random.random()
        elif self.what == "reads":
            factor = 2.0 if result["logits"].max().item() < 100 else 1.0
        return {"loss": result["loss"] * factor, "logits": result["logits"] * factor}


@pytest.mark.parametrize("what", ["counts", "statistics", "draws", "reads"])
def test_what_evaluation_leaves_or_draws_is_that_of_one_run(
    what: str, caplog: pytest.LogCaptureFixture
):
    model, batch = Tracing(what), uneven_batch()
    plain = copy.deepcopy(model).eval()
    random.seed(1)
    expected = [plain(**batch) for _ in range(2)]
    with ipp.compile(model, planned(model, batch, 4)) as executable:
        random.seed(1)
        for result in expected:
            found = executable.eval_step(batch)
            assert found.loss == pytest.approx(result["loss"].item(), rel=1e-5)
            assert torch.allclose(found.outputs["logits"], result["logits"], atol=1e-5)
    assert model.runs == plain.runs
    assert torch.allclose(model.seen, plain.seen)
    reason = "code between its blocks reads values" if what == "reads" else "its code keeps somet"
    said = [record.getMessage() for record in caplog.records]
    assert any(f"run in one microbatch: {reason}" in t or reason in t for t in said)


# ---- axes ----------------------------------------------------------------------------------


def with_positions(model: nn.Module, logits: Tensor, labels: Tensor, extra: Tensor) -> Tensor:
    assert extra.shape[1] == len(labels)
    return (logits.mean((1, 2)) * extra.sum((0, 2))).square().mean()


@pytest.mark.parametrize("given", [None, {"extra": 1}])
def test_an_axis_is_found_or_taken_from_the_plan(given: Any, tmp_path: Any):
    model, batch = Model(with_positions), uneven_batch()
    batch["extra"] = torch.randn(SAMPLES, SAMPLES, 3)
    micro = {"ids": batch["ids"][:2], "labels": batch["labels"][:2], "extra": batch["extra"][:, :2]}
    plan = ipp.plan(model.train(), micro, num_stages=2, microbatches=4, batch_axes=given)
    plan.save(tmp_path / "plan.json")
    plan = type(plan).load(tmp_path / "plan.json")
    assert plan.batch_axes == (given or {})
    with ipp.compile(model, plan) as executable:
        check(model, batch, executable)


def test_axes_given_to_compile_replace_those_of_the_plan():
    model, batch = Model(token_mean), uneven_batch()
    plan = planned(model, batch, 4, batch_axes={"labels": None})
    with ipp.compile(model, plan, batch_axes={"labels": 0}) as executable:
        check(model, batch, executable)


def test_an_axis_that_is_not_there_is_refused():
    model, batch = Model(token_mean), uneven_batch()
    plan = planned(model, batch, 4, batch_axes={"labels": 2})
    message = "axis 2 of 'labels' holds the samples, but the input is"
    with ipp.compile(model, plan) as executable, pytest.raises(LoweringError, match=message):
        executable.forward_backward(batch)


def test_different_numbers_of_samples_are_named():
    model, batch = Model(token_mean), uneven_batch()
    plan = planned(model, batch, 4, batch_axes={"ids": 0, "labels": 0})
    batch["labels"] = batch["labels"][:6]
    with (
        ipp.compile(model, plan) as executable,
        pytest.raises(LoweringError, match=r"ids 8 \(axis 0\), labels 6 \(axis 0\); say which"),
    ):
        executable.forward_backward(batch)
