"""Steps of training and of evaluation that the trainer's author has written."""

from __future__ import annotations

import contextlib
from functools import partial

import torch

from tests.train.live_program import collected, cross_entropy, loss_of, program, with_loss


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
