import copy

import pytest
import torch

from ipu_pipeline.errors import LoweringError
from ipu_pipeline.stages.training import LossScaler, apply_update, check_model, total_norm_of


def model_with_gradients(scale: float = 1.0) -> torch.nn.Module:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 2))
    (model(torch.randn(3, 4)).square().sum() * scale).backward()
    return model


def test_clipping_equals_torch():
    ours, theirs = model_with_gradients(), model_with_gradients()
    norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
    torch.optim.AdamW(theirs.parameters(), lr=0.1).step()
    result = apply_update(
        torch.optim.AdamW(ours.parameters(), lr=0.1), ours.parameters(), max_grad_norm=0.5
    )
    assert result.grad_norm == norm.item()
    assert not result.skipped
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b)
        assert a.grad is None


def test_norm_is_that_before_clipping_and_given_without_clipping():
    model = model_with_gradients()
    expected = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]).item()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    assert apply_update(optimizer, model.parameters()).grad_norm == expected


def test_loss_scaling_is_taken_out_exactly():
    plain, scaled = model_with_gradients(), model_with_gradients(1024.0)
    for model, factor in ((plain, 1.0), (scaled, 1024.0)):
        apply_update(
            torch.optim.SGD(model.parameters(), lr=0.1),
            model.parameters(),
            loss_scaling=factor,
            max_grad_norm=1.0,
        )
    for a, b in zip(plain.parameters(), scaled.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_overflow_changes_neither_weights_nor_optimizer_state(bad):
    model = model_with_gradients()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    apply_update(optimizer, model.parameters())
    model(torch.randn(3, 4)).sum().backward()
    model[0].weight.grad[1, 2] = bad
    weights = copy.deepcopy(model.state_dict())
    state = copy.deepcopy(optimizer.state_dict())
    result = apply_update(optimizer, model.parameters(), loss_scaling=8.0, max_grad_norm=1.0)
    assert result.skipped
    torch.testing.assert_close(model.state_dict(), weights, rtol=0, atol=0)
    torch.testing.assert_close(optimizer.state_dict()["state"], state["state"], rtol=0, atol=0)
    assert all(p.grad is None for p in model.parameters())


def test_a_tied_parameter_counts_once():
    weight = torch.nn.Parameter(torch.ones(3))
    weight.grad = torch.full((3,), 4.0)
    optimizer = torch.optim.SGD([weight], lr=1.0)
    result = apply_update(optimizer, [weight, weight], loss_scaling=2.0)
    assert result.grad_norm == pytest.approx(2.0 * 3**0.5)
    assert torch.equal(weight, torch.full((3,), -1.0))


def test_parameters_without_gradient_and_outside_the_optimizer():
    used, frozen, foreign = (torch.nn.Parameter(torch.ones(2)) for _ in range(3))
    used.grad, foreign.grad = torch.ones(2), torch.ones(2)
    result = apply_update(torch.optim.SGD([used], lr=1.0), [used, frozen, foreign])
    assert result.grad_norm == pytest.approx(2.0)
    assert used.grad is None
    assert foreign.grad is None
    assert torch.equal(foreign, torch.ones(2))


def test_no_gradient_at_all():
    weight = torch.nn.Parameter(torch.ones(2))
    result = apply_update(torch.optim.SGD([weight], lr=1.0), [weight], max_grad_norm=1.0)
    assert result.grad_norm == 0.0
    assert not result.skipped


def test_sparse_gradients_are_scaled_and_clipped_as_dense_ones_are():
    ids = torch.tensor([1, 3, 1])
    updated = []
    for sparse in (True, False):
        torch.manual_seed(0)
        model = torch.nn.Embedding(5, 3, sparse=sparse)
        (model(ids) * torch.arange(9.0).view(3, 3) * 4).sum().backward()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        result = apply_update(optimizer, model.parameters(), loss_scaling=4.0, max_grad_norm=0.5)
        updated.append((result, model.weight.detach()))
    (sparse_result, sparse_weight), (result, weight) = updated
    assert sparse_result.grad_norm == pytest.approx(result.grad_norm)
    torch.testing.assert_close(sparse_weight, weight)


def test_optimizers_that_need_a_closure_are_refused():
    model = torch.nn.Linear(2, 2)
    with pytest.raises(LoweringError, match=r"LBFGS\.step needs a closure that computes the loss"):
        check_model(model, torch.optim.LBFGS(model.parameters()))

    class SharpnessAware(torch.optim.SGD):
        def step(self, closure=None):
            assert closure is not None, "needs a closure"

    optimizer = SharpnessAware(model.parameters(), lr=0.1)
    check_model(model, optimizer)
    with pytest.raises(LoweringError, match=r"SharpnessAware\.step needs a closure"):
        apply_update(optimizer, model.parameters())


def test_other_errors_of_an_optimizer_stay_what_they_are():
    model = torch.nn.Linear(2, 2)

    class Broken(torch.optim.SGD):
        def step(self, closure=None):
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        apply_update(Broken(model.parameters(), lr=0.1), model.parameters())


def test_a_scaler_moves_as_that_of_plain_torch():
    skips = [True, False, False, False, True, False, False]
    weight = torch.nn.Parameter(torch.zeros(()))
    optimizer = torch.optim.SGD([weight], lr=0.0)
    theirs, own = (
        torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2, growth_factor=4.0)
        for _ in range(2)
    )
    ours = LossScaler(own, "float32")
    for number, skipped in enumerate(skips):
        assert ours.factor == theirs.get_scale()
        theirs.scale(weight.detach())
        weight.grad = torch.tensor(torch.inf if skipped else 0.0)
        theirs.step(optimizer)
        theirs.update()
        ours.update(skipped=skipped)
        if number == 3:  # a run that goes on
            state = ours.state()
            assert state == theirs.state_dict()
            ours = LossScaler(None, "fp16")
            ours.load(state)
    assert LossScaler(None, "fp16").factor == 65536.0
    assert LossScaler(None, "bf16").factor == LossScaler(1, "fp16").factor == 1.0


def test_a_scaler_refuses_float16_weights_without_copies():
    model = torch.nn.Linear(2, 2).half()
    LossScaler(None, "fp16").check(model, master_weights=True)
    LossScaler(8.0, "fp16").check(model, master_weights=False)
    with pytest.raises(LoweringError, match="weight is float16, and so is its gradient"):
        LossScaler(None, "fp16").check(model, master_weights=False)


def test_the_norm_of_16_bit_gradients_does_not_depend_on_their_grouping():
    torch.manual_seed(0)
    gradients = [torch.randn(40).bfloat16() for _ in range(3)]
    exact = torch.cat(gradients).double().norm()
    assert total_norm_of(gradients).item() == pytest.approx(exact.item(), rel=1e-6)
