"""Batches of other sizes: one program, checked once, serves them; what differs is another one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

import ipu_pipeline as ipp
from ipu_pipeline.capture import check
from ipu_pipeline.stages.captures import StageCache
from tests.capture.toys import WIDTH, Layer, Toy, assert_same, last, toy
from tests.tiny_models import TINY

SIZES = [(2, 6), (2, 8), (1, 8), (4, 5), (2, 6), (2, 11)]


@dataclass
class Counts:
    """How often a model was captured for real, and how often a capture was checked."""

    captures: int = 0
    checks: int = 0


@pytest.fixture
def counts() -> Iterator[Counts]:
    found = Counts()
    captured, checked = StageCache._captured, check.check_capture

    def capture(*args: Any) -> Any:
        found.captures += 1
        return captured(*args)

    def checking(*args: Any) -> Any:
        found.checks += 1
        return checked(*args)

    with (
        mock.patch.object(StageCache, "_captured", capture),
        mock.patch.object(check, "check_capture", checking),
    ):
        yield found


def batch(size: tuple[int, int], seed: int = 0) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {"x": torch.randn(*size, WIDTH, generator=draw)}


def assert_alike(
    make: Callable[[], nn.Module],
    batches: Sequence[dict[str, Any]],
    advance: Callable[[Any, int], None] = lambda *_: None,
    precision: str = "float32",
) -> nn.Module:
    """Losses, gradients, buffers and counters are those of plain torch in every step."""
    expected, model = make().train(), make().train()
    advance(model, 0)
    plan = ipp.plan(model, batches[0], num_stages=2, microbatches=1)
    exact = precision == "float32"
    with ipp.compile(model, plan, precision=precision) as executable:
        for number, one in enumerate(batches):
            advance(model, number)
            advance(expected, number)
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=not exact):
                loss = expected(**one)["loss"]
            loss.backward()
            found = executable.forward_backward(one)
            assert found == pytest.approx(loss.item(), rel=1e-6 if exact else 1e-2)
            if exact:
                assert_same(gradients(model), gradients(expected))
            model.zero_grad()
            expected.zero_grad()
        assert_same(dict(model.named_buffers()), dict(expected.named_buffers()))
    return model


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", ["llama", "t5", "mixtral"])
def test_transformers_are_captured_and_checked_once(name: str, counts: Counts) -> None:
    sizes = [(2, 16), (2, 24), (1, 9)]
    batches = [TINY[name].batch(batch_size=b, seq_length=n, seed=n) for b, n in sizes]
    assert_alike(lambda: TINY[name].build()[0], batches)
    assert counts == Counts(captures=0, checks=1)  # that of the plan


def test_in_lower_precision(counts: Counts) -> None:
    batches = [TINY["t5"].batch(seq_length=n, seed=n) for n in (16, 9)]
    assert_alike(lambda: TINY["t5"].build()[0], batches, precision="bf16")
    assert counts == Counts(captures=1, checks=2)  # that of the plan has no autocast


def test_numbers_made_of_sizes_become_inputs(counts: Counts) -> None:
    def body(self: Toy, x: Tensor) -> dict[str, Tensor]:
        h = self.layers[0](x)
        rows, length = h.shape[0], h.shape[1]
        places = torch.arange(length, dtype=h.dtype).reshape(1, length, 1) / length**0.5
        h = (h + places).view(rows * length, WIDTH)[: rows * length - 2]
        kept = {"loss": self.layers[1](h).square().sum() / (rows * h.size(0))}
        return kept | {"size": torch.full((2,), float(length))}

    assert_alike(lambda: toy(body), [batch(size) for size in SIZES])
    assert counts == Counts(captures=0, checks=1)


def test_a_size_that_decides_makes_another_program(counts: Counts) -> None:
    def body(self: Toy, x: Tensor) -> dict[str, Tensor]:
        h = self.layers[0](x)
        return last(self, h.relu() if h.shape[1] > 7 else h.tanh())

    assert_alike(lambda: toy(body), [batch(size) for size in SIZES])
    assert counts == Counts(captures=1, checks=2)


def test_tensors_that_are_written_to_later(counts: Counts) -> None:
    """As Wav2Vec2 keeps from its mean what the mask leaves out."""

    def body(self: Toy, x: Tensor) -> dict[str, Tensor]:
        h = self.layers[0](x)
        mask = torch.zeros(h.shape[:2], dtype=torch.bool)
        mask[torch.arange(mask.shape[0]), x[..., 0].argmax(1)] = True
        h = h * 2
        h[~mask] = 0.0
        return last(self, h)

    assert_alike(lambda: toy(body), [batch(size) for size in SIZES])
    assert counts == Counts(captures=0, checks=1)


def test_another_number_of_parts_is_another_program(counts: Counts) -> None:
    def body(self: Toy, x: Tensor) -> dict[str, Tensor]:
        parts = self.layers[0](x).split(3, 1)
        return last(self, torch.cat([part.mean(1, keepdim=True) for part in parts], 1))

    assert_alike(lambda: toy(body), [batch(size) for size in ((2, 6), (2, 8), (2, 5), (3, 9))])
    assert counts == Counts(captures=1, checks=2)  # two parts and three


class Lengths(Layer):
    """Returns a size beside its tensor."""

    def forward(self, x: Tensor) -> tuple[Tensor, int]:  # type: ignore[override]
        return self.linear(x), x.shape[1]


def test_a_size_that_a_block_returns(counts: Counts) -> None:
    def body(self: Toy, x: Tensor) -> dict[str, Tensor]:
        h, length = self.layers[0](x)
        return {"loss": self.layers[1](h * length)[0].square().mean()}

    assert_alike(lambda: toy(body, Lengths), [batch(size) for size in SIZES[:2]])
    assert counts == Counts(captures=1, checks=2)


def test_a_number_that_sizes_and_something_else_decide(counts: Counts) -> None:
    def body(self: Toy, x: Tensor) -> dict[str, Tensor]:
        h = self.layers[0](x)[:, : x.shape[1] - self.dropped]
        return last(self, h * torch.ones(h.shape[1], 1))

    def advance(model: Any, number: int) -> None:
        model.dropped = (0, 0, 0, 2, 1, 0, 2, 3)[number]

    sizes = [(2, 6), (2, 8), (2, 6), (2, 6), (2, 8), (2, 8), (2, 8), (2, 7)]
    assert_alike(lambda: toy(body), [batch(size) for size in sizes], advance)
    assert counts == Counts(captures=0, checks=1)


def test_what_python_keeps_is_kept_once_per_microbatch() -> None:
    def body(self: Toy, x: Tensor) -> dict[str, Tensor]:
        self.calls = [*getattr(self, "calls", ()), x.shape[1]]
        return last(self, self.layers[0](x) * len(self.calls))

    model = assert_alike(lambda: toy(body), [batch(size) for size in SIZES])
    assert model.calls == [length for _, length in SIZES]


class Statistics(Layer):
    """Writes to a buffer, and counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(WIDTH))
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.mean.mul_(0.5).add_(x.detach().mean((0, 1)))
        return self.linear(x) - self.mean


