"""Values and shapes that Python reads from tensors are specialised, and guarded."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ipu_pipeline.capture import capture
from ipu_pipeline.capture.captured import CapturedModel
from ipu_pipeline.capture.reads import ValueGuard, unguarded
from ipu_pipeline.errors import CaptureError, GuardError
from tests.capture.toys import Layer, assert_replays, batch, last, toy


def hidden(self, x):
    return self.layers[1](self.layers[0](x))


def reads_the_largest_label(self, x, labels):
    if labels.max() >= 10:
        raise ValueError("label out of range")
    return {"loss": hidden(self, x).square().mean()}


def counts_labels(self, x, labels):
    chosen = (labels >= 0).nonzero()
    factor = 2.0 if chosen.size(0) > 0 else 0.0
    return {"loss": hidden(self, x).square().mean() * factor}


def loops_over_masked(self, x, labels):
    total = hidden(self, x).square().mean()
    for value in labels[labels >= 0]:
        total = total + value
    return {"loss": total}


def reads_a_hidden_value(self, x):
    h = self.layers[0](x)
    if h.abs().max().item() > 1e6:
        h = h / 2
    if (h > 1e6).any():
        h = h * 3
    return {"loss": self.layers[1](h).square().mean()}


LABELS = torch.tensor([1, 2])


def test_guard_passes_equal_answers_and_stops_other_ones() -> None:
    model = toy(reads_the_largest_label)
    captured = capture(model, batch(labels=LABELS))
    assert captured.notes == ()
    assert_replays(model, captured, batch(seed=3, labels=torch.tensor([9, 0])))
    with pytest.raises(
        GuardError,
        match=r"'Toy' reads a tensor in Python \(.*__bool__\): it was "
        "False when the model was captured and is True for this batch",
    ):
        captured.run(batch(labels=torch.tensor([1, 10])))  # fmt: skip


@pytest.mark.parametrize("body", [counts_labels, loops_over_masked])
def test_shapes_that_depend_on_values_are_guarded(body) -> None:
    model = toy(body)
    captured = capture(model, batch(labels=LABELS))
    assert_replays(model, captured, batch(seed=3, labels=torch.tensor([7, 3])))
    if body is loops_over_masked:  # more rows than were unrolled; fewer are an IndexError
        more = {"x": torch.zeros(2, 4), "labels": torch.tensor([1, 2, 3])}
    else:
        more = batch(labels=torch.tensor([-1, -1]))
    with pytest.raises(
        GuardError, match=r"it was (2|torch.*2.*) when .* and is (0|torch.*3.*) for"
    ):
        captured.run(more)


def test_ordinary_shapes_are_not_guarded() -> None:
    captured = capture(toy(lambda self, x: {"loss": hidden(self, x).sum() / x.shape[0]}), batch())
    assert not any(isinstance(m, ValueGuard) for p in captured.programs for m in p.module.modules())


def test_a_value_that_differs_on_other_data_becomes_a_note() -> None:
    def body(self, x):
        return {"loss": hidden(self, x).sum() * float(x.sum())}

    captured = capture(toy(body), batch())
    assert len(captured.notes) == 1
    assert captured.notes[0].startswith("checked on the example batch only: the code of 'Toy' read")
    assert captured.graph.notes == captured.notes


def test_guards_on_hidden_values_do_not_disturb_counting(monkeypatch) -> None:
    monkeypatch.setattr(CapturedModel, "example_values", lambda self: pytest.fail("values used"))
    graph = capture(toy(reads_a_hidden_value), batch()).graph
    assert [block.name for block in graph.blocks] == ["layers.0", "layers.1"]
    assert graph["layers.0"].forward_flops == 2 * 2 * 4 * 4


def test_unguarded_is_undone() -> None:
    guard = ValueGuard(torch.Tensor.item, 3, "here")
    with unguarded(nn.Sequential(guard)):
        guard(torch.tensor(4))
    with pytest.raises(GuardError, match=r"here reads a tensor in Python \(.*item\): it was 3"):
        guard(torch.tensor(4))


@pytest.mark.parametrize(
    ("read", "same", "other"),
    [
        (torch.Tensor.item, torch.tensor(float("nan")), torch.tensor(1.0)),
        (torch.Tensor.tolist, torch.tensor([1, 2]), torch.tensor([1, 3])),
        (torch.Tensor.numpy, torch.tensor([1, 2]), torch.tensor([1, 2, 3])),
        (torch.Tensor.shape.__get__, torch.zeros(2), torch.zeros(3)),
    ],
)
def test_what_counts_as_the_same(read, same, other) -> None:
    guard = ValueGuard(read, read(same), "here")
    guard(same.clone())
    with pytest.raises(GuardError, match="here reads"):
        guard(other)


def test_long_values_are_shortened_in_messages() -> None:
    guard = ValueGuard(torch.Tensor.tolist, list(range(1000)), "here")
    with pytest.raises(GuardError) as caught:
        guard(torch.zeros(3))
    assert len(str(caught.value)) < 500


def layer_drop(self, x, p):
    h = self.layers[0](x)
    if not (self.training and torch.rand([]) < p):
        h = self.layers[1](h)
    return {"loss": h.square().mean()}


def test_layer_drop_is_refused_unless_it_is_off() -> None:
    model = toy(layer_drop)
    with pytest.raises(CaptureError, match=r"draws a random number and decides .*layerdrop=0"):
        capture(model, batch(p=0.1))
    captured = capture(model, batch(p=0.0))
    for seed in range(5):
        assert_replays(model, captured, batch(seed=seed, p=0.0))

    class Dropping(Layer):  # the other remedy
        def forward(self, x: Tensor) -> Tensor:
            return x if self.training and torch.rand([]) < 0.5 else self.linear(x)

    model = toy(lambda self, x: last(self, self.layers[0](x)), Dropping)
    capture(model, batch())


def test_reading_a_value_behind_dropout_is_no_decision_by_chance() -> None:
    def body(self, x):
        h = nn.functional.dropout(self.layers[0](x), 0.1)
        if torch.isinf(h).any():
            h = h.clamp(-1, 1)
        return {"loss": self.layers[1](h).square().mean()}

    assert capture(toy(body), batch()).notes == ()


def test_numpy_arrays_in_the_glue_are_inputs() -> None:
    def body(self, x):
        mask = torch.tensor(np.ones((2, 4), dtype=np.int64))
        return {"loss": (hidden(self, x) * mask * torch.from_numpy(np.full(4, 2.0))).sum()}

    captured = capture(toy(body), batch())
    assert [value.shape for value in captured.glue.hosts.values()] == [(2, 4), (4,)]
    assert "turns a numpy array of shape (4,) into a tensor; a program" in captured.glue.frozen


def test_a_tensor_from_nowhere_is_refused() -> None:
    from_numpy = torch.from_numpy

    def body(self, x):
        mask = from_numpy(np.random.randint(0, 2, (2, 4)))
        return {"loss": (hidden(self, x) * mask).sum()}

    with pytest.raises(CaptureError, match=r"uses a \(2, 4\) torch.int64 tensor .* every batch"):
        capture(toy(body), batch())
