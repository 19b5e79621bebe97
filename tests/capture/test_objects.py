"""Objects that blocks hand on: what is in them crosses a cut as tensors, or they are refused."""

from __future__ import annotations

import threading
from collections import OrderedDict, UserDict, deque
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn

from ipu_pipeline.capture import capture
from ipu_pipeline.errors import CaptureError, GuardError
from tests.capture.toys import (
    WIDTH,
    Layer,
    assert_replays,
    assert_trains_in_stages,
    batch,
    last,
    toy,
)

ACTIVATION = nn.Tanh()


class Sharing(Layer):
    """The first to see a mapping puts its keys in; the others use them."""

    def forward(self, x: Tensor, shared: Any) -> Tensor:
        if "keys" not in shared:
            shared["keys"] = (self.linear(x), x * 2)
            shared["unused"] = x + 1
        keys, values = shared["keys"]
        return x * keys + values


class Notes:
    """Tensors and plain values in all kinds of members."""

    __slots__ = ("history", "kinds", "self", "table")

    def __init__(self) -> None:
        self.history: deque[Any] = deque()
        self.kinds = {torch.float32, torch.int64}
        self.table = np.arange(3)
        self.self = self


class Noting(Layer):
    def forward(self, x: Tensor, notes: Notes) -> Tensor:
        seen = [h for h in notes.history if isinstance(h, Tensor)]
        notes.history.extend([self.linear(x), len(seen)])
        return sum(seen, notes.history[-2]) + float(notes.table.sum())


class Appending(Layer):
    def forward(self, x: Tensor, states: list[Tensor]) -> Tensor:
        states.append(self.linear(x))
        return torch.stack(states).sum(0)


class Overwriting(Layer):
    def forward(self, x: Tensor, shared: Any) -> Tensor:
        shared["sum"][:] += self.linear(x)
        return shared["sum"] * x


class Caching(Layer):
    """Writes keys and values of its own, as attention does; ``number`` is set by the test."""

    number = 0

    def forward(self, x: Tensor, cache: Any) -> Tensor:
        heads = self.linear(x)[:, None, None]
        keys, values = cache.update(heads, heads * 2, self.number)
        return (keys * values).sum((1, 2)) + x


def handing(make: Any) -> Any:
    def body(self: Any, x: Tensor) -> dict[str, Tensor]:
        shared = make(x)
        return {"loss": self.layers[1](self.layers[0](x, shared), shared).square().mean()}

    return body


CASES = {
    "mapping object": (lambda _: UserDict(), Sharing),
    "dict": (lambda _: {}, Sharing),
    "ordered dict": (lambda _: OrderedDict(), Sharing),
    "members": (lambda _: Notes(), Noting),
    "list": (lambda _: [], Appending),
    "written tensor": (lambda x: UserDict(sum=x * 3), Overwriting),
}


@pytest.mark.parametrize("case", CASES)
def test_object_that_blocks_write_and_read(case: str) -> None:
    model = toy(handing(CASES[case][0]), CASES[case][1])
    captured = capture(model, batch())
    assert [program.name for program in captured.programs] == ["layers.0", "layers.1"]
    assert_replays(model, captured, batch(seed=5))
    assert_trains_in_stages(model, batch(seed=6))


def test_cache_that_only_its_writer_reads_adds_nothing_to_a_cut() -> None:
    model = toy(handing(lambda _: transformers.DynamicCache()), Caching)
    model.layers[1].number = 1
    captured = capture(model, batch())
    block = captured.graph["layers.1"]
    assert len(block.inputs) == 1
    assert_replays(model, captured, batch(seed=5))
    assert_trains_in_stages(model, batch(seed=6))


def test_only_what_is_used_crosses_a_cut() -> None:
    captured = capture(toy(handing(lambda _: UserDict()), Sharing), batch())
    assert len(captured.graph["layers.1"].inputs) == 3  # x, keys and values; not "unused"


