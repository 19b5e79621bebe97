"""Tensors that leave a block through hooks, attributes and lists are results of it."""

from __future__ import annotations

import functools
import types
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ipu_pipeline as ipp
from ipu_pipeline.capture import capture
from ipu_pipeline.capture.glue import StandIn
from ipu_pipeline.errors import CaptureError, GuardError
from tests.capture.toys import (
    WIDTH,
    Layer,
    assert_replays,
    assert_trains_in_stages,
    batch,
    toy,
)

KEPT: list[Tensor] = []
LAST: Tensor | None = None


class Inner(Layer):
    """A layer with a part of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.act = nn.Tanh()
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.act(self.linear(x)))


def penalised(self: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Two layers, and a loss that reads what ``self.gather()`` finds."""
    self.start()
    h = self.layers[1](self.layers[0](x))
    return {"loss": h.square().mean() + sum(t.square().mean() for t in self.gather())}


def with_list(model: nn.Module) -> None:
    model.kept = []
    for layer in model.layers:
        layer.act.register_forward_hook(lambda _m, _i, o: model.kept.append(o))
    model.start, model.gather = model.kept.clear, lambda: model.kept


def with_a_new_list(model: nn.Module) -> None:
    for layer in model.layers:
        layer.act.register_forward_hook(lambda _m, _i, o: model.kept.append((o.abs(), "name")))
    model.start, model.gather = (
        lambda: setattr(model, "kept", []),
        lambda: [t for t, _ in model.kept],
    )


def with_results_of_layers(model: nn.Module) -> None:
    """What is kept is a value of the graph anyway."""
    model.kept = []
    for layer in model.layers:
        layer.register_forward_hook(lambda _m, i, o: model.kept.extend([i[0], o]))
    model.start, model.gather = model.kept.clear, lambda: [*model.kept, model.kept[0]]


def with_a_grown_list(model: nn.Module) -> None:
    def keep(_m: Any, _i: Any, o: Tensor) -> None:
        model.kept = [*model.kept, o]

    for layer in model.layers:
        layer.act.register_forward_hook(keep)
    model.start, model.gather = lambda: setattr(model, "kept", []), lambda: model.kept[:1]


class Collector:
    """Keeps activations by name."""

    def __init__(self) -> None:
        self.by_name: dict[str, Tensor] = {}

    def keep(self, name: str, _module: nn.Module, _inputs: Any, output: Tensor) -> None:
        self.by_name[name] = output


def with_a_collector(model: nn.Module) -> None:
    collector = Collector()
    for n, layer in enumerate(model.layers):
        layer.act.register_forward_hook(functools.partial(collector.keep, f"layer {n}"))
    model.start, model.gather = lambda: None, lambda: list(collector.by_name.values())


def with_globals(model: nn.Module) -> None:
    def keep(_m: Any, _i: Any, o: Tensor) -> None:
        global LAST
        KEPT.append(o.mean())
        LAST = o

    for layer in model.layers:
        layer.act.register_forward_hook(keep)
    model.start, model.gather = KEPT.clear, lambda: [*KEPT, LAST]


def with_a_variable(model: nn.Module) -> None:
    last: Tensor | None = None

    def keep(_m: Any, i: Any) -> None:
        nonlocal last
        last = i[0] * 2

    model.layers[0].act.register_forward_pre_hook(keep)
    model.start, model.gather = lambda: None, lambda: [last]


WAYS = [
    with_list, with_a_new_list, with_results_of_layers, with_a_grown_list, with_a_collector,
    with_globals, with_a_variable,
]  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("granularity", ["layer", "op"])
def test_what_hooks_gather(way: Any, granularity: str) -> None:
    model = toy(penalised, Inner)
    way(model)
    captured = capture(model, batch(), granularity=granularity)
    for seed in (1, 2):
        assert_replays(model, captured, batch(seed))


@pytest.mark.parametrize("way", WAYS)
def test_what_hooks_gather_in_stages(way: Any) -> None:
    model = toy(penalised, Inner)
    way(model)
    for seed in (1, 2):
        assert_trains_in_stages(model, batch(seed))


class WithAuxiliaryLoss(Inner):
    """Keeps a loss of its own as an attribute, as many mixtures of experts do."""

    total = 0

    def forward(self, x: Tensor) -> Tensor:
        self.total += 1
        h = self.act(self.linear(x))
        self.losses = {"balance": h.var(), "z": (h.exp().mean(), "not used")}
        self.aux = h.abs().mean()
        return self.out(h)


