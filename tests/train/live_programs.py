"""Training scripts with a loss of their own, written once for either trainer class.

Each takes a trainer class and returns a subclass; what it collects is in ``seen``. ``overlap``
says whether its microbatches may overlap in the pipeline.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

PROGRAMS: dict[str, Program] = {}
WEIGHTS = torch.tensor([1.0, 5.0, 0.2])


@dataclass(frozen=True)
class Program:
    make: Callable[[type], type]
    overlap: bool


def program(*, overlap: bool = True) -> Callable[[Callable[[type], type]], Callable[[type], type]]:
    def add(make: Callable[[type], type]) -> Callable[[type], type]:
        PROGRAMS[make.__name__] = Program(make, overlap)
        return make

    return add


def loss_of(rest: Callable[..., Any], before: Any = None) -> Callable[..., Any]:
    """Return a compute_loss that calls the model once, with ``before`` and ``rest`` around it."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        given = before(self, model, inputs) if before else inputs
        out = model(**given)
        loss = rest(self, out, labels)
        return (loss, out) if return_outputs else loss

    return compute_loss


def cross_entropy(self, out, labels):
    return functional.cross_entropy(out.logits, labels)


def with_loss(base: type, rest: Callable[..., Any], before: Any = None, **members: Any) -> type:
    members = {"seen": (), **members, "compute_loss": loss_of(rest, before)}
    return type("Mine", (base,), members)


def collected(self, value: Any) -> None:
    self.seen = [*self.seen, value]


@program()
def focal_loss(base):
    def rest(self, out, labels):
        ce = functional.cross_entropy(out.logits, labels, reduction="none")
        return ((1 - torch.exp(-ce)) ** 2 * ce).mean()

    return with_loss(base, rest)


@program()
def parts_for_the_log(base):
    def rest(self, out, labels):
        ce, square = cross_entropy(self, out, labels), out.logits.pow(2).mean()
        collected(self, (ce.item(), float(square.detach()), ce.detach().numpy().tolist()))
        self.log({"ce": ce.item()})
        return ce + 0.1 * square

    return with_loss(base, rest)


@program()
def branch_on_a_value(base):
    def rest(self, out, labels):
        ce = cross_entropy(self, out, labels)
        if ce > 1.1:
            return ce * 0.5
        return ce

    return with_loss(base, rest)


@program()
def weights_held_by_the_trainer(base):
    def rest(self, out, labels):
        if self.loss_module is None:
            self.loss_module = nn.CrossEntropyLoss(weight=WEIGHTS.clone())
        return self.loss_module(out.logits, labels) + functional.cross_entropy(
            out.logits, labels, weight=WEIGHTS
        )

    return with_loss(base, rest, loss_module=None)


@program()
def annealed_by_the_step(base):
    def rest(self, out, labels):
        weight = self.state.global_step / 4 + self.args.max_steps
        return cross_entropy(self, out, labels) + weight * out.logits.pow(2).mean()

    return with_loss(base, rest)


@program()
def teacher(base):
    class Mine(base):
        seen = ()

        def __init__(self, model, *args, **kwargs):
            super().__init__(model, *args, **kwargs)
            self.teacher = copy.deepcopy(model).eval()
            with torch.no_grad():
                self.teacher.classifier.bias.add_(torch.tensor([0.0, 1.0, 2.0]))

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            labels = inputs.pop("labels")
            out = model(**inputs)
            with torch.no_grad():
                wanted = self.teacher(**inputs).logits
            kept = functional.kl_div(
                out.logits.log_softmax(-1), wanted.softmax(-1), reduction="batchmean"
            )
            loss = cross_entropy(self, out, labels) + kept
            return (loss, out) if return_outputs else loss

    return Mine


@program()
def mixup_of_embeddings(base):
    class Mine(base):
        seen = ()

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            labels, share = inputs["labels"], np.random.beta(0.4, 0.4)
            order = torch.randperm(len(labels))
            embedded = model.get_input_embeddings()(inputs["input_ids"])
            mixed = share * embedded + (1 - share) * embedded[order]
            out = model(inputs_embeds=mixed, attention_mask=inputs["attention_mask"])
            first = functional.cross_entropy(out.logits, labels)
            second = functional.cross_entropy(out.logits, labels[order])
            loss = share * first + (1 - share) * second
            collected(self, (share, order.tolist()))
            return (loss, out) if return_outputs else loss

    return Mine


