"""The axis of samples of every input is found by running the model, not by comparing sizes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from ipu_pipeline.capture.batch_axes import (
    BatchAxes,
    find_axes,
    part_of,
    sized_like_samples,
)

WIDTH = 4


class Model(nn.Module):
    """A linear layer; what else happens is given."""

    def __init__(self, body: Callable[..., Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.body = body

    def forward(self, **inputs: Any) -> Any:
        return self.body(self.linear, **inputs)


def found(
    body: Callable[..., Any], given: dict[str, int | None] | None = None, **batch: Any
) -> BatchAxes:
    return find_axes(Model(body).eval(), batch, given or {})


def plain(linear: Any, x: Tensor, **_: Any) -> dict[str, Tensor]:
    return {"logits": linear(x)}


def positions(linear: Any, x: Tensor, position_ids: Tensor) -> dict[str, Tensor]:
    three, batch, _ = position_ids.shape
    assert (three, batch) == (3, len(x))
    return {"logits": linear(x) + position_ids.float().sum((0, 2)).unsqueeze(-1)}


def weighted(linear: Any, x: Tensor, labels: Tensor, table: Tensor) -> dict[str, Tensor]:
    loss = functional.cross_entropy(linear(x), labels, weight=table, reduction="sum") / len(x)
    return {"loss": loss}


def shared_negatives(linear: Any, x: Tensor, negatives: Tensor) -> dict[str, Tensor]:
    return {"loss": (linear(x) @ negatives.T).logsumexp(-1).mean()}


def looked_up(linear: Any, x: Tensor, ids: Tensor, table: Tensor) -> dict[str, Tensor]:
    return {"logits": linear(x) + table[ids]}


def contrastive(linear: Any, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    return {"logits_per_image": linear(x) @ linear(y).T}


def test_every_input_has_axis_0_where_that_is_so():
    result = found(plain, x=torch.randn(3, WIDTH), y=torch.randn(3))
    assert result == BatchAxes({"x": 0, "y": 0}, {"logits": 0})


def test_position_ids_of_three_axes_in_a_batch_of_three():
    ids = torch.arange(3 * 3 * 5).view(3, 3, 5)
    result = found(positions, x=torch.randn(3, WIDTH), position_ids=ids)
    assert result.axes == {"x": 0, "position_ids": 1}
    part = part_of({"position_ids": ids}, result.axes, 1, 2)["position_ids"]
    assert torch.equal(part, ids[:, 1:2])


@pytest.mark.parametrize("size", [4, 2])
def test_a_table_of_class_weights_is_whole(size: int):
    labels = torch.tensor([3, 1, 2, 0])[:size]
    x, table = torch.randn(size, WIDTH), torch.tensor([1.0, 2.0, 3.0, 4.0])
    result = found(weighted, x=x, labels=labels, table=table)
    assert result.axes == {"x": 0, "labels": 0, "table": None}


def test_shared_negatives_as_many_as_samples_are_whole():
    result = found(shared_negatives, x=torch.randn(8, WIDTH), negatives=torch.randn(8, WIDTH))
    assert result.axes == {"x": 0, "negatives": None}
    assert result.mixed == ()


def test_a_table_whose_rows_are_looked_up_is_whole():
    result = found(
        looked_up, x=torch.randn(4, WIDTH), ids=torch.tensor([1, 0, 3, 2]),
        table=torch.randn(4, WIDTH),
    )  # fmt: skip
    assert result.axes == {"x": 0, "ids": 0, "table": None}


def test_a_list_with_one_entry_per_sample_is_cut_where_the_model_uses_it_so():
    def body(linear: Any, x: Tensor, factors: list[float]) -> dict[str, Tensor]:
        return {"logits": linear(x) * torch.tensor(factors).view(-1, 1)}

    factors = [1.0, 2.0, 3.0]
    assert found(body, x=torch.randn(3, WIDTH), factors=factors).axes["factors"] == 0


def test_a_list_as_long_as_the_batch_stays_whole_where_that_gives_the_same():
    def body(linear: Any, x: Tensor, sizes: tuple[int, ...]) -> dict[str, Tensor]:
        return {"logits": linear(x) * sizes[0]}

    assert found(body, x=torch.randn(2, WIDTH), sizes=(2, 3)).axes["sizes"] is None


def test_outputs_that_mix_samples_are_named():
    result = found(contrastive, x=torch.randn(4, WIDTH), y=torch.randn(4, WIDTH))
    assert result.mixed == ("logits_per_image",)


def test_outputs_have_axes_too():
    def body(linear: Any, x: Tensor) -> dict[str, Tensor]:
        h = linear(x)
        return {"steps": h.expand(5, *h.shape), "table": linear.weight, "scale": h.new_ones(())}

    result = found(body, x=torch.randn(3, WIDTH))
    assert result.outputs == {"steps": 1, "table": None, "scale": None}


def test_rows_that_are_no_samples_cannot_be_cut():
    def body(linear: Any, x: Tensor, patches: Tensor) -> dict[str, Tensor]:
        return {"logits": linear(x) + patches.view(len(x), 4, WIDTH).sum(1)}

    result = found(body, x=torch.randn(3, WIDTH), patches=torch.randn(12, WIDTH))
    assert "input 'patches' of size (12, 4), given whole with two of the samples" in result.problem
    assert "RuntimeError: shape" in result.problem


def test_what_the_user_says_is_taken():
    ids = torch.zeros(3, 3, 5)
    result = found(plain, {"position_ids": 1}, x=torch.randn(3, WIDTH), position_ids=ids)
    assert result.axes == {"x": 0, "position_ids": 1}


def test_an_axis_of_size_1_is_broadcast_over_the_samples():
    ids = torch.arange(5)[None]
    assert part_of({"position_ids": ids}, {"position_ids": 0}, 2, 4)["position_ids"] is ids


def test_a_batch_of_one_sample_is_not_run():
    def body(linear: Any, x: Tensor) -> Any:
        raise AssertionError

    assert found(body, x=torch.randn(1, WIDTH)) == BatchAxes({"x": 0})


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_loss_over_labels_mixes_nothing(reduction: str):
    def body(linear: Any, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = linear(x).flatten(0, 1)
        return {"loss": functional.cross_entropy(logits, labels.flatten(), reduction=reduction)}

    labels = torch.randint(0, WIDTH, (4, 6))
    result = found(body, x=torch.randn(4, 6, WIDTH), labels=labels)
    assert (result.mixed, result.adds_up) == ((), reduction == "sum")


def test_a_loss_that_is_no_mean_is_named():
    def body(linear: Any, x: Tensor) -> dict[str, Tensor]:
        return {"loss": linear(x).mean().square(), "logits": linear(x)}

    assert found(body, x=torch.randn(4, WIDTH)).mixed == ("loss",)


def test_an_input_that_gets_another_shape_is_looked_at_again():
    long, short = torch.zeros(4, 5), torch.zeros(1, 5)
    x = torch.zeros(4, 3)
    first = sized_like_samples({"x": x, "position_ids": long})
    assert first == sized_like_samples({"x": x[:2], "position_ids": long[:2]})
    assert first != sized_like_samples({"x": x, "position_ids": short})


def test_rows_that_are_counted_over_the_whole_batch_cannot_be_cut():
    # As wav2vec 2.0 samples its negatives: only they could be cut, of samples that stay whole.
    def body(linear: Any, x: Tensor, others: Tensor) -> dict[str, Tensor]:
        h = linear(x)
        wrong = h[others.flatten()].view(len(x), -1, WIDTH)
        return {"loss": (h[:, None] * wrong).sum().exp(), "states": h}

    result = found(body, x=torch.randn(2, WIDTH), others=torch.tensor([[1, 1], [0, 0]]))
    assert result.problem.startswith("some of its samples make the model fail (IndexError: index 1")