def sum_of_losses(self: nn.Module, x: Tensor) -> dict[str, Tensor]:
    h = self.layers[1](self.layers[0](x))
    extra = sum(a.aux + a.losses["balance"] + a.losses["z"][0] for a in self.layers)
    return {"loss": h.square().mean() + extra}


def test_losses_that_layers_keep_as_attributes() -> None:
    model = toy(sum_of_losses, WithAuxiliaryLoss)
    assert_replays(model, capture(model, batch()), batch(3))
    assert_trains_in_stages(model, batch(4))
    before = model.layers[0].total
    plan = ipp.plan(model, {"x": batch()["x"][:1]}, num_stages=1, microbatches=2)
    with ipp.compile(model, plan, self_check=False) as executable:
        executable.forward_backward(batch(5))
    assert model.layers[0].total > before  # other attributes stay as the layer leaves them
    found = model.layers[0].aux
    model(x=batch(5)["x"][1:])
    torch.testing.assert_close(found, model.layers[0].aux.detach())
    assert not found.requires_grad


def test_a_layer_that_is_called_twice() -> None:
    def twice(self: nn.Module, x: Tensor) -> dict[str, Tensor]:
        first, second = self.layers
        h = first(x)
        loss = first.aux
        h = first(second(h))
        return {"loss": h.square().mean() + loss - 2 * first.aux * second.aux}

    model = toy(twice, WithAuxiliaryLoss)
    assert_replays(model, capture(model, batch()), batch(3))


def test_recomputed_blocks_with_side_outputs() -> None:
    model = toy(penalised, Inner)
    with_list(model)
    inputs = batch(6)
    plan = ipp.plan(model, {"x": inputs["x"][:1]}, num_stages=2, microbatches=2)
    losses = []
    for recompute in ("none", "all"):
        with ipp.compile(model, plan, recompute=recompute, self_check=False) as executable:
            losses.append(executable.forward_backward(inputs))
    halves = [model(x=inputs["x"][n : n + 1])["loss"].detach() for n in range(2)]
    expected = float(sum(halves)) / 2
    assert losses == pytest.approx([expected] * 2, rel=1e-6)


def test_a_list_for_a_log_is_filled_in_every_step() -> None:
    model, seen = toy(lambda self, x: {"loss": self.layers[1](self.layers[0](x)).sum()}, Inner), []
    model.layers[0].act.register_forward_hook(lambda _m, _i, o: seen.append(o.detach()))
    captured = capture(model, batch(), self_check=False)
    seen.clear()
    captured.run(batch(1))
    captured.run(batch(2))
    assert len(seen) == 2


def test_a_block_that_does_not_put_it_there_any_more_is_refused() -> None:
    model = toy(penalised, Inner)
    with_list(model)
    captured = capture(model, batch(), self_check=False)
    for layer in model.layers:
        layer.act._forward_hooks.clear()
    with pytest.raises(GuardError, match=r"place that is gone \(act\.0\.model\)"):
        captured.run(batch())

    class Sometimes(WithAuxiliaryLoss):
        def forward(self, x: Tensor) -> Tensor:
            result = super().forward(x)
            if x.sum() < 0:
                self.aux = None
            return result

    model = toy(sum_of_losses, Sometimes)
    captured = capture(model, {"x": batch()["x"].abs()}, self_check=False)
    with pytest.raises(GuardError, match="and none for this batch"):
        captured.run({"x": -batch()["x"].abs()})


class Adding(Layer):
    """Reads and changes a sum that its owner keeps."""

    owner: list[nn.Module]

    def forward(self, x: Tensor) -> Tensor:
        h = self.linear(x)
        (owner,) = self.owner
        owner.total = owner.total + h.square().mean()
        owner.seen.append(h)
        return x + h * owner.seen[0].tanh()


def test_a_sum_and_a_list_that_blocks_read_and_change() -> None:
    def body(self: nn.Module, x: Tensor) -> dict[str, Tensor]:
        self.total, self.seen = 0.5, []
        h = self.layers[1](self.layers[0](x))
        return {"loss": h.square().mean() + self.total}

    model = toy(body, Adding)
    for layer in model.layers:
        layer.owner = [model]
    assert_replays(model, capture(model, batch()), batch(1))
    assert_trains_in_stages(model, batch(2))


def test_what_the_glue_puts_into_blocks_is_an_input_of_them() -> None:
    class Scaled(Layer):
        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x) * self.linear.scale

    def body(self: nn.Module, x: Tensor) -> dict[str, Tensor]:
        scale = x.mean(0)
        for layer in self.layers:
            layer.linear.scale = scale + 1
        return {"loss": self.layers[1](self.layers[0](x)).square().mean()}

    model = toy(body, Scaled)
    assert_replays(model, capture(model, batch()), batch(1))
    assert_trains_in_stages(model, batch(2))


