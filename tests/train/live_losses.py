"""Losses of other kinds: of several parts, with passes of other inputs or other outputs."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from tests.train.live_program import collected, cross_entropy, program, with_loss

WEIGHTS = torch.tensor([1.0, 5.0, 0.2])


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
def measured_once_more(base):
    """A metric of a second call, which needs no gradient, between the first and the backward."""

    class Mine(base):
        seen = ()

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            out = model(**inputs)
            with torch.no_grad():
                again = model(**{**inputs, "token_type_ids": torch.ones_like(inputs["input_ids"])})
            collected(self, round(again.loss.item(), 5))
            return (out.loss, out) if return_outputs else out.loss

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
