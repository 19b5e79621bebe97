"""Living storages, and the workspace of blocks worked out by hand."""

from __future__ import annotations

import queue
import weakref

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ipu_pipeline.capture import capture
from ipu_pipeline.capture.recorder import LiveBytes
from tests.capture.toys import batch, toy

KIB = 1024


def test_a_storage_counts_once_and_until_its_last_view_is_gone() -> None:
    outside = torch.empty(64)
    live = LiveBytes([outside])
    tensor = torch.empty(256)
    view = tensor[:3]
    live.note([tensor, view, outside, outside.view(8, 8)])
    assert (live.now, live.peak) == (KIB, KIB)
    del tensor
    assert live.now == KIB
    del view
    assert (live.now, live.take_peak(), live.take_peak()) == (0, KIB, 0)


def test_what_the_graph_saves_stays_alive() -> None:
    with FakeTensorMode():
        live = LiveBytes([])
        x = torch.empty(256, requires_grad=True)
        live.note([y := x.exp()])
        live.note([z := y.sum()])
        del y
        assert live.now == KIB + 4
        z.backward()
        assert live.now == 4


class Wide(nn.Module):
    """16 x 4 in, 16 x 8 through exp, 16 x 4 out: 256, 512, 512 and 256 bytes of float32."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(4, 8, bias=False)
        self.down = nn.Linear(8, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).exp())


def test_workspace_by_hand() -> None:
    def body(self, x):
        return {"loss": self.layers[1](self.layers[0](x)).sum()}

    first = capture(toy(body, Wide), batch(x=torch.ones(16, 4))).graph.blocks[0]
    assert first.saved_bytes == 512  # the result of exp; the weights and x are not counted
    # Backward through exp: saved, the gradient that came, the one that leaves; the gradients of
    # the weights (128 each) have been added and freed. The output, which the next layer keeps,
    # is counted apart.
    assert (first.kept_bytes, first.workspace_bytes) == (256, 2 * 512 - 256)


def test_the_gradient_of_a_table_is_workspace() -> None:
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(1024, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.table(x) if not x.is_floating_point() else x * 1.0

    def body(self, x):
        return {"loss": self.layers[1](self.layers[0](x)).sum()}

    first = capture(toy(body, Table), batch(x=torch.ones(2, 3, dtype=torch.long))).graph.blocks[0]
    arrived, dense = 2 * 3 * 4 * 4, 1024 * 4 * 4
    assert (first.saved_bytes, first.workspace_bytes) == (0, arrived + dense)


def test_inference_needs_its_largest_moment() -> None:
    def body(self, x):
        return {"loss": self.layers[1](self.layers[0](x)).sum()}

    model = toy(body, Wide).eval()
    with torch.no_grad():
        first = capture(model, batch(x=torch.ones(16, 4))).graph.blocks[0]
    assert (first.saved_bytes, first.workspace_bytes) == (0, 2 * 512)


def test_a_run_on_real_tensors_measures_the_same() -> None:
    class Choosing(Wide):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if x.abs().max() >= 0 else x

    def body(self, x):
        return {"loss": self.layers[1](self.layers[0](x)).sum()}

    fake, real = (
        capture(toy(body, kind), batch(x=torch.ones(16, 4))).graph.blocks[0]
        for kind in (Wide, Choosing)
    )
    assert fake.workspace_bytes == real.workspace_bytes


def test_a_trace_keeps_nothing_for_a_backward_pass() -> None:
    alive: list[weakref.ref[Tensor]] = []
    note = alive.append  # what a model's code keeps itself is put back after a capture

    class Watched(Wide):
        def forward(self, x: Tensor) -> Tensor:
            inside = self.up(x).exp()
            note(weakref.ref(inside.untyped_storage()))
            return self.down(inside)

    def body(self, x):
        found = self.layers[1](self.layers[0](x)).sum()
        counts.put(sum(storage() is not None for storage in alive))
        return {"loss": found}

    counts = queue.SimpleQueue[int]()  # a list would be put back
    capture(toy(body, Watched), batch(x=torch.ones(16, 4)), self_check=False)
    assert (counts.qsize(), counts.get()) == (1, 0)


def test_a_model_may_run_a_backward_pass_inside() -> None:
    class Force(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            place = x.detach().requires_grad_()
            energy = self.linear(place).square().sum()
            (force,) = torch.autograd.grad(energy, place, create_graph=True)
            return x + force

    def body(self, x):
        return {"loss": self.layers[1](self.layers[0](x)).square().mean()}

    captured = capture(toy(body, Force), batch())
    assert len(captured.programs) == 2
