"""Programs: what is known of the inputs is checked for every batch; nothing of it stays behind."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ipu_pipeline.backends.ipu.runtime.static_errors import StaticGraphError
from ipu_pipeline.backends.ipu.runtime.static_graph import (
    DeviceForward,
    StaticProgram,
    is_changed,
    static_graph,
)
from tests.backends.ipu.runtime.programs import Toy, batch, own, rehearsed, run


class _Cached(nn.Module):
    """Asks for a cache, and reads its mask when it is not traced."""

    def __init__(self) -> None:
        super().__init__()
        self.config = type("Config", (), {"use_cache": True})()
        self.inner = nn.Linear(2, 2)
        self.inner.config = self.config

    def forward(self, x: Tensor) -> dict[str, Any]:
        assert torch.jit.is_tracing()
        assert not self.config.use_cache
        return {"loss": self.inner(x).sum(), "logits": x, "rest": (x,)}


def test_a_static_graph_is_undone_after_an_error() -> None:
    model = _Cached()
    wrong_shape = torch.ones(1, 3)
    with pytest.raises(RuntimeError, match="cannot be multiplied"), static_graph(model):
        model(wrong_shape)
    assert not torch.jit.is_tracing()
    assert model.config.use_cache


def test_the_device_gets_tensors_only(poptorch: Any) -> None:
    model = _Cached()
    forward = DeviceForward(model, poptorch, {"num_io_tiles": None})
    assert is_changed(model)
    x = torch.ones(1, 2)
    assert isinstance(model.train()(x), Tensor)
    assert len(model.eval()(x)) == 2
    assert forward.names == ["loss", "logits"]
    with forward.restored():
        assert not is_changed(model)
    assert forward.inputs({"x": x}, 1, training=False, build=True) == {"x": x}
    forward.restore()
    assert not is_changed(model)
    assert "forward" not in model.__dict__


def _reads(m: Toy, x: Tensor, mask: Tensor, **_: Tensor) -> Tensor:
    return x[:, : int(mask.sum(-1).max())].sum() * m.weight


def test_what_python_reads_of_the_inputs_is_checked_for_every_microbatch() -> None:
    model = Toy(_reads)
    program = rehearsed(model, batch())
    two = {name: torch.cat([value, value]) for name, value in batch().items()}
    assert set(program.inputs(two, 2)) == set(two)
    two["mask"][3] = 1
    with pytest.raises(
        StaticGraphError,
        match=r"test_static_graph.py:\d+ \(return .*\): the model reads 4 of this batch, and the "
        r"program was built for 3; give all batches the same value there \(pad them alike\)",
    ):
        program.inputs(two, 2)


def test_an_unread_batch_may_be_any() -> None:
    model = Toy(lambda m, x, **_: x * m.weight)
    program = rehearsed(model, batch())
    other = {**batch(), "mask": torch.zeros(2, 4)}
    assert torch.equal(run(program, model, other), model(**own(other)))


def test_a_value_that_was_overwritten_is_not_known() -> None:
    def body(m: Toy, x: Tensor, ids: Tensor, **_: Tensor) -> Tensor:
        view = ids[0]
        view.copy_((x[0] * m.weight).long())
        return x * ids.sum().item()

    with pytest.raises(StaticGraphError, match="reads the value of a tensor in Python"):
        rehearsed(Toy(body), batch())


def test_an_attribute_that_changes_after_the_program_was_built() -> None:
    model = Toy(lambda m, x, **_: x * m.weight * m.scale)
    program = rehearsed(model, batch())
    model.scale = 0.25
    with pytest.raises(
        StaticGraphError, match=r"scale has changed .* its old value 0\.5; set it back, or compile"
    ):
        program.inputs(batch(), 1)


def test_an_attribute_that_the_forward_pass_writes_may_change() -> None:
    def body(m: Toy, x: Tensor, **_: Tensor) -> Tensor:
        m.scale = float(x.shape[1])
        return x * m.weight

    model = Toy(body)
    program = rehearsed(model, batch())
    assert model.scale == 0.5
    run(program, model, batch())
    assert model.scale == 4.0
    assert set(program.inputs(batch(), 1)) == set(batch())


def test_a_rehearsal_leaves_the_model_as_it_was() -> None:
    def body(m: Toy, x: Tensor, **_: Tensor) -> Tensor:
        m.kept = x * m.weight
        m.table.add_(1)
        return m.kept

    model = Toy(body)
    before = copy.deepcopy(model.state_dict())
    own_getitem = vars(Tensor).get("__getitem__")
    parameter = model.weight
    program = StaticProgram(model)
    program.rehearse(batch())
    assert not hasattr(model, "kept")
    assert model.weight is parameter
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert vars(Tensor).get("__getitem__") is own_getitem
    run(program, model, batch())  # buffers are written when the program runs
    assert torch.equal(model.table, before["table"] + 1)


def test_an_operation_whose_shape_torch_cannot_tell() -> None:
    model = Toy(lambda m, x, **_: torch.bincount((x * m.weight).long().flatten()))
    with pytest.raises(StaticGraphError, match="bincount has no shape without values"):
        rehearsed(model, batch())
