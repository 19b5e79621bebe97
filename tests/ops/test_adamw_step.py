"""The kernel and its plain-torch form, called directly; the optimizer is in test_adamw.py."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ipu_pipeline.ops import adamw_step as module
from ipu_pipeline.ops import extension
from ipu_pipeline.ops.adamw_step import AdamWSettings, AdamWTensors, adamw_step

NEEDS_LIBRARY = pytest.mark.skipif(
    not extension.state().usable, reason="the kernels are not built or switched off"
)
PATHS = [pytest.param("library", marks=NEEDS_LIBRARY), "plain"]
SHAPES = [(3,), (17, 33), (70_001,), (0,), (1,), (64, 64), ()]
SETTINGS = AdamWSettings(lr=1e-2, beta1=0.9, beta2=0.99, weight_decay=0.1, eps=1e-8)


@pytest.fixture(params=PATHS)
def path(request, monkeypatch) -> str:
    monkeypatch.setattr(extension, "available", lambda: request.param == "library")
    return request.param


def tensors_of(weight: Tensor) -> list[list[Tensor]]:
    return [
        [weight], [torch.ones_like(weight)], [torch.zeros_like(weight)],
        [torch.zeros_like(weight)], [torch.zeros(())],
    ]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("averages", [torch.float32, "of the weight"])
@pytest.mark.parametrize("gradients", [torch.float32, "of the weight"])
def test_16_bit_weights_are_updated_in_float32_and_rounded_once(
    path, dtype, averages, gradients
) -> None:
    averages = dtype if averages == "of the weight" else averages
    gradients = dtype if gradients == "of the weight" else gradients
    torch.manual_seed(0)
    weights = [torch.randn(shape).to(dtype) for shape in SHAPES]
    tensors = AdamWTensors(
        weights=[w.clone() for w in weights],
        gradients=[torch.randn(w.shape).to(gradients) for w in weights],
        exp_avgs=[torch.randn(w.shape).to(averages) for w in weights],
        exp_avg_sqs=[torch.rand(w.shape).to(averages) for w in weights],
        steps=[torch.tensor(4.0) for _ in weights],
    )
    exact = [t.clone() for t in tensors.exp_avgs], [t.clone() for t in tensors.exp_avg_sqs]
    adamw_step(tensors, SETTINGS)
    for i, weight in enumerate(weights):
        g, m, v = (t[i].float() for t in (tensors.gradients, *exact))
        m = 0.9 * m + 0.1 * g
        v = 0.99 * v + 0.01 * g * g
        denominator = (v / (1 - 0.99**5)).sqrt() + 1e-8
        w = weight.float() * (1 - 1e-3) - 1e-2 / (1 - 0.9**5) * m / denominator
        torch.testing.assert_close(tensors.weights[i], w.to(dtype), rtol=2**-7, atol=1e-6)
        same = tensors.weights[i] == w.to(dtype)
        assert (
            same.numel() == 0 or same.float().mean() > 0.99
        )  # the rest: ties within a float32 ulp
        torch.testing.assert_close(tensors.exp_avgs[i], m.to(averages), rtol=2**-7, atol=1e-6)
        torch.testing.assert_close(tensors.exp_avg_sqs[i], v.to(averages), rtol=2**-7, atol=1e-6)


@NEEDS_LIBRARY
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_kernel_converts_every_16_bit_number_as_torch_does(dtype) -> None:
    """Without gradient and decay a step only widens and rounds: nothing may change."""
    everything = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    for keys in ([], [7]):
        weight = everything.clone()
        zeros = torch.zeros(weight.shape)
        lists = [weight], [zeros], [zeros.clone()], [zeros.clone()], [torch.zeros(())]
        adamw_step(AdamWTensors(*lists, keys=keys), AdamWSettings(1e-3, 0.9, 0.99, 0.0, eps=1e-8))
        assert torch.equal(weight.isnan(), everything.isnan())
        kept = ~everything.isnan()
        assert torch.equal(weight[kept].view(torch.int16), everything[kept].view(torch.int16))


@NEEDS_LIBRARY
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_kernel_rounds_to_nearest_as_torch_does(dtype) -> None:
    """exp_avg with beta1 = 0 becomes the gradient, rounded: any float32 can be tried."""
    torch.manual_seed(1)
    any_bits = torch.randint(-(2**31), 2**31, (200_000,)).to(torch.int32).view(torch.float32)
    small = torch.randn(50_000) * 2.0**-15
    ties = (torch.arange(-(2**15), 2**15) * 2**16 + 2**15).to(torch.int32).view(torch.float32)
    half_ties = (torch.arange(-5000, 5000) + 0.5) * 2.0**-24
    edges = torch.tensor([65504.0, 65519.99, 65520.0, 65536.0, 3.39e38, 3.402e38, 0.0])
    given = torch.cat([any_bits, small, ties, half_ties, edges, -edges])
    given = given[~given.isinf()]  # an infinite average has no next one
    average = torch.zeros(given.shape, dtype=dtype)
    lists = [average.clone()], [given], [average], [average.clone()], [torch.zeros(())]
    adamw_step(AdamWTensors(*lists), AdamWSettings(0.0, 0.0, 0.9, 0.0, eps=1.0))
    expected = given.to(dtype)
    assert torch.equal(average.isnan(), expected.isnan())
    assert torch.equal(average[~expected.isnan()], expected[~expected.isnan()])


@NEEDS_LIBRARY
@pytest.mark.parametrize(
    ("position", "wrong", "message"),
    [
        (0, torch.zeros(3, dtype=torch.int64), "weights must be float32.*got Long"),
        (1, torch.zeros(4), r"gradient 0 has shape \[4\], its weight \[3\]"),
        (2, torch.zeros(3, dtype=torch.bfloat16), "exp_avg 0 is BFloat16, its weight Float"),
        (3, torch.zeros(3, dtype=torch.float64), "exp_avg_sq 0 is Double, its weight Float"),
        (4, torch.zeros(2), "step 0 has 2 elements of type Float; it must be one float32"),
        (4, torch.zeros((), dtype=torch.int64), "step 0 has 1 elements of type Long; it must be"),
    ],
)
def test_the_kernel_refuses_what_does_not_match(position, wrong, message) -> None:
    lists = tensors_of(torch.zeros(3))
    lists[position] = [wrong]
    with pytest.raises(RuntimeError, match=message):
        adamw_step(AdamWTensors(*lists), SETTINGS)
    assert not lists[4][0].any()


@NEEDS_LIBRARY
def test_the_kernel_refuses_averages_of_two_types_and_uneven_lists() -> None:
    lists = tensors_of(torch.zeros(3, dtype=torch.bfloat16))
    lists[3] = [torch.zeros(3)]
    with pytest.raises(RuntimeError, match="exp_avg 0 is BFloat16, exp_avg_sq Float; they must"):
        adamw_step(AdamWTensors(*lists), SETTINGS)
    lists[1] = []
    with pytest.raises(RuntimeError, match="1 weights, but 0 gradients, 1 and 1 averages, 1 steps"):
        adamw_step(AdamWTensors(*lists), SETTINGS)


@NEEDS_LIBRARY
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype) -> None:
    torch.manual_seed(0)
    for shape in ((4, 3), (0,)):
        lists = tensors_of(torch.randn(shape).to(dtype))
        settings = {"lr": 0.1, "beta1": 0.9, "beta2": 0.99, "weight_decay": 0.1, "eps": 1e-8}
        keyword = settings | {"maximize": False, "keys": [3]}
        torch.library.opcheck(module._operator(), tuple(lists), keyword)