@program()
def penalty_on_all_weights(base):
    def rest(self, out, labels):
        penalty = sum(p.pow(2).sum() for p in self.model.parameters())
        return cross_entropy(self, out, labels) + 1e-2 * penalty

    return with_loss(base, rest)


@program()
def learned_weights_of_the_tasks(base):
    class Mine(base):
        def __init__(self, *args, **kwargs):
            self.scales = nn.Parameter(torch.zeros(2))
            super().__init__(*args, **kwargs)

        @property
        def seen(self):
            return self.scales.tolist()

        def create_optimizer(self, model=None):
            parameters = [*self.model.parameters(), self.scales]
            self.optimizer = torch.optim.SGD(parameters, lr=0.1)
            return self.optimizer

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            labels = inputs.pop("labels")
            out = model(**inputs)
            tasks = torch.stack([cross_entropy(self, out, labels), out.logits.pow(2).mean()])
            loss = (tasks * torch.exp(-self.scales) + self.scales).sum()
            return (loss, out) if return_outputs else loss

    return Mine


@program()
def average_of_the_loss(base):
    def rest(self, out, labels):
        ce = cross_entropy(self, out, labels)
        self.average = 0.9 * self.average + 0.1 * ce.item()
        return ce * (1 + self.average)

    return with_loss(base, rest, average=0.0, seen=property(lambda self: self.average))


@program(overlap=False)
def average_that_changes_the_inputs(base):
    def rest(self, out, labels):
        ce = cross_entropy(self, out, labels)
        self.average = 0.9 * self.average + 0.1 * ce.item()
        return ce

    def before(self, model, inputs):
        embedded = model.get_input_embeddings()(inputs["input_ids"]) * (1 + self.average)
        return {"inputs_embeds": embedded, "attention_mask": inputs["attention_mask"]}

    return with_loss(base, rest, before, average=0.0)


@program(overlap=False)
def counter_before_the_call(base):
    def before(self, model, inputs):
        self.calls += 1
        return inputs

    def rest(self, out, labels):
        return cross_entropy(self, out, labels) * self.calls / 4

    return with_loss(base, rest, before, calls=0, seen=property(lambda self: self.calls))


@program(overlap=False)
def counter_of_the_closure(base):
    numbers = itertools.count(1)

    def before(self, model, inputs):
        self.number = next(numbers)
        return inputs

    return with_loss(base, lambda self, o, y: cross_entropy(self, o, y) * self.number, before)


@program(overlap=False)
def draws_on_both_sides(base):
    def before(self, model, inputs):
        if random.random() < 0.5:
            return {**inputs, "token_type_ids": torch.ones_like(inputs["input_ids"])}
        return {**inputs, "token_type_ids": torch.zeros_like(inputs["input_ids"])}

    def rest(self, out, labels):
        return cross_entropy(self, out, labels) * (1 + random.random())

    return with_loss(base, rest, before)


@program(overlap=False)
def twice_through_the_model(base):
    class Mine(base):
        seen = ()

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            labels = inputs.pop("labels")
            first = model(**inputs)
            second = model(**{**inputs, "token_type_ids": torch.ones_like(inputs["input_ids"])})
            distance = (first.logits - second.logits).pow(2).mean()
            collected(self, distance.item())
            loss = cross_entropy(self, first, labels) + cross_entropy(self, second, labels)
            loss = loss + distance
            return (loss, first) if return_outputs else loss

    return Mine


@program(overlap=False)
def reference_pass_in_evaluation_mode(base):
    class Mine(base):
        seen = ()

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            labels, was = inputs.pop("labels"), model.training
            model.eval()
            with torch.no_grad():
                reference = model(**inputs).logits
            model.train(was)
            out = model(**inputs)
            collected(self, reference.sum().item())
            loss = cross_entropy(self, out, labels) + (out.logits - reference - 1).pow(2).mean()
            return (loss, out) if return_outputs else loss

    return Mine


