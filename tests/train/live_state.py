"""Losses with a state: counters, averages, random draws, and models beside the trained one."""

from __future__ import annotations

import copy
import itertools
import random

import torch
from torch import nn
from torch.nn import functional

from tests.train.live_program import collected, cross_entropy, program, with_loss


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
