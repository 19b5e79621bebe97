"""What the executable leaves behind, evaluation, checkpoints, executables in files, refusals."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import ipu_pipeline as ipp
from ipu_pipeline.backends.ipu.check import check
from ipu_pipeline.backends.ipu.config import IPUConfig
from ipu_pipeline.backends.ipu.settings import settings_for
from ipu_pipeline.errors import LoweringError, StageError
from ipu_pipeline.stages.executable import ExecutionOptions
from tests.backends.ipu.emulated import Case, adamw, assert_same_weights, case, sessions_of, sgd
from tests.later import every_second, one_in

pytestmark = pytest.mark.usefixtures("poptorch")


def test_evaluation_with_a_remainder_on_the_host() -> None:
    made = case()
    batch = made.batch(copies=3)
    odd = {name: value[:5] for name, value in batch.items()}
    with made.local() as local, made.compile() as device:
        for executable in (local, device):
            executable.train_step(made.batch())
        ours, theirs = device.eval_step(odd), local.eval_step(odd)
        assert ours.loss == pytest.approx(theirs.loss, abs=1e-6)
        for name in ("start_logits", "end_logits"):
            torch.testing.assert_close(ours.outputs[name], theirs.outputs[name], rtol=0, atol=1e-6)
        # After more training, both the device's and the host's part see the new weights.
        for executable in (local, device):
            executable.train_step(made.batch(7))
        again = device.eval_step(odd).loss
        assert again == pytest.approx(local.eval_step(odd).loss, abs=1e-6)
        assert again != pytest.approx(ours.loss, abs=1e-5)


def test_the_remainder_of_a_model_with_shared_parameters() -> None:
    # DeBERTa hands one table to all layers; its value must be new after every step.
    made = case("deberta-v2")
    odd = {name: value[:3] for name, value in made.batch().items()}
    with made.local() as local, made.compile() as device:
        for seed in range(2):
            for executable in (local, device):
                executable.train_step(made.batch(seed))
            ours, theirs = device.eval_step(odd), local.eval_step(odd)
            assert ours.loss == pytest.approx(theirs.loss, abs=1e-6)


def test_a_plan_of_a_model_in_evaluation_mode() -> None:
    """Its microbatches are those of one call of the device: a pipeline of as few as its stages."""
    made = case()
    batch = {n: v for n, v in made.batch(copies=3).items() if not n.endswith("positions")}
    model = copy.deepcopy(made.model).eval()
    sample = {name: value[:2] for name, value in batch.items()}
    plan = ipp.plan(model, sample, machine="pod16", num_stages=3, microbatches=3)
    assert not plan.graph.training
    with ipp.compile(model, plan, target="poptorch") as device:
        assert device.settings.to_json()["inference_device_iterations"] == 3
        found = device.eval_step(batch).outputs["start_logits"]
    with torch.no_grad():
        torch.testing.assert_close(found, model(**batch).start_logits, rtol=1e-5, atol=1e-5)
    few = replace(plan, num_microbatches=2)
    with pytest.raises(LoweringError, match=r"2 microbatches in a call .* below the 3 forward"):
        check(few, settings_for(few))


def test_evaluation_without_labels_and_without_an_optimizer() -> None:
    made = case()
    batch = made.batch(copies=1)
    bare = {n: v for n, v in batch.items() if not n.endswith("positions")}
    with made.compile(None) as device:
        assert device.eval_step(bare).loss is None
        assert device.eval_step(batch).loss is not None
        # a remainder on the host without labels does not confuse the compiled program
        assert device.eval_step({name: value[:1] for name, value in bare.items()}).loss is None
        assert device.eval_step(batch).loss is not None
        with pytest.raises(LoweringError, match=r"train_step needs an optimizer"):
            device.train_step(made.batch())
        with pytest.raises(LoweringError, match=r"training needs an optimizer"):
            device.load_executable("nowhere")


@pytest.mark.parametrize(("layers", "ipus"), every_second([((1, 1, 2), [0, 1, 2]), ((-1,), [0])]))
def test_evaluation_runs_where_the_configuration_places_it(
    layers: tuple[int, ...], ipus: list[int]
) -> None:
    made = case(inference_layers_per_ipu=layers, inference_device_iterations=4)
    with made.local() as local, made.compile() as device:
        batch = made.batch(copies=4)
        for _ in range(2):
            ours, theirs = device.eval_step(batch), local.eval_step(batch)
            assert ours.loss == pytest.approx(theirs.loss, abs=1e-6)
            for executable in (device, local):
                executable.train_step(made.batch())
        sessions = sessions_of(device)
        for executor, wanted in ((sessions.training, [0, 1]), (sessions.inference, ipus)):
            assert executor.program.pipelined
            assert sorted({block.ipu for block in executor.program.blocks}) == wanted


def test_evaluation_as_a_pipeline_with_replicas() -> None:
    made = case(inference_device_iterations=2, inference_replication_factor=2)
    batch = made.batch(copies=4)
    with made.local(None) as local, made.compile(None) as device:
        ours, theirs = device.eval_step(batch), local.eval_step(batch)
        assert sessions_of(device).inference.program.pipelined
        torch.testing.assert_close(ours.outputs["start_logits"], theirs.outputs["start_logits"])
        assert ours.loss == pytest.approx(theirs.loss, abs=1e-6)


def momentum(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), 0.01, 0.9)


@pytest.mark.parametrize("make", one_in(3, [adamw, sgd, momentum]))
def test_checkpoints_go_from_the_device_to_local_and_back(make: Any, tmp_path: Path) -> None:
    reference, mixed = case(), case()

    def step(executable: Any, seed: int) -> None:
        for group in executable.optimizer.param_groups:  # as a scheduler does
            group["lr"] = 0.01 / (seed + 1)
        executable.train_step(mixed.batch(seed))

    with reference.compile(make) as device:
        for seed in range(6):
            step(device, seed)
    with mixed.compile(make) as device:
        for seed in range(2):
            step(device, seed)
        assert device.broadcast(3) == 3
        device.save_checkpoint(tmp_path / "first", {"note": 1}, blocking=False)
        device.train_step(mixed.batch(98))  # not in the checkpoint
    with mixed.local(make) as local:
        assert local.load_checkpoint(tmp_path / "first") == {"note": 1}
        assert local.global_step == 2
        for seed in range(2, 4):
            step(local, seed)
        local.save_checkpoint(tmp_path / "second")
    with mixed.compile(make) as device:
        device.train_step(mixed.batch(99))  # forgotten by loading
        device.load_checkpoint(tmp_path / "second")
        assert device.global_step == 4
        for seed in range(4, 6):
            step(device, seed)
        fetched = device.state_dict()
    assert_same_weights(mixed.model, reference.model)
    assert all(torch.equal(value, fetched[n]) for n, value in mixed.model.state_dict().items())


def test_a_checkpoint_before_the_first_step(tmp_path: Path) -> None:
    made = case()
    with made.compile(adamw) as device:
        device.save_checkpoint(tmp_path / "c")
        device.load_checkpoint(tmp_path / "c")
        assert device.global_step == 0


def test_random_numbers_go_on_after_a_resume(tmp_path: Path) -> None:
    alone, stopped, resumed = made = [case() for _ in range(3)]
    for each in made:  # the worker builds its model from this
        each.model.config.hidden_dropout_prob = 0.3
    with alone.compile(adamw) as device:
        losses = [device.train_step(alone.batch(seed)).loss for seed in range(4)]
    with stopped.compile(adamw) as device:
        for seed in range(2):
            device.train_step(stopped.batch(seed))
        device.save_checkpoint(tmp_path / "c")
        again = [device.train_step(stopped.batch(seed)).loss for seed in (2, 3)]
        device.load_checkpoint(tmp_path / "c")
        assert losses[2:] == again
        assert losses[2:] == [device.train_step(stopped.batch(seed)).loss for seed in (2, 3)]
    with resumed.compile(adamw) as device:
        device.load_checkpoint(tmp_path / "c")
        device.save_checkpoint(tmp_path / "same")  # before the first step
        device.load_checkpoint(tmp_path / "same")
        assert losses[2:] == [device.train_step(resumed.batch(seed)).loss for seed in (2, 3)]
    assert_same_weights(resumed.model, alone.model, 0)


def test_executables_in_files(tmp_path: Path) -> None:
    first, second = case(), case()
    with first.compile() as device:
        assert device.save_executable(tmp_path / "e.poptorch", first.batch()) == (
            tmp_path / "e.poptorch"
        )
        expected = device.train_step(first.batch()).loss
        with pytest.raises(LoweringError, match=r"compiled already; load the executable before"):
            device.load_executable(tmp_path / "e.poptorch")
    with second.compile() as device:
        device.load_executable(tmp_path / "e.poptorch")
        assert device.train_step(second.batch()).loss == pytest.approx(expected, abs=1e-6)


def test_an_offline_executable(tmp_path: Path) -> None:
    made = case()
    with made.compile() as device:
        device.save_executable(tmp_path / "e.poptorch", made.batch(), offline_ipu_version=2)
        device.load_executable(tmp_path / "e.poptorch")
        device.train_step(made.batch())
        with pytest.raises(LoweringError, match=r"made already for IPUs that are here"):
            device.save_executable(tmp_path / "f", made.batch(), offline_ipu_version=2)


def test_an_offline_executable_needs_a_power_of_two(tmp_path: Path) -> None:
    made = case(layers=(2, 1, 1), gradient_accumulation_steps=8)
    with (
        made.compile() as device,
        pytest.raises(LoweringError, match=r"does not round up .* 3 = 3 x 1 replicas"),
    ):
        device.save_executable(tmp_path / "e", made.batch(), offline_ipu_version=2)


def test_a_file_that_is_no_executable(tmp_path: Path) -> None:
    torch.save({}, tmp_path / "e")
    made = case()
    with made.compile() as device:
        with pytest.raises(LoweringError, match=r"poptorch cannot load .*not an executable"):
            device.load_executable(tmp_path / "e")
        device.train_step(made.batch())


def test_a_folder_that_is_not_there_is_said_before_compiling(tmp_path: Path) -> None:
    made = case()
    with made.compile() as device:
        with pytest.raises(LoweringError, match=r"no_folder is no folder; make it first"):
            device.save_executable(tmp_path / "no_folder" / "e", made.batch())
        assert sessions_of(device).training is None


def _short(made: Case) -> dict[str, torch.Tensor]:
    return {name: value[:-1] for name, value in made.batch().items()}


def test_refusals() -> None:
    made = case(replication_factor=2)
    with made.compile() as device:
        with pytest.raises(
            LoweringError,
            match=r"axis 0 of the batch must be 16 = device iterations 1 x microbatches 4 x "
            r"replicas 2 x micro batch 2, got .*15.* drop the last short batch",
        ):
            device.train_step(_short(made))
        with pytest.raises(LoweringError, match=r"gradients stay on the IPU"):
            device.forward_backward(made.batch())
        uneven = {**made.batch(), "attention_mask": torch.ones(3, 16)}
        with pytest.raises(LoweringError, match=r"axis 0 of the batch's tensors must be equal"):
            device.eval_step(uneven)
        device.train_step(made.batch())
        for other in (
            {n: v for n, v in made.batch().items() if n != "attention_mask"},
            {n: v[:, :9] if v.ndim > 1 else v % 9 for n, v in made.batch().items()},
        ):
            with pytest.raises(
                LoweringError, match=r"the batch is .* has a program for .*16x16 int"
            ):
                device.train_step(other)
    for call in (
        lambda: device.train_step(made.batch()),
        lambda: device.eval_step(made.batch()),
        lambda: device.save_checkpoint("x"),
        lambda: device.load_checkpoint("x"),
        lambda: device.load_executable("x"),
        lambda: device.save_executable("x", made.batch()),
    ):
        with pytest.raises(LoweringError, match=r"this executable is closed"):
            call()


def test_state_and_weights_that_are_loaded_here_reach_the_device() -> None:
    made = case()
    start = {name: value.clone() for name, value in made.model.state_dict().items()}
    with made.local(adamw) as local, made.compile(adamw) as device:
        empty = device.optimizer.state_dict()
        device.train_step(made.batch(7))
        device.state_dict()
        device.optimizer.load_state_dict(empty)
        made.model.load_state_dict(start)
        for seed in range(2):  # as if the first step had never been
            loss = device.train_step(made.batch(seed)).loss
            assert loss == pytest.approx(local.train_step(made.batch(seed)).loss, abs=1e-6)
        device.close()
        assert_same_weights(made.model, local.model)


def test_a_change_of_weights_that_are_older_than_the_devices(
    caplog: pytest.LogCaptureFixture,
) -> None:
    made = case()
    with made.compile() as device:
        device.train_step(made.batch())
        with torch.no_grad():
            made.model.qa_outputs.bias.add_(1)
        with pytest.raises(LoweringError, match=r"'qa_outputs.bias' was changed here while the"):
            device.train_step(made.batch())
        assert device.state_dict()["qa_outputs.bias"].max() < 0.5
        assert "changed here in qa_outputs.bias gives way to the device's" in caplog.text
        device.train_step(made.batch())


def test_what_fails_in_the_worker_says_where(monkeypatch: pytest.MonkeyPatch) -> None:
    made = case()
    with made.compile() as device:
        with pytest.raises(LoweringError, match=r"batch\.more is a set; give tensors, numbers"):
            device.train_step({**made.batch(), "more": {1}})
        with monkeypatch.context() as patched:
            layer = type(made.model.bert.encoder.layer[1])
            patched.setattr(layer, "forward", lambda *_, **__: 1 / 0)
            message = r"'train' failed in the worker.*ZeroDivisionError: division(.|\n)*line \d+"
            with pytest.raises(StageError, match=message):
                device.train_step(made.batch())
        assert device.train_step(made.batch()).loss > 0


def test_one_executable_at_a_time() -> None:
    made = case()
    with made.compile() as device:
        with pytest.raises(LoweringError, match=r"compiled already; close\(\) that executable"):
            made.compile()
        device.train_step(made.batch())
    made.compile().close()


@pytest.mark.parametrize("option", [{"ipu_config": IPUConfig()}, {"sdk_python": "python"}])
def test_other_targets_refuse_options_of_ipus(option: dict[str, Any]) -> None:
    with pytest.raises(LoweringError, match="local target runs on no IPU: leave ipu_config and"):
        case().local(**option)
    with pytest.raises(LoweringError, match="distributed target runs on no IPU"):
        ExecutionOptions(**option).refuse_ipus("distributed")