@program(overlap=False)
def parts_of_the_model(base):
    class Mine(base):
        seen = ()

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            labels = inputs.pop("labels")
            pooled = model.bert(**inputs).pooler_output
            out = {"logits": model.classifier(pooled)}
            loss = functional.cross_entropy(out["logits"], labels)
            return (loss, out) if return_outputs else loss

    return Mine


@program()
def other_outputs(base):
    class Mine(base):
        seen = ()

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            labels = inputs.pop("labels")
            out = self.model(inputs["input_ids"], output_hidden_states=True)
            collected(self, (type(out).__name__, len(out.hidden_states), out[0].shape[0]))
            out.logits = out.logits - 0.1 * out.hidden_states[1].mean()
            loss = functional.cross_entropy(out.logits, labels)
            return (loss, out) if return_outputs else loss

    return Mine


@program()
def inherited_and_more(base):
    class Mine(base):
        seen = ()

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            loss, out = super().compute_loss(model, inputs, True, num_items_in_batch)
            collected(self, sorted(inputs))
            loss = loss + 0.1 * out.logits.abs().mean()
            return (loss, out) if return_outputs else loss

    return Mine


@program(overlap=False)
def training_step_of_its_own(base):
    class Mine(base):
        seen = ()

        def training_step(self, model, inputs, num_items_in_batch=None):
            loss = super().training_step(model, inputs, num_items_in_batch)
            collected(self, round(loss.item(), 5))
            return loss

        compute_loss = loss_of(cross_entropy)

    return Mine


@program()
def once_per_optimizer_step(base):
    def rest(self, out, labels):
        if self.accelerator.sync_gradients:
            collected(self, self.state.num_input_tokens_seen)
        return cross_entropy(self, out, labels)

    return with_loss(base, rest)


@program()
def prediction_step_of_its_own(base):
    class Mine(base):
        seen = ()
        compute_loss = loss_of(cross_entropy)

        def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
            loss, logits, labels = super().prediction_step(
                model, inputs, prediction_loss_only, ignore_keys
            )
            collected(self, round(loss.item(), 5))
            return loss, logits, labels

    return Mine


@program(overlap=False)
def copy_of_the_model_that_follows_it(base):
    """The copy is made while the model's forward is replaced, and must be a model of its own."""

    class Mine(base):
        seen = ()
        average = None

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            labels = inputs.pop("labels")
            if self.average is None:
                self.average = copy.deepcopy(model).eval()
            with torch.no_grad():
                wanted = self.average(**inputs).logits
            out = model(**inputs)
            if model.training:
                pairs = zip(self.average.parameters(), model.parameters(), strict=True)
                with torch.no_grad():
                    for mine, theirs in pairs:
                        mine.mul_(0.9).add_(theirs, alpha=0.1)
            loss = cross_entropy(self, out, labels) + (out.logits - wanted - 1).pow(2).mean()
            return (loss, out) if return_outputs else loss

    return Mine


@program()
def discriminator_that_is_trained_on_the_side(base):
    class Mine(base):
        seen = property(lambda self: self.judge.weight.flatten().tolist())

        def __init__(self, *args, **kwargs):
            torch.manual_seed(0)
            self.judge = nn.Linear(3, 1)
            self.optimizer_of_the_judge = torch.optim.SGD(self.judge.parameters(), lr=0.1)
            super().__init__(*args, **kwargs)

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            labels = inputs.pop("labels")
            out = model(**inputs)
            if model.training:
                self.optimizer_of_the_judge.zero_grad()
                functional.softplus(self.judge(out.logits.detach())).mean().backward()
                self.optimizer_of_the_judge.step()
            loss = cross_entropy(self, out, labels) - self.judge(out.logits).mean()
            return (loss, out) if return_outputs else loss

    return Mine


class History:
    def __init__(self) -> None:
        self.values = {"loss": [1.0]}


@program(overlap=False)
def history_in_an_object(base):
    class Mine(base):
        def __init__(self, *args, **kwargs):
            self.history = History()
            super().__init__(*args, **kwargs)

        @property
        def seen(self):
            return self.history.values["loss"]

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            labels = inputs.pop("labels")
            scale = self.history.values["loss"][-1]
            embedded = model.get_input_embeddings()(inputs["input_ids"]) * scale
            out = model(inputs_embeds=embedded)
            loss = cross_entropy(self, out, labels)
            self.history.values["loss"].append(loss.item())
            return (loss, out) if return_outputs else loss

    return Mine


