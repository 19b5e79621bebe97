"""Lowering: options and models that are refused, and what is said where poptorch is missing."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import pytest
import torch

from ipu_pipeline.backends.ipu.optimizers import optimizer_settings
from ipu_pipeline.errors import LoweringError
from ipu_pipeline.planner.passes.manager import PassManager
from tests.backends.ipu.emulated import case


def test_without_an_sdk() -> None:
    with pytest.raises(LoweringError, match=r"and none is named: .*run bundle/ --emulate"):
        case().compile()


@pytest.mark.usefixtures("poptorch")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "bf16"}, r"IPUs have no bfloat16; use model\.half\(\), or float32"),
        ({"precision": "fp16"}, r"precision='fp16' is autocast, which the device has not"),
        ({"schedule": "1f1b"}, r"IPUs run PopART's schedule, not '1f1b'; leave schedule out"),
        ({"loss_weights": [1.0]}, r"IPUs cut every input on axis 0 and take the mean"),
        ({"batch_axes": {"labels": 0}}, r"IPUs cut every input on axis 0 and take the mean"),
        ({"recompute": "all"}, r"recompute='all' is an option of the other targets"),
        (
            {"master_weights": True},
            r"master_weights are float32 copies that an optimizer in Python",
        ),
        ({"device": "cuda"}, r"compile_blocks, offload_activations and batches='share' are the"),
        ({"batches": "share"}, r"batches='share' are the local and distributed targets'"),
        ({"loss_scaling": torch.amp.GradScaler("cpu")}, r"loss_scaling of IPUs is a number"),
        ({"sequential": True}, r"sequential is the local target's; leave it out for poptorch"),
        (
            {"replicated_tensor_sharding": True},
            r"IPUs read it from ipu_config, where it is off; set it there",
        ),
    ],
)
def test_options_of_other_targets(options: dict[str, Any], message: str) -> None:
    with pytest.raises(LoweringError, match=message):
        case().compile(**options)


@pytest.mark.usefixtures("poptorch")
def test_parameters_that_the_device_has_not() -> None:
    made = case()
    made.model.qa_outputs.to(torch.bfloat16)
    made.plan = replace(made.plan, model=ipp_identity(made.model))
    with pytest.raises(LoweringError, match=r"parameters of type torch.bfloat16, torch.float32"):
        made.compile()


@pytest.mark.usefixtures("poptorch")
def test_activations_in_host_memory_are_refused() -> None:
    made = case()
    made.plan = PassManager.parse("offload{blocks=all}").run(made.plan)
    with pytest.raises(LoweringError, match="offloads activations to host memory, which GPUs do"):
        made.compile()


@pytest.mark.usefixtures("poptorch")
def test_hooks_on_gradients_are_refused() -> None:
    register = [
        lambda model: model.qa_outputs.weight.register_hook(lambda gradient: gradient * 0),
        lambda model: model.qa_outputs.weight.register_post_accumulate_grad_hook(print),
        lambda model: model.qa_outputs.register_full_backward_hook(print),
    ]
    made = case()
    for one in register:
        handle = one(made.model)
        with pytest.raises(LoweringError, match=r"'qa_outputs.* has a hook on its gradients or i"):
            made.compile()
        handle.remove()


def ipp_identity(model: torch.nn.Module) -> Any:
    """Return who the model is, for a plan."""
    from ipu_pipeline.capture import model_identity

    return model_identity(model)


@pytest.mark.usefixtures("poptorch")
def test_an_optimizer_over_other_parameters() -> None:
    made = case()
    with (
        made.compile(
            lambda _: torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=1.0)
        ) as device,
        pytest.raises(LoweringError, match=r"group 0 of the optimizer holds 1 tensors that are no"),
    ):
        device.train_step(made.batch())


@pytest.mark.usefixtures("poptorch")
def test_a_half_model_runs_in_half() -> None:
    made = case("vit")
    made.model.half()
    made.plan = replace(made.plan, model=ipp_identity(made.model))
    batch = made.batch()
    batch["pixel_values"] = batch["pixel_values"].half()
    with made.compile(loss_scaling=8.0) as device:
        assert device.settings.half
        assert device.train_step(batch).loss > 0
    assert {p.dtype for p in made.model.parameters()} == {torch.float16}


@pytest.mark.usefixtures("poptorch")
def test_notes_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    case(output_mode="final").compile().close()
    assert "gives back the loss of the last of 4 microbatches only" in caplog.text


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: torch.optim.RMSprop(p), r"RMSprop has no counterpart whose state moves both"),
        (lambda p: torch.optim.AdamW(p, amsgrad=True), r"AdamW\(amsgrad=True\) does not run on"),
        (lambda p: torch.optim.AdamW(p, maximize=True), r"AdamW\(maximize=True\) does not run"),
        (
            lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True),
            r"SGD\(nesterov=True\) does not run",
        ),
        (
            lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, dampening=0.5),
            r"SGD\(dampening=0.5\) does not run",
        ),
    ],
)
def test_optimizers_without_a_counterpart(make: Any, message: str) -> None:
    optimizer = make([torch.nn.Parameter(torch.ones(2))])
    with pytest.raises(LoweringError, match=message):
        optimizer_settings(optimizer, loss_scaling=1.0, max_grad_norm=None)
