"""A loss of the user's own runs live: what it computes, collects and logs is as in transformers."""

from __future__ import annotations

import random
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainerCallback

from ipu_pipeline.capture.python_state import PythonState
from ipu_pipeline.errors import CaptureError, LoweringError
from ipu_pipeline.planner.schedules import PipelineShape, schedule_kind, schedule_names
from ipu_pipeline.train.live_loss import RUN, LiveLoss, LossRun, calls_of
from ipu_pipeline.train.order import _described
from ipu_pipeline.train.trainer import PipelineTrainer
from tests.later import in_turn, one_in
from tests.tiny_models import TINY
from tests.train.helpers import CHECKPOINTING, load_script
from tests.train.live_programs import PROGRAMS, cross_entropy, with_loss
from tests.train.test_trainer_losses import arguments

ROWS = [
    {
        "input_ids": [2 + (3 * i + j) % 37 for j in range(6)],
        "attention_mask": [1] * 6,
        "labels": i % 3,
    }
    for i in range(24)
]


def classifier() -> BertForSequenceClassification:
    torch.manual_seed(3)
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=40,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=16,
            num_labels=3,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )


def trained(make: Any, base: type, tmp_path: Any, **options: Any) -> Any:
    """Train and predict; return the trainer with its prediction."""
    extra = {"num_stages": 2} if issubclass(base, PipelineTrainer) else {}
    extra |= {k: options.pop(k) for k in ("compute_loss_func", "callbacks") if k in options}
    args = arguments(tmp_path / base.__name__, **{"max_steps": 3, "seed": 7, **options})
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    trainer = make(base)(classifier(), args, train_dataset=ROWS, **extra)
    trainer.train()
    trainer.predicted = trainer.predict(ROWS[:7])
    return trainer


def logged(trainer: Any) -> list[dict[str, float]]:
    timed = ("runtime", "per_second", "flos")
    return [
        {k: v for k, v in entry.items() if not any(word in k for word in timed)}
        for entry in trainer.state.log_history
    ]


def assert_equal(theirs: Any, ours: Any) -> None:
    assert len(logged(ours)) == len(logged(theirs))
    for mine, reference in zip(logged(ours), logged(theirs), strict=True):
        assert mine == pytest.approx(reference, rel=1e-5, abs=1e-6)
    state = ours.model.state_dict()
    for name, value in theirs.model.state_dict().items():
        torch.testing.assert_close(state[name], value, rtol=1e-5, atol=1e-6)
    assert flat(getattr(ours, "seen", ())) == pytest.approx(flat(getattr(theirs, "seen", ())))
    predictions = ours.predicted.predictions, theirs.predicted.predictions
    torch.testing.assert_close(*predictions, rtol=1e-4, atol=1e-5)
    assert ours.predicted.metrics["test_loss"] == pytest.approx(
        theirs.predicted.metrics["test_loss"], rel=1e-5
    )