def test_glue_reads_what_a_block_put_into_an_object() -> None:
    def body(self: Any, x: Tensor) -> dict[str, Tensor]:
        shared: Any = UserDict()
        h = self.layers[0](x, shared)
        shared["keys"] = (shared["keys"][0] * 3, shared["unused"])
        return {"loss": self.layers[1](h, shared=shared).square().mean()}

    model = toy(body, Sharing)
    assert_replays(model, capture(model, batch()), batch(seed=5))
    assert_trains_in_stages(model, batch(seed=6))


def test_dict_that_no_block_changes_is_a_plain_value() -> None:
    class Reading(Layer):
        def forward(self, x: Tensor, scales: dict[str, Any]) -> Tensor:
            return self.linear(x) * scales["x"] * scales["factor"]

    model = toy(handing(lambda x: {"x": x + 1, "factor": 2.0}), Reading)
    captured = capture(model, batch())
    targets = [str(n.target) for p in captured.programs for n in p.module.graph.nodes]
    assert {"layers.0", "layers.1"} <= set(targets)
    assert_replays(model, captured, batch(seed=5))


def test_object_under_no_grad() -> None:
    def body(self: Any, x: Tensor) -> dict[str, Tensor]:
        shared: Any = UserDict()
        with torch.no_grad():
            h = self.layers[0](x, shared)
        return {"loss": self.layers[1](h, shared).square().mean() + self.layers[1].linear(x).sum()}

    model = toy(body, Sharing)
    assert_replays(model, capture(model, batch()), batch(seed=5))


def test_plain_value_in_an_object_that_changes_with_the_batch() -> None:
    class Counting(Layer):
        def forward(self, x: Tensor, shared: Any) -> Tensor:
            shared["positive"] = int((x > 0).sum())
            return self.linear(x) * shared["positive"]

    captured = capture(toy(handing(lambda _: UserDict()), Counting), {"x": torch.ones(2, WIDTH)})
    with pytest.raises(GuardError, match=r"Counting left something else .* \'positive', 4\)"):
        captured.run({"x": torch.ones(2, WIDTH).index_fill(0, torch.tensor(1), -1)})


def test_tensor_in_an_object_that_was_not_used_at_capture() -> None:
    class Choosing(Layer):
        def forward(self, x: Tensor, shared: Any) -> Tensor:
            shared.setdefault("first", x * 2)
            return self.linear(x) + (shared["first"] if bool(x.sum() > 100) else x)

    captured = capture(toy(handing(lambda _: UserDict()), Choosing), batch())
    with pytest.raises(GuardError, match=r"uses \(add\) a tensor of an object that blocks share"):
        captured.run({"x": torch.full((2, WIDTH), 1e4)})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda _: UserDict(lock=threading.Lock()), "this one cannot be copied: cannot pickle"),
        (
            lambda _: UserDict(part=ACTIVATION),
            "this one cannot be copied: a module inside an object",
        ),
        (lambda _: torch.Generator(), "passes a Generator object from one block to the next"),
    ],
)
def test_object_that_cannot_be_built_anew(make: Any, message: str) -> None:
    class Taking(Layer):
        def forward(self, x: Tensor, shared: object) -> Tensor:
            return self.linear(x)

    with pytest.raises(CaptureError, match=message):
        capture(toy(handing(make), Taking), batch())


def test_object_that_outlives_the_run_is_refused() -> None:
    def body(self: Any, x: Tensor) -> dict[str, Tensor]:
        return {"loss": self.layers[1](self.layers[0](x, self.cache), self.cache).sum()}

    model = toy(body, Caching)
    model.cache = transformers.DynamicCache()
    with pytest.raises(CaptureError, match="passes a DynamicCache object from one block to the"):
        capture(model, batch())


def test_statistics_of_a_module_that_no_loss_needs_are_kept() -> None:
    model = toy(lambda self, x: (self.aside(x), last(self, self.layers[0](x)))[1])
    model.aside = nn.BatchNorm1d(WIDTH)
    captured = capture(model, batch())
    assert int(model.aside.num_batches_tracked) == 0
    captured.run(batch())
    assert int(model.aside.num_batches_tracked) == 1
