"""Functions of torch in a program: equal to torch where they can be, refused by name elsewhere."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from ipu_pipeline.backends.ipu.runtime.static_errors import StaticGraphError
from tests.backends.ipu.runtime.programs import Body, Toy, batch, own, rehearsed, run


def _masked_write(m: Toy, x: Tensor, mask: Tensor, **_: Tensor) -> Tensor:
    y = x * m.weight
    y[mask == 0] = 7.0
    y[1:][(y > 0)[1:]] = m.weight[0]
    return y


def _vector_write(m: Toy, x: Tensor, **_: Tensor) -> Tensor:
    y = (x * m.weight)[..., None].repeat(1, 1, 4)
    y[x > 0] = m.weight
    return y


def _constant_write(m: Toy, x: Tensor, ids: Tensor, **_: Tensor) -> Tensor:
    made = torch.zeros(2, 4)
    made[:, 1:] = (x * m.weight)[:, :-1]
    made[:, 0] = 3
    shifted = ids.new_zeros(ids.shape)
    shifted[:, 1:] = ids[:, :-1].clone()
    return made + shifted


def _view_write(m: Toy, x: Tensor, ids: Tensor, **_: Tensor) -> Tensor:
    y, made = x * m.weight, torch.zeros(3, 2, 4)
    first = made[0]
    made[:2, :, 1:].copy_(y[:, :3])
    made[2].narrow(1, 2, 2)[1].add_(y[0, 2:])
    made.view(-1)[5:7] = y[1, :2]
    counted = ids.new_zeros(3, 4)
    counted[1:].copy_(ids)
    counted[0] += 2
    return first + made.sum(0) + counted[1:] + first.t().t()


def _if_any(m: Toy, x: Tensor, **_: Tensor) -> Tensor:
    y = x * m.weight
    hit = y > 100
    if hit.any():
        y[hit] = 0.0
    return y


def _alpha(m: Toy, x: Tensor, **_: Tensor) -> Tensor:
    factor = torch.tensor(1.0) / torch.sqrt(m.table[1, 1])
    return (
        torch.add(x, m.weight, alpha=factor)
        + torch.baddbmm(
            x[:, :, None],
            x[:, :, None],
            m.weight.view(1, 1, 4)[:, :, :1].expand(2, 1, 1),
            alpha=factor,
        )[:, :, 0]
    )


def _repeats(m: Toy, x: Tensor, **_: Tensor) -> tuple[Tensor, ...]:
    y = x * m.weight
    return (
        torch.repeat_interleave(y, 3, 1),
        y.repeat_interleave(2, dim=-2),
        y.repeat_interleave(2),
        y.repeat_interleave(torch.tensor([1, 0, 2, 3]), dim=1),
        torch.repeat_interleave(y, torch.tensor([2]), 0),
        torch.cat(torch.split(y, [1, 0, 3], dim=-1)[1:], -1),
    )


def _constants(m: Toy, x: Tensor, ids: Tensor, **_: Tensor) -> Tensor:
    length = torch.tensor(ids.shape[1])
    steps = torch.arange(length, device=x.device)
    causal = torch.full((4, 4), torch.tensor(-3.0)).triu(1).to(x.device, x.dtype)
    if (steps > 2).any() and m.plain.sum().item() == 6:
        causal = causal + steps[steps > 0].sum()
    picked = m.plain[ids.clamp(max=3)] + m.table[ids, 0]
    traced = torch.jit.is_tracing()  # then model code applies functions of tensors to sizes
    half = torch.ceil(x.shape[1] / 3).to(torch.int64) if traced else 2
    x = x.reshape(2, half, 2).flatten(1)
    return x[:, : length - 1].sum() + causal[None] + m.weight + picked[..., None]


def _scattered(m: Toy, x: Tensor, mask: Tensor, **_: Tensor) -> Tensor:
    return x.masked_scatter(mask == 1, (m.weight * 2)[None].repeat(2, 1))


def _classes(m: Toy, x: Tensor, **_: Tensor) -> Tensor:
    best = (x * m.weight).argmax(-1)
    return functional.one_hot(best, num_classes=4) * m.weight


def _read_inputs(m: Toy, x: Tensor, ids: Tensor, mask: Tensor, **_: Tensor) -> Tensor:
    if ids.max() >= 6:
        raise ValueError("no such id")
    longest = mask.sum(-1).max()
    assert torch.equal(torch.arange(longest), torch.arange(int(longest)))
    assert x.new_zeros(2, longest).shape == (2, int(longest))
    longest = int(longest)
    kept = x[:, :longest] * m.weight[:longest]
    rows, places = (mask == 1).nonzero(as_tuple=True)
    return kept.sum() + x[mask == 1].sum() + x[rows, places].mean() * m.weight


def _stacked(m: Toy, x: Tensor, **_: Tensor) -> Tensor:
    return torch.tensor([m.weight[0], x.sum()], dtype=torch.float32).to("cpu") * x.mean().cpu()


@pytest.mark.parametrize(
    "body",
    [
        _masked_write, _vector_write, _constant_write, _view_write, _if_any, _alpha, _repeats,
        _constants, _scattered, _classes, _read_inputs,
    ],
)  # fmt: skip
def test_a_program_computes_what_torch_does(body: Body) -> None:
    model = Toy(body)
    inputs = batch()
    expected = model(**own(inputs))
    found = run(rehearsed(model, inputs), model, inputs)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    gradients = [
        torch.autograd.grad(sum(t.sum() for t in _tensors(result)), model.weight)  # type: ignore[arg-type]
        for result in (found, expected)
    ]
    torch.testing.assert_close(*gradients)


def _tensors(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else list(value)


def test_tensors_of_the_program_make_a_tensor() -> None:
    model = Toy(_stacked)
    x = batch()["x"]
    found = run(rehearsed(model, batch()), model, batch())
    torch.testing.assert_close(found, torch.stack([model.weight[0], x.sum()]) * x.mean())


def _body(text: str) -> Body:
    return eval(f"lambda m, x, ids, mask: {text}", {"torch": torch, "functional": functional})


REFUSED = {
    "x[(x * m.weight) > 0]": r"selects by a mask \(x\[mask\]\)",
    "(x * m.weight).nonzero()": "nonzero has a shape that depends on values of the device",
    "torch.unique(x * m.weight)": "unique has a shape that depends on values of the device",
    "torch.where(x * m.weight > 0)": "where has a shape that depends on values of the device",
    "(x * m.weight).masked_select(x > 0).sum()": "masked_select has a shape that depends",
    "x * (x * m.weight).sum().item()": r"reads the value of a tensor in Python \(item\)",
    "x if (x * m.weight).sum() > 0 else ids": r"reads the value of a tensor in Python \(bool\)",
    "x[:, : (x * m.weight).argmax()]": r"reads the value of a tensor in Python \(item\)",
    "x.repeat_interleave((x * m.weight).argmax(-1) + 1, dim=0)": "repeat_interleave with counts",
    "functional.one_hot((x * m.weight).argmax(-1))": r"reads the value of a tensor .* \(item\)",
    "x if torch.isnan(x * m.weight).any() else ids": "asks whether values are finite in Python",
    "(x.sum() if (x * m.weight > 0).any() else x) + 1 + 1 + 1": "asks whether a mask has any true",
    "(x * m.weight).__setitem__((slice(1), x[0] > 0), 1.0)": "writes by a mask together with other",
    "(x * m.weight).__setitem__((x * m.weight) > 0, m.weight[:2])": "writes as many values as",
    "x.masked_scatter(mask == 1, m.weight[:2])": "masked_scatter has fewer values than its mask",
    "m.plain.add_(m.weight)": "writes a value of the device into a tensor that the module keeps",
    "m.table[:2].add_(1)": "writes to a part of a buffer",
    "torch.rand(2, generator=torch.Generator()) * x": "draws from a generator of its own",
}


@pytest.mark.parametrize("text", REFUSED)
def test_what_no_program_can_do(text: str) -> None:
    with pytest.raises(StaticGraphError, match=REFUSED[text]) as refused:
        rehearsed(Toy(_body(text)), batch())
    assert re.match(r"\w+\.py:\d+ \(.*\): .+; .+", str(refused.value))


def test_a_stale_view_is_refused() -> None:
    def body(m: Toy, x: Tensor, **_: Tensor) -> Tensor:
        made = torch.zeros(2, 4)
        first, _second = made.unbind()
        made[0] = x[0] * m.weight
        return first + x

    with pytest.raises(StaticGraphError, match="uses a view of a constant that was written"):
        rehearsed(Toy(body), batch())


# ---- float16 --------------------------------------------------------------------------------


def _guarded(m: Toy, x: Tensor, **_: Tensor) -> Tensor:
    y = x * m.weight
    if y.dtype == torch.float16 and (torch.isinf(y).any() or torch.isnan(y).any()):
        bound = torch.finfo(y.dtype).max - 1000
        y = torch.clamp(y, min=-bound, max=bound)
    return y


def _guarded_anew(m: Toy, x: Tensor, **_: Tensor) -> Tensor:
    y = x * m.weight
    if not torch.isfinite(y).all():
        y = torch.clamp(y, -64504.0, 64504.0)
    return y


@pytest.mark.skipif(
    torch.__version__.startswith("2.0"), reason="torch 2.0 clamps no float16 on the host"
)
@pytest.mark.parametrize("body", [_guarded, _guarded_anew])
def test_a_guard_against_overflow_always_clamps(body: Body) -> None:
    model = Toy(body).half()
    inputs = {"x": torch.tensor([[1.0, -2.0, 300.0, 0.5]]).half()}
    program = rehearsed(model, inputs)
    assert torch.equal(run(program, model, inputs), model(**inputs))  # nothing overflows
    inputs = {"x": torch.tensor([[-60000.0, 1.0, 1.0, 60000.0]]).half()}
    assert torch.equal(run(program, model, inputs), model(**inputs))  # something does
    inputs = {"x": torch.tensor([[65504.0, 0.0, 0.0, 0.0]]).half()}
    assert model(**inputs)[0, 0] == -65504
    assert run(program, model, inputs)[0, 0] == -64512  # the one difference: 64504, rounded


def test_ctc_takes_padded_rows_of_labels() -> None:
    def body(m: Toy, x: Tensor, labels: Tensor, **_: Tensor) -> Tensor:
        scores = (x[:, :, None] * m.weight).log_softmax(-1).transpose(0, 1)
        kept = labels >= 0
        return functional.ctc_loss(
            scores, labels.masked_select(kept), torch.full((2,), 4), kept.sum(-1), reduction="sum"
        )

    model = Toy(body)
    inputs = {"x": batch()["x"], "labels": torch.tensor([[1, 2, -100], [-100, 3, -100]])}
    program = rehearsed(model, inputs)
    torch.testing.assert_close(run(program, model, inputs), model(**inputs))
    inputs["labels"] = torch.tensor([[3, -100, -100], [1, 2, 1]])
    torch.testing.assert_close(run(program, model, inputs), model(**inputs))


def test_a_buffer_that_has_the_type_stays_itself() -> None:
    """Some models assign ``self.table = self.table.to(...)``, which poptorch refuses of another."""

    def body(m: Any, x: Tensor, **_: Tensor) -> Tensor:
        m.table = m.table.to(x.device, x.dtype)
        return x @ m.table[:4]

    model, inputs = Toy(body), batch()
    table = model.table
    found = run(rehearsed(model, inputs), model, inputs)
    assert model.table is table
    torch.testing.assert_close(found, inputs["x"] @ table[:4])