def test_blocks_that_keep_something(counts: Counts) -> None:
    made = lambda: toy(lambda self, x: last(self, self.layers[0](x)), Statistics)  # noqa: E731
    model = assert_alike(made, [batch(size) for size in SIZES])
    assert [layer.calls for layer in model.layers] == [len(SIZES), len(SIZES)]
    assert counts == Counts(captures=0, checks=1)


class Reading(Layer):
    """Looks at values: what it returns has no shape without them."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.linear(x)
        return h[:, : 1 + int((x[0, :, 0] > -9).sum()) // 2]


def test_a_block_whose_shape_depends_on_values_is_captured_for_every_size(counts: Counts) -> None:
    made = lambda: toy(lambda self, x: last(self, self.layers[0](x)), Reading)  # noqa: E731
    assert_alike(made, [batch(size) for size in SIZES])
    assert counts == Counts(captures=4, checks=5)


class Elsewhere(Layer):
    """Has another shape where there are no values."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.linear(x)
        return h[:, :2] if h.is_meta else h


def test_a_block_with_another_shape_on_meta_is_captured_for_every_size(counts: Counts) -> None:
    def body(self: Toy, x: Tensor) -> dict[str, Tensor]:
        h = self.layers[0](x)
        return last(self, h / h.shape[1])

    assert_alike(lambda: toy(body, Elsewhere), [batch(size) for size in SIZES])
    assert counts == Counts(captures=4, checks=5)


def test_tensors_on_the_side_and_in_objects(counts: Counts) -> None:
    class Side(Layer):
        def __init__(self) -> None:
            super().__init__()
            self.kept = None

        def forward(self, x: Tensor, seen: dict[str, Tensor]) -> Tensor:
            self.kept = x.mean(-1)
            seen[f"{len(seen)}"] = x[:, 1:]
            return self.linear(x)

    def body(self: Toy, x: Tensor) -> dict[str, Tensor]:
        seen: dict[str, Tensor] = {}
        h = self.layers[1](self.layers[0](x, seen), seen)
        side = sum((layer.kept.sum() / layer.kept.shape[1] for layer in self.layers), h.sum())
        return {"loss": side + sum(t.mean() * t.shape[1] for t in seen.values())}

    assert_alike(lambda: toy(body, Side), [batch(size) for size in SIZES])
    assert counts == Counts(captures=0, checks=1)


def test_a_short_microbatch_weighs_as_before(counts: Counts) -> None:
    def body(self: Toy, x: Tensor) -> dict[str, Tensor]:
        h = self.layers[1](self.layers[0](x))
        return {"loss": h.square().sum() / (h.shape[0] * h.shape[1])}

    expected, model = toy(body), toy(body)
    plan = ipp.plan(model, batch((2, 6)), num_stages=2, microbatches=2)
    with ipp.compile(model, plan) as executable:
        for size in ((4, 6), (3, 6), (4, 9), (3, 9)):
            loss = expected(**batch(size))["loss"]
            loss.backward()
            assert executable.forward_backward(batch(size)) == pytest.approx(loss.item(), rel=1e-6)
            assert_same(gradients(model), gradients(expected))
            model.zero_grad()
            expected.zero_grad()
    assert counts == Counts(captures=0, checks=1)


def test_outputs_in_evaluation(counts: Counts) -> None:
    model, one = TINY["bert-mlm"].build(batch_size=4)
    plan = ipp.plan(model, one, num_stages=2, microbatches=1)
    with ipp.compile(model, plan) as executable:
        for length in (16, 12):
            one = TINY["bert-mlm"].batch(batch_size=4, seq_length=length)
            found = executable.eval_step(one)
            with torch.no_grad():
                expected = model.eval()(**one)
            torch.testing.assert_close(found.outputs["logits"], expected.logits)
            model.train()
    assert counts == Counts(captures=1, checks=2)
