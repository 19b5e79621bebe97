"""Who updates which parameter when optimizer state is divided, and optimizers that lose theirs."""

from __future__ import annotations

import inspect
from collections import Counter

import pytest
import torch
from torch import Tensor, nn

from ipu_pipeline.backends.cluster import groups
from ipu_pipeline.backends.cluster.sharding import Ownership, OwnParameters, Place, sharded
from ipu_pipeline.ops.adamw import StochasticRoundingAdamW


def parameters(*sizes: int) -> list[nn.Parameter]:
    return [nn.Parameter(torch.zeros(size)) for size in sizes]


def places(found: Ownership, of: list[nn.Parameter]) -> list[Place]:
    return [found.updaters[id(p)] for p in of]


def test_the_replica_with_the_least_to_do_gets_the_next_largest() -> None:
    held = parameters(1, 5, 3, 3, 8)
    alone = {id(p): (1,) for p in held}
    found = sharded(Ownership(alone, Place(0, 1)), held, 2, lambda _: True)
    assert places(found, held) == [Place(1, 1), Place(1, 1), Place(1, 1), Place(0, 1), Place(0, 1)]


def test_a_tied_parameter_has_one_updater_among_all_its_holders() -> None:
    held = parameters(10, 6, 4, 4)
    tied, first, second, unused = held
    holders = {id(tied): (0, 1), id(first): (0,), id(second): (1,)}
    found = sharded(Ownership(holders, Place(0, 0)), held, 2, lambda _: True)
    assert places(found, held) == [Place(0, 0), Place(1, 0), Place(0, 1), Place(1, 0)]
    others = [Ownership(holders, Place(r, p), found.updaters) for r in range(2) for p in range(2)]
    for parameter in (tied, first, second, unused):
        assert sum(place.is_updated(parameter) for place in others) == 1
        assert sum(place.is_chief(parameter) for place in others) == 1


def test_undivided_every_holder_updates_and_one_counts() -> None:
    tied, unused = parameters(2, 2)
    everyone = [Ownership({id(tied): (1, 2)}, Place(r, p)) for r in range(2) for p in range(3)]
    assert [o.here for o in everyone if o.is_updated(tied)] == [(0, 1), (0, 2), (1, 1), (1, 2)]
    assert [o.here for o in everyone if o.is_chief(tied)] == [(0, 1)]
    assert [o.here for o in everyone if o.is_updated(unused)] == [(0, 0), (1, 0)]


def test_frozen_parameters_do_not_unbalance_the_others() -> None:
    held = parameters(9, 4, 4, 4, 4)
    held[0].requires_grad_(False)
    own = OwnParameters(torch.optim.SGD(held))
    stranger = nn.Parameter(torch.zeros(20))
    found = sharded(Ownership({}, Place(0, 0)), [stranger, *held], 2, own.trains)
    assert Counter(places(found, held[1:])) == {Place(0, 0): 2, Place(1, 0): 2}
    assert id(stranger) in found.updaters


# One asks for a closure, one for sparse gradients, one is abstract.
OTHERS = (torch.optim.LBFGS, torch.optim.SparseAdam, torch.optim.Optimizer)
OPTIMIZERS = [
    kind
    for kind in (*vars(torch.optim).values(), StochasticRoundingAdamW)
    if inspect.isclass(kind) and issubclass(kind, torch.optim.Optimizer) and kind not in OTHERS
]


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_an_optimizer_steps_without_any_parameter(kind: type[torch.optim.Optimizer]) -> None:
    model = nn.Linear(3, 2, bias=False)
    optimizer = kind([{"params": [model.weight]}], lr=0.1)  # type: ignore[call-arg]
    own = OwnParameters(optimizer)
    here = Ownership({}, Place(1, 0), {id(model.weight): Place(0, 0)})
    model.weight.grad = torch.ones(2, 3)
    before = model.weight.detach().clone()
    own.keep(here)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    optimizer.step()
    scheduler.step()
    assert torch.equal(model.weight, before)
    assert not optimizer.state
    own.restore()
    optimizer.step()
    assert not torch.equal(model.weight, before)


@pytest.fixture
def tensors() -> list[Tensor]:
    return [
        torch.arange(6.0).reshape(2, 3).t(),
        torch.zeros(0),
        torch.ones(2, dtype=torch.bfloat16),
        torch.arange(9.0),
        torch.tensor(3.0),
    ]


@pytest.mark.parametrize(("limit", "sizes"), [(1 << 20, [2, 16]), (40, [2, 6, 10])])
def test_messages_hold_tensors_of_one_type_up_to_a_limit(
    monkeypatch: pytest.MonkeyPatch, tensors: list[Tensor], limit: int, sizes: list[int]
) -> None:
    monkeypatch.setattr(groups, "BUCKET_BYTES", limit)
    expected = [tensor * 2 for tensor in tensors]
    messages: list[int] = []

    def double(message: Tensor) -> None:
        messages.append(message.numel())
        message.mul_(2)

    groups.exchange(tensors, double)
    assert sorted(messages) == sizes
    for tensor, twice in zip(tensors, expected, strict=True):
        assert torch.equal(tensor, twice)


def test_a_tensor_alone_is_sent_from_where_it_is() -> None:
    single, turned = torch.zeros(4), torch.zeros(2, 3).t()
    places: list[int] = []
    groups.exchange([single], lambda message: places.append(message.data_ptr()))
    assert places == [single.data_ptr()]
    groups.exchange([turned], lambda message: message.add_(1))
    assert turned.eq(1).all()