def test_a_flag_that_the_glue_switches_for_some_blocks() -> None:
    class Flagged(Layer):
        way = "plain"

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x) * (3 if self.way == "loud" else 1)

    def body(self: nn.Module, x: Tensor) -> dict[str, Tensor]:
        self.layers[0].way = "loud"
        h = self.layers[0](x)
        self.layers[0].way = "plain"
        return {"loss": self.layers[1](h + self.layers[0](x)).square().mean()}

    model = toy(body, Flagged)
    model.layers[0].way = "plain"
    assert_replays(model, capture(model, batch()), batch(1))
    assert_trains_in_stages(model, batch(2))


@pytest.mark.parametrize("use", [sum, max, lambda s: -s[0] / 2, lambda s: 3 ** abs(s[1]) % 2])
@pytest.mark.parametrize("read", [float, lambda t: int(t * 9)])
def test_a_number_that_a_block_reads_for_the_glue_is_refused(use: Any, read: Any) -> None:
    seen: list[float] = []

    def body(self: nn.Module, x: Tensor) -> dict[str, Tensor]:
        seen.clear()
        h = self.layers[1](self.layers[0](x))
        return {"loss": h.square().mean() * use(seen)}

    model = toy(body)
    for layer in model.layers:
        layer.register_forward_hook(lambda _m, _i, o: seen.append(read(o.detach().abs().max())))
    with pytest.raises(CaptureError, match=r"uses a number .* that a block read from a tensor"):
        capture(model, batch())


def test_a_tensor_handed_over_where_it_cannot_be_found_is_refused() -> None:
    hidden = types.ModuleType("hidden")

    class Reading(Layer):
        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x) * hidden.scale

    def body(self: nn.Module, x: Tensor) -> dict[str, Tensor]:
        hidden.scale = x.mean(0)
        return {"loss": self.layers[1](self.layers[0](x)).square().mean()}

    with pytest.raises(CaptureError, match=r"hands a \(4,\) tensor to 'layers.0' otherwise than"):
        capture(toy(body, Reading), batch())


def test_a_tensor_in_no_place_that_is_found_is_refused() -> None:
    hidden = types.ModuleType("hidden")  # nobody looks for tensors there

    class Hiding(Layer):
        def forward(self, x: Tensor) -> Tensor:
            hidden.kept = self.linear(x)
            return hidden.kept * 2

    def body(self: nn.Module, x: Tensor) -> dict[str, Tensor]:
        return {"loss": self.layers[0](x).sum() + hidden.kept.sum()}

    with pytest.raises(CaptureError, match="neither a parameter, a buffer, an input"):
        capture(toy(body, Hiding), batch())


def test_changes_are_repeated_without_the_block() -> None:
    model = toy(penalised, Inner)
    with_list(model)
    calls = [c for c in capture(model, batch()).glue.calls if c.repeated is not None]
    assert len(calls) == 2
    model.kept.clear()
    for call in calls:
        call.repeated.apply()
    assert [type(tensor) for tensor in model.kept] == [StandIn] * 2
    with pytest.raises(GuardError, match=r"Inner finds something else in act.0.model.kept than"):
        calls[0].repeated.apply()


def test_an_attribute_that_is_there_the_second_time() -> None:
    model = toy(sum_of_losses, WithAuxiliaryLoss)
    calls = capture(model, batch()).glue.calls
    model.layers[0].aux = torch.zeros(())
    with pytest.raises(GuardError, match="finds something else in an attribute than"):
        next(call.repeated for call in calls if call.repeated is not None).apply()


def test_a_running_mean_outside_buffers_is_refused() -> None:
    class Averaging(Layer):
        mean: Tensor | None = None

        def forward(self, x: Tensor) -> Tensor:
            h = self.linear(x)
            before = torch.zeros(()) if self.mean is None else self.mean
            self.mean = 0.9 * before + 0.1 * h.detach().mean()
            return h

    def body(self: nn.Module, x: Tensor) -> dict[str, Tensor]:
        h = self.layers[1](self.layers[0](x))
        return {"loss": h.square().mean() + self.layers[0].mean}

    model = toy(body, Averaging)
    model(**batch())
    with pytest.raises(CaptureError, match=r"Averaging reads a tensor in an attribute .* buffers"):
        capture(model, batch())