def flat(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [leaf for item in value for leaf in flat(item)]
    return [value if isinstance(value, int | float) else hash(value)]


@pytest.mark.parametrize("name", one_in(6, PROGRAMS))
def test_programs(tmp_path, name) -> None:
    program = PROGRAMS[name]
    theirs = trained(program.make, Trainer, tmp_path)
    ours = trained(program.make, PipelineTrainer, tmp_path)
    assert_equal(theirs, ours)
    assert ours._steps.training_order.ahead is program.overlap


def plain(base: type) -> type:
    return with_loss(base, cross_entropy)


def raising(error: Exception, place: str, at: int) -> Any:
    """Return a program whose code before or after the call of the model raises once."""

    def make(base: type) -> type:
        calls = {"before": 0, "after": 0}

        def count(where: str) -> None:
            calls[where] += 1
            if where == place and calls[where] == at:
                raise error

        def before(self, model, inputs):
            count("before")
            return inputs

        def rest(self, out, labels):
            count("after")
            return cross_entropy(self, out, labels)

        return with_loss(base, rest, before)

    return make


@pytest.mark.parametrize(("place", "at"), in_turn(["before", "after"], [1, 5]))
def test_errors_of_the_users_code_come_out_as_they_are(tmp_path, place, at) -> None:
    error = KeyError("mine")
    with pytest.raises(KeyError, match="mine") as caught:
        trained(raising(error, place, at), PipelineTrainer, tmp_path)
    assert caught.value is error
    notes = getattr(error, "__notes__", [])
    assert (place == "after") == any("stage 1 failed in block 'loss'" in note for note in notes)


@pytest.mark.parametrize(
    ("rest", "message"),
    [
        (lambda self, out, labels: 1.0, "returned a float; return a tensor with one"),
        (lambda self, out, labels: out.logits, r"returned a tensor of shape \(2, 3\); return"),
        (lambda self, out, labels: out.logits.detach().sum(), "a loss that needs no gradient"),
    ],
)
def test_what_is_no_loss_is_refused(tmp_path, rest, message) -> None:
    with pytest.raises(ValueError, match=message):
        trained(lambda base: with_loss(base, rest), PipelineTrainer, tmp_path)


def test_a_function_with_weights_of_its_own(tmp_path) -> None:
    def weighted(outputs, labels, num_items_in_batch=None, *, weight):
        return functional.cross_entropy(outputs.logits, labels, weight=weight) / 3

    options = {"compute_loss_func": partial(weighted, weight=torch.tensor([1.0, 2.0, 0.5]))}
    pair = [trained(lambda b: b, base, tmp_path, **options) for base in (Trainer, PipelineTrainer)]
    assert_equal(*pair)


def test_nothing_runs_twice_when_blocks_are_recomputed(tmp_path) -> None:
    make = PROGRAMS["parts_for_the_log"].make
    options = {CHECKPOINTING: True}
    theirs = trained(make, Trainer, tmp_path, **options)
    ours = trained(make, PipelineTrainer, tmp_path, **options)
    assert_equal(theirs, ours)
    assert len(ours.seen) == 3 * 3 + 3  # microbatches of three steps, batches of the prediction


def test_with_weights_that_stages_share(tmp_path) -> None:
    """Tied weights have their gradients apart; those of the trainer's parameters must not go."""

    def make(base: type) -> type:
        class Mine(base):
            def __init__(self, *args, **kwargs):
                self.scale = nn.Parameter(torch.ones(()))
                super().__init__(*args, **kwargs)

            def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
                labels = inputs.pop("labels")
                out = model(**inputs)
                flat = out.logits[:, :-1].flatten(0, 1)
                loss = functional.cross_entropy(flat, labels[:, 1:].flatten()) * self.scale
                penalty = sum(p.pow(2).sum() for p in model.parameters())
                return loss + 1e-3 * penalty

        return Mine

    rows, found = load_script("causal_lm").Copies(24, seed=5), []
    for base in (Trainer, PipelineTrainer):
        extra = {"num_stages": 2} if base is PipelineTrainer else {}
        torch.manual_seed(0)
        model = TINY["gpt2-lm"].build()[0]
        trainer = make(base)(model, arguments(tmp_path, max_steps=1), train_dataset=rows, **extra)
        trainer.train()
        found.append((trainer.scale.grad, model.state_dict()))
    (expected, theirs), (mine, ours) = found
    torch.testing.assert_close(mine, expected)
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-5, atol=1e-6)


class WithSubstep(TrainerCallback):
    def on_substep_end(self, args, state, control, model=None, **kwargs):
        model.config.my_factor = getattr(model.config, "my_factor", 1) + 1


def factor(base: type) -> type:
    def rest(self, out, labels):
        return cross_entropy(self, out, labels) * getattr(self.model.config, "my_factor", 1)

    return with_loss(base, rest)


def test_what_a_callback_changes_between_microbatches_is_seen(tmp_path) -> None:
    pair = [
        trained(factor, base, tmp_path, callbacks=[WithSubstep()])
        for base in (Trainer, PipelineTrainer)
    ]
    assert_equal(*pair)
    assert pair[1]._steps.training_order.ahead is False


def test_the_order_can_be_asked_for(tmp_path) -> None:
    ours = trained(
        lambda base: with_loss(base, cross_entropy, loss_in_order=True), PipelineTrainer, tmp_path
    )
    assert ours._steps.training_order.ahead is False


@pytest.mark.parametrize("place", ["before", "after"])
def test_a_change_that_begins_later_is_refused(tmp_path, place) -> None:
    def make(base: type) -> type:
        def before(self, model, inputs):
            last = self.accelerator.sync_gradients  # others have begun
            if place == "before" and self.state.global_step == 1 and last:
                self.count += 1
            return {**inputs, "token_type_ids": inputs["input_ids"] * 0 + self.count % 2}

        def rest(self, out, labels):
            if place == "after" and self.state.global_step == 1:
                self.count += 1
            return cross_entropy(self, out, labels)

        return with_loss(base, rest, before, count=0)

    message = "compute_loss changes self.count .* and has not done so .* set loss_in_order = True"
    with pytest.raises(LoweringError, match=message):
        trained(make, PipelineTrainer, tmp_path)


def test_a_second_call_that_begins_later_is_refused(tmp_path) -> None:
    def make(base: type) -> type:
        def rest(self, out, labels):
            if self.state.global_step == 1:
                self.model(out.logits.argmax(-1)[:, None])
            return cross_entropy(self, out, labels)

        return with_loss(base, rest)

    with pytest.raises(
        LoweringError,
        match=r"compute_loss calls the model a second time or .*, and has not done so",
    ):
        trained(make, PipelineTrainer, tmp_path)


