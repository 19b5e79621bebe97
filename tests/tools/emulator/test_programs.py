"""What executes is the recorded program: training equals plain torch for awkward models."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional


class Scaled(torch.autograd.Function):
    @staticmethod
    def forward(context, x):
        context.save_for_backward(x)
        return x.tanh()

    @staticmethod
    def backward(context, gradient):
        (x,) = context.saved_tensors
        return gradient * (1 - x.tanh() ** 2)


class Awkward(nn.Module):
    """Two layers, a table and two buffers around a function."""

    def __init__(self, function) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
        self.table = nn.Embedding(9, 6)
        self.lstm = nn.LSTM(6, 6, batch_first=True)
        self.norm = nn.BatchNorm1d(6)
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mean", torch.zeros(6))
        self.function = function

    def forward(self, x, i):
        return self.function(self, x, i)


def without_gradient(m, x, _):
    with torch.no_grad():
        y = m.b(x)
    return m.a(x) * y + m.a(x).detach() * m.b.weight.data.sum()


def in_place(m, x, _):
    m.count += 1
    y = m.a(x)
    m.mean.mul_(0.9).add_(y.detach().mean(0))
    y[:, 0] = y[:, 1] * 2
    y += m.mean + m.count
    y.view(-1).mul_(2)
    return y


def random(m, x, _):
    y = functional.dropout(m.a(x), 0.3)
    return y + torch.randn(6) * torch.rand_like(x) + torch.randint(0, 5, (6,))


@pytest.mark.parametrize(
    "function",
    [
        without_gradient,
        in_place,
        random,
        lambda m, x, _: Scaled.apply(m.a(x)) * 2,
        lambda m, x, _: m.norm(m.a(x)),
        lambda m, x, _: m.lstm(x.view(2, 2, 6))[0],
        lambda m, x, _: torch.func.vmap(lambda row: m.a(row) * row.sum())(x),
        lambda m, x, i: m.a(m.table(i)) @ m.table.weight.T,
        lambda m, x, _: m.a(x).half().float() + torch.stack([p * q for p, q in zip(x, x.flip(0))]),
        lambda m, x, i: functional.ctc_loss(
            m.a(x).log_softmax(-1)[:, None], i[None, :2], torch.tensor([4]), torch.tensor([2])
        ),
    ],
)
def test_two_steps_equal_torch(poptorch, function) -> None:
    model = Awkward(function)
    plain = copy.deepcopy(model)
    whole = Awkward(lambda m, x, i: poptorch.identity_loss(function(m, x, i), "mean"))
    executor = poptorch.trainingModel(whole, None, poptorch.optim.SGD(whole.parameters(), lr=0.1))
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    x, i = torch.linspace(-1.0, 1.0, 24).view(4, 6).sin(), torch.tensor([1, 2, 8, 0])
    for _ in range(2):
        torch.manual_seed(3)
        found = executor(x, i).item()
        torch.manual_seed(3)
        loss = plain(x, i).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert found == pytest.approx(loss.item(), rel=1e-5)
    for (name, ours), theirs in zip(whole.state_dict().items(), plain.state_dict().values()):
        ours = ours.detach().as_subclass(torch.Tensor)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6, msg=name)