@program()
def tuple_of_outputs(base):
    class Mine(base):
        seen = ()

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            labels = inputs.pop("labels")
            out = model(**inputs, return_dict=False)
            loss = functional.cross_entropy(out[0], labels)
            return (loss, (loss, *out)) if return_outputs else loss

    return Mine


@program(overlap=False)
def gradients_of_the_microbatches_before(base):
    def rest(self, out, labels):
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        collected(self, sum(float(g.norm()) for g in gradients))
        return cross_entropy(self, out, labels)

    return with_loss(base, rest)


@program(overlap=False)
def what_a_hook_keeps(base):
    kept = []

    class Mine(with_loss(base, lambda self, o, y: cross_entropy(self, o, y) * (1 + kept[-1]))):
        def __init__(self, model, *args, **kwargs):
            super().__init__(model, *args, **kwargs)
            layer = model.bert.encoder.layer[0].output
            layer.register_forward_hook(lambda m, i, o: kept.append(o.detach().abs().mean()))

    return Mine


def embeddings(self):
    return self.model.bert.embeddings.word_embeddings.weight


@program(overlap=False)
def fast_gradient_method(base):
    """Adversarial training: a second backward pass, of embeddings moved by the first."""

    class Mine(base):
        seen = ()

        def training_step(self, model, inputs, num_items_in_batch=None):
            loss = super().training_step(model, dict(inputs), num_items_in_batch)
            weight = embeddings(self)
            before = weight.data.clone()
            weight.data.add_(weight.grad, alpha=float(0.5 / weight.grad.norm()))
            moved = super().training_step(model, dict(inputs), num_items_in_batch)
            weight.data = before
            collected(self, (round(loss.item(), 5), round(moved.item(), 5)))
            return loss

    return Mine


@program(overlap=False)
def projected_gradient_descent(base):
    """The step is written out: of three backward passes the second counts for nothing."""

    class Mine(base):
        seen = ()
        compute_loss = loss_of(cross_entropy)

        def training_step(self, model, inputs, num_items_in_batch=None):
            model.train()
            inputs, weight = self._prepare_inputs(inputs), embeddings(self)
            loss = self.compute_loss(model, dict(inputs)) / 3
            loss.backward()
            gradients = {n: p.grad.clone() for n, p in model.named_parameters()}
            before, moved = weight.data.clone(), []
            for step in range(2):
                weight.data.add_(weight.grad, alpha=float(0.3 / weight.grad.norm()))
                if step == 0:
                    model.zero_grad()
                else:
                    for name, parameter in model.named_parameters():
                        parameter.grad = gradients[name]
                again = self.compute_loss(model, dict(inputs)) / 3
                self.accelerator.backward(again)
                moved.append(round(again.item(), 5))
            weight.data.copy_(before)
            collected(self, moved)
            return loss.detach()

    return Mine


@program()
def step_in_a_context(base):
    class Mine(base):
        seen = ()

        def training_step(self, *args, **kwargs):
            with contextlib.nullcontext():
                return super().training_step(*args, **kwargs)

    return Mine


@program(overlap=False)
def step_that_keeps_activations_in_another_type(base):
    class Mine(base):
        seen = ()

        def training_step(self, *args, **kwargs):
            double = partial(torch.Tensor.to, dtype=torch.float64)
            with torch.autograd.graph.saved_tensors_hooks(
                lambda t: (t.dtype, double(t) if t.is_floating_point() else t),
                lambda kept: kept[1].to(kept[0]),
            ):
                return super().training_step(*args, **kwargs)

    return Mine


@program(overlap=False)
def two_passes_of_one_batch(base):
    """R-Drop: both passes of the model belong to one loss."""

    class Mine(base):
        seen = ()

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            labels = inputs.pop("labels")
            first, second = model(**inputs), model(**inputs)
            apart = (first.logits - 2 * second.logits).pow(2).mean()
            loss = cross_entropy(self, first, labels) + apart
            return (loss, first) if return_outputs else loss

    return Mine