def test_arguments_without_a_name_are_refused() -> None:
    run = LossRun(lambda: run.call(lambda *tensors: None, (1, 2), {}))
    with pytest.raises(CaptureError, match=r"arguments of the model without a name \(\*tensors\)"):
        run.start()


def test_outputs_that_cannot_be_copied_are_refused() -> None:
    class Odd:
        def __deepcopy__(self, memo):
            raise TypeError("never")

    with pytest.raises(CaptureError, match=r"returns a dict that cannot be copied \(never\)"):
        LiveLoss().view(lambda: {"odd": Odd()}, {RUN: torch.tensor(0)})


def test_what_stands_for_forward_is_no_state_of_the_users() -> None:
    """A thread-local would let all stages run in one thread."""
    model = torch.nn.Linear(2, 2)
    with calls_of(model, lambda forward, args, _: forward(*args)):
        model(torch.zeros(1, 2))
        assert not PythonState(model.modules()).thread_locals


def test_an_abandoned_run_ends() -> None:
    run = LossRun(lambda: run.call(lambda x: None, (), {"x": 1}))
    run.start()
    assert run.inputs == {"x": 1}
    run.abandon()
    assert run.finished
    assert run.result is run.error is None


def test_it_is_priced_like_a_cross_entropy(tmp_path) -> None:
    ours = trained(plain, PipelineTrainer, tmp_path, max_steps=1)
    loss = ours.plan.blocks[-1]
    assert (loss.name, loss.kind) == ("loss", "loss")
    assert {"aten._log_softmax", "aten.nll_loss_forward"} <= {op.name for op in loss.forward_ops}


@pytest.mark.parametrize("name", schedule_names())
def test_the_last_stage_takes_microbatches_in_order(name) -> None:
    kind = schedule_kind(name)
    depth = 2 * kind.stages_per_device[0]
    shape = PipelineShape.of(depth, 8, kind.place(depth, 2))
    assert not kind.problem(shape)
    order = [
        action.microbatch
        for row in kind.rows(shape).rows
        for action in row
        if action.kind == "F" and action.stage == shape.num_stages - 1
    ]
    assert order == sorted(order)


@pytest.mark.parametrize("name", ["backward", "grad"])
def test_gradients_through_the_stages_are_refused(tmp_path, name) -> None:
    def rest(self, out, labels):
        loss = cross_entropy(self, out, labels)
        (within,) = torch.autograd.grad(loss, out.logits, create_graph=True)
        loss = loss + within.pow(2).sum()
        if name == "backward":
            loss.backward(retain_graph=True)
        else:
            torch.autograd.grad(loss, self.model.bert.parameters(), allow_unused=True)
        return loss

    with pytest.raises(CaptureError, match=rf"compute_loss calls {name}\(\) through the model"):
        trained(lambda base: with_loss(base, rest), PipelineTrainer, tmp_path)


def test_hooks_around_the_model_run_once(tmp_path, monkeypatch) -> None:
    plain_classifier = classifier

    def hooked() -> BertForSequenceClassification:
        model = plain_classifier()
        model.calls = []

        def before(module, args, kwargs):
            module.calls.append("before")
            embedded = module.bert.embeddings.word_embeddings(kwargs.pop("input_ids")) * 2
            return args, {**kwargs, "inputs_embeds": embedded}

        def after(module, args, output):
            output.logits = output.logits * 3

        model.register_forward_pre_hook(before, with_kwargs=True)
        model.register_forward_hook(after)
        return model

    monkeypatch.setitem(globals(), "classifier", hooked)
    theirs, ours = (trained(plain, base, tmp_path) for base in (Trainer, PipelineTrainer))
    assert_equal(theirs, ours)
    assert len(ours.model.calls) == len(theirs.model.calls)


def test_tensors_that_the_model_does_not_return_are_refused(tmp_path) -> None:
    def make(base: type) -> type:
        kept = []

        class Mine(with_loss(base, lambda self, o, y: cross_entropy(self, o, y) + kept[-1].mean())):
            def __init__(self, model, *args, **kwargs):
                super().__init__(model, *args, **kwargs)
                layer = model.bert.encoder.layer[0].output
                layer.register_forward_hook(lambda module, inputs, output: kept.append(output))

        return Mine

    message = r"uses \(mean\) a \(2, 6, 16\) tensor that the model computed and did not return"
    with pytest.raises(CaptureError, match=message):
        trained(make, PipelineTrainer, tmp_path)


def test_another_order_of_a_set_is_no_change() -> None:
    names = {"resolve", "tree", "blob", "raw", "refs"}
    before, members = _described(names), sorted(names)
    for member in members:  # as a capture puts back what it has kept
        names.discard(member)
        names.add(member)
    assert _described(names) == before
    names.add("settings")
    assert _described(names) != before
