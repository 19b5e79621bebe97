"""Values that a model's own code reads between its blocks, and tensors that it keeps there."""

from __future__ import annotations

import logging
import random
from collections import deque
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import ipu_pipeline as ipp
from ipu_pipeline.errors import CaptureError
from ipu_pipeline.stages.batch import Microbatch
from ipu_pipeline.stages.captures import StageCache
from tests.capture.toys import WIDTH, Layer, Toy, assert_same, toy
from tests.stages.glue_programs import FIRST, LOG, PROGRAMS, Body, everything, rest
from tests.stages.test_glue import halves, inputs, machine_of

STEPS = 3


def built(body: Body) -> Toy:
    LOG.clear()
    random.seed(0)
    np.random.seed(0)
    model = toy(body, Layer)
    model.kept, model.recent, model.cache = [], deque(maxlen=2), {}
    model.calls, model.last = 0, None
    model.register_buffer("queue", torch.ones(WIDTH))
    model.register_buffer("place", torch.zeros(1, dtype=torch.long))
    return model.train()


def observed(model: Toy) -> Any:
    """What a user can look at afterwards."""
    own = {name: getattr(model, name) for name in ("kept", "recent", "cache", "calls", "last")}
    return values(
        [own, LOG, [module.training for module in model.modules()], dict(model.named_buffers())]
    )


def values(found: Any) -> Any:
    if isinstance(found, Tensor):
        return (
            "tensor",
            found.requires_grad,
            [round(v, 5) for v in found.detach().flatten().tolist()],
        )
    if isinstance(found, dict):
        return {key: values(value) for key, value in found.items()}
    if isinstance(found, list | tuple | deque):
        return [type(found).__name__, *map(values, found)]
    return round(found, 5) if isinstance(found, float) else found


def update(model: nn.Module) -> None:
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.data -= 0.1 * parameter.grad
            parameter.grad = None


def eager(body: Body) -> tuple[Toy, list[float], Any]:
    model, losses = built(body), []
    for step in range(STEPS):
        total = 0.0
        for part in halves(inputs(step)):
            loss = model(**part)["loss"] / 2
            loss.backward()
            total += float(loss.detach())
        update(model)
        losses.append(total)
    return model, losses, observed(model)


def planned(model: Toy, stages: int = 2) -> Any:
    part = halves(inputs(0))[0]
    machine = machine_of(stages)
    return ipp.plan(model, part, machine=machine, num_stages=stages, microbatches=2)


def assert_as_eager(
    body: Body, stages: int = 2, captures: int | None = None, **options: Any
) -> None:
    expected, losses, seen = eager(body)
    model, found = built(body), []
    with ipp.compile(model, planned(model, stages), **options) as executable:
        for step in range(STEPS):
            found.append(executable.forward_backward(inputs(step)))
            update(model)
        assert captures is None or executable._cache.captures == captures
    assert found == pytest.approx(losses, rel=1e-5)
    assert_same(dict(model.named_parameters()), dict(expected.named_parameters()))
    assert observed(model) == seen


@pytest.mark.parametrize("name", FIRST)
def test_values_and_tensors(name: str) -> None:
    assert_as_eager(PROGRAMS[name])


@pytest.mark.acceptance
@pytest.mark.parametrize("recompute", ["none", "all"])
@pytest.mark.parametrize("name", PROGRAMS)
def test_all_values_and_tensors(name: str, recompute: str) -> None:
    assert_as_eager(PROGRAMS[name], recompute=recompute)


@pytest.mark.parametrize(
    ("stages", "options"),
    [(1, {}), (2, {"schedule": "gpipe", "recompute": "all"}), (2, {"self_check": False})],
)
def test_in_other_ways_of_running(stages: int, options: dict[str, Any]) -> None:
    assert_as_eager(everything, stages, **options)


@pytest.mark.parametrize(
    ("name", "captures"), [("scales_by_the_largest", 0), ("uses_what_it_kept", 1)]
)
def test_values_are_inputs_and_no_captures(name: str, captures: int) -> None:
    assert_as_eager(PROGRAMS[name], captures=captures)


def test_evaluation() -> None:
    expected, model = built(everything).eval(), built(everything)
    with ipp.compile(model, planned(model)) as executable, torch.no_grad():
        for step in range(STEPS):
            theirs, ours = expected(**inputs(step)), executable.eval_step(inputs(step))
            torch.testing.assert_close(ours.outputs["hidden"], theirs["hidden"])
            assert ours.loss == pytest.approx(theirs["loss"].item(), rel=1e-5)
    assert observed(model.eval()) == observed(expected)


def test_the_log_says_why_microbatches_wait(caplog: pytest.LogCaptureFixture) -> None:
    model = built(PROGRAMS["logs_a_part"])
    plan = planned(model)
    with caplog.at_level(logging.WARNING), ipp.compile(model, plan) as executable:
        executable.forward_backward(inputs(0))
        executable.forward_backward(inputs(1))
    said = [r.getMessage() for r in caplog.records if "one after another" in r.getMessage()]
    assert said == [
        "microbatches run one after another: the code of 'Toy' reads values of a tensor in Python "
        "(Tensor.item)"
    ]


