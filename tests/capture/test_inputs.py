"""What a batch may hold besides tensors, and how the rest is refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import BatchEncoding

import ipu_pipeline as ipp
from ipu_pipeline.capture.inputs import described, ready_batch
from ipu_pipeline.errors import CaptureError
from tests.capture.toys import Toy, batch, last, toy


def body(self: Toy, x: Tensor, extra: Any = None) -> dict[str, Tensor]:
    factor = extra[0] if isinstance(extra, list | tuple) else 1.0
    factor = extra["scale"] if isinstance(extra, dict) else factor
    if isinstance(extra, Tensor | np.ndarray):
        factor = torch.as_tensor(extra).sum()
    return last(self, self.layers[0](x) * factor)


@pytest.mark.parametrize(
    "extra",
    [None, "text", 2, [2.0, 3.0], (2.0, "b"), {"scale": 2.0, "names": ["a", None]},
     np.float64(2.0), np.ones(3, dtype=np.float32), torch.float32],
)  # fmt: skip
def test_plain_values_lists_dicts_and_arrays_work(extra: Any):
    model = toy(body)
    inputs = batch(extra=extra)
    x = torch.cat([inputs["x"], inputs["x"] + 1])
    plan = ipp.plan(model, inputs, num_stages=2, microbatches=2)
    with ipp.compile(model, plan) as executable:
        expected = model(x=x, extra=extra)["loss"].item()
        assert executable.forward_backward({"x": x, "extra": extra}) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (SimpleNamespace(a=1), "'extra' of the batch is, or holds, a SimpleNamespace that cannot"),
        ([{1, 2}], "'extra' of the batch is, or holds, a list that cannot be compared"),
        (np.array(["a", "b"]), "'extra' of the batch is a numpy array of <U1; stages take"),
        ([{"boxes": torch.ones(2)}], "'extra' of the batch is a list that holds tensors"),
        ({"a": np.ones(2)}, "'extra' of the batch is a dict that holds tensors"),
        (BatchEncoding({"a": torch.ones(2)}), "'extra' of the batch is a BatchEncoding that holds"),
    ],
)
def test_what_cannot_be_cut_or_compared_is_refused_when_planning(extra: Any, message: str):
    with pytest.raises(CaptureError, match=message):
        ipp.plan(toy(body), batch(extra=extra), num_stages=2, microbatches=2)


@pytest.mark.parametrize(
    ("factor", "problem"),
    [
        (lambda array: float(array.std()), "computes something else"),  # divided by n, or n - 1
        (lambda array: torch.from_numpy(array).sum(), "fails .TypeError: expected np.ndarray"),
        (lambda array: float(array.astype("f8").sum()), "fails .AttributeError"),
    ],
)
def test_arrays_that_are_not_replaced_by_tensors_are_refused(factor: Any, problem: str):
    model = toy(lambda self, x, extra: last(self, self.layers[0](x) * factor(extra)))
    message = f"'extra' of the batch is a numpy array; stages take tensors, and Toy {problem}"
    with pytest.raises(CaptureError, match=message):
        ipp.plan(model, batch(extra=np.arange(4.0)[::-1]), num_stages=2, microbatches=2)


def test_arrays_that_only_tensors_replace_are_tensors():
    model = toy(lambda self, x, extra: last(self, self.layers[0](x) * extra.new_ones(1) * extra))
    plan = ipp.plan(model, batch(extra=np.float32([2.0])), num_stages=2, microbatches=2)
    assert plan.num_stages == 2


def test_an_empty_batch_is_refused():
    with pytest.raises(CaptureError, match="the example batch is empty; pass the model's keyword"):
        ready_batch({})


def test_values_of_other_types_are_other_captures():
    assert len({described(value) for value in (1, 1.0, True, "1", None, (1,), [1][0])}) == 6
    assert described([1, {"a": 2}]) == described([1, {"a": 2}])
    assert described(torch.ones(2)) != described(torch.ones(2, dtype=torch.int64))