def test_an_error_of_the_users_code_comes_out_as_it_is() -> None:
    def body(self: Toy, x: Tensor) -> dict[str, Tensor]:
        h = self.layers[0](x)
        self.calls += 1
        value = h.detach().sum().item()
        if self.calls == 3:
            raise KeyError("the user's own")
        return rest(self, h * value)

    model = built(body)
    with ipp.compile(model, planned(model)) as executable:
        executable.forward_backward(inputs(0))
        with pytest.raises(KeyError, match="the user's own"):
            executable.forward_backward(inputs(1))
        model.calls = 5
        expected = sum(model(**part)["loss"].item() for part in halves(inputs(2))) / 2
        assert executable.forward_backward(inputs(2)) == pytest.approx(expected, rel=1e-5)


class Slots:
    """No attribute or container of the model leads to what is in it."""

    __slots__ = ("tensor",)


def test_a_tensor_that_is_kept_out_of_reach_says_so_when_it_is_used() -> None:
    def body(self: Toy, x: Tensor) -> dict[str, Tensor]:
        h = self.layers[0](x)
        self.cache["slots"].tensor = h.detach()
        return rest(self, h)

    model = built(body)
    model.cache["slots"] = Slots()
    with ipp.compile(model, planned(model)) as executable:
        executable.forward_backward(inputs(0))
    with pytest.raises(CaptureError, match=r"kept from an earlier forward pass; .* in a buffer"):
        model.cache["slots"].tensor.sum()


def test_a_target_without_live_values_refuses_reads_of_what_changes() -> None:
    model = built(PROGRAMS["moves_a_position"])
    plan = planned(model)
    cache = StageCache(model, plan, "float32", recompute=frozenset(), self_check=True)
    part = Microbatch(0, halves(inputs(0))[0], 2, 1.0)
    message = r"'Toy' reads 'place' in Python \(Tensor.__int__\), .* run it with target='local'"
    with pytest.raises(CaptureError, match=message):
        cache.prepare([part])


def test_a_loss_that_is_kept_and_changed_in_place_has_no_scaled_terms() -> None:
    def body(self: Toy, x: Tensor, labels: Tensor, few: Tensor) -> dict[str, Tensor]:
        h = self.layers[0](x)
        loss = nn.functional.cross_entropy(h, labels).clone()
        loss += nn.functional.cross_entropy(self.layers[1](h), few)
        self.last = loss.detach()
        return {"loss": loss}

    model, (_, parts) = built(body), two_kinds_of_labels()
    plan = ipp.plan(model, parts[0], machine=machine_of(2), num_stages=2, microbatches=2)
    with (
        ipp.compile(model, plan) as executable,
        pytest.raises(CaptureError, match=r"keeps a value that it computes from the loss, .* plan"),
    ):
        executable.forward_backward(two_kinds_of_labels()[0])


def test_a_write_that_torch_does_not_see_is_refused() -> None:
    def body(self: Toy, x: Tensor) -> dict[str, Tensor]:
        h = self.layers[0](x)
        copied = h.detach().clone()
        copied.numpy()[0] = 0.5
        return rest(self, h + copied)

    with pytest.raises(CaptureError, match=r"'Toy' writes into the memory of a tensor .*copy"):
        planned(built(body))


def two_kinds_of_labels() -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    labels = {"labels": torch.tensor([0, 1, 2, 3]), "few": torch.tensor([0, -100, 1, 2])}
    batch = {**inputs(0), **labels}
    return batch, [{n: v[i : i + 2] for n, v in batch.items()} for i in (0, 2)]


def test_a_kept_part_of_a_loss_with_scaled_terms() -> None:
    """Values that Python reads and tensors that it keeps are those of the loss itself."""

    def body(self: Toy, x: Tensor, labels: Tensor, few: Tensor) -> dict[str, Tensor]:
        h = self.layers[0](x)
        first = nn.functional.cross_entropy(h, labels)
        second = nn.functional.cross_entropy(self.layers[1](h), few)
        loss = first + 0.5 * second
        self.kept.append(loss.item())
        self.last = loss.detach()
        self.recent.append(second.detach())
        return {"loss": loss}

    batch = {
        **inputs(0),
        "labels": torch.tensor([0, 1, 2, 3]),
        "few": torch.tensor([0, -100, 1, 2]),
    }
    parts = [{n: v[i : i + 2] for n, v in batch.items()} for i in (0, 2)]
    expected = built(body)
    for part in parts:
        expected(**part)
    model = built(body)
    plan = ipp.plan(model, parts[0], machine=machine_of(2), num_stages=2, microbatches=2)
    with ipp.compile(model, plan) as executable:
        whole = built(body)(**batch)["loss"].item()
        assert executable.forward_backward(batch) == pytest.approx(whole, rel=1e-5)
    assert observed(model) == observed(expected)


def test_what_was_kept_is_used_by_a_shorter_microbatch() -> None:
    def body(self: Toy, x: Tensor) -> dict[str, Tensor]:
        h = self.layers[0](x)
        mean = h.detach().mean(0)
        if self.kept:
            h = h + torch.stack(self.kept).mean(0)
        self.kept = [*self.kept[-1:], mean]
        return rest(self, h)

    expected, model = built(body), built(body)
    with ipp.compile(model, planned(model)) as executable:
        for step in range(2):
            x = inputs(step)["x"]
            size = len(halves(inputs(0))[0]["x"])
            parts = [x[:size], x[size : size + 1]]
            total = sum(
                float(expected(x=part)["loss"].detach()) * len(part) / (size + 1) for part in parts
            )
            assert executable.forward_backward({"x": x[: size + 1]}) == pytest.approx(total)
    assert observed(model) == observed(expected)
